"""What the captioners of transformers take: an image and a prompt in the form of the model's family.

FAMILIES has what is known of each family. An image and its prompt are prepared alone, as a batch of one, by
whichever thread reads the image; a batch is these, padded and joined. So what is odd about an image is its
own problem, and a caption does not depend on the images beside it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from transformers import PreTrainedModel, logging

from captioning.data.images import read_image
from captioning.data.sidecars import Sidecars
from utils import UserError, pick_device

# transformers' advice and progress bars would stand among the lines of our scripts
logging.set_verbosity_error()
logging.disable_progress_bar()


class Family(NamedTuple):
    """How the models of a type take an image.

    form: "pixels": the image alone. "text": with a task text through the processor. "chat": in a
        conversation, which the processor's chat template writes out.
    prompt: what they are asked unless the user asks something else.
    tasks: the only prompts that they know; empty: any.
    """

    form: Literal["pixels", "text", "chat"]
    prompt: str = ""
    tasks: tuple[str, ...] = ()

    @property
    def max_new_tokens(self) -> int:
        """The longest caption in tokens, where the user sets no other limit."""
        return 256 if self.form == "chat" else 30 if not self.tasks else 128


CHAT = Family("chat", "Write a caption for this image in one sentence. Answer with the caption alone.")
FLORENCE_TASKS = ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>", "<OCR>")
FAMILIES = {  # by `model_type`; each is in tests/captioners/test_families.py
    "blip": Family("pixels"),  # with a prompt, it continues that: blip.py
    "git": Family("pixels"),
    "vision-encoder-decoder": Family("pixels"),  # ViT-GPT2
    "blip-2": Family("text", "a photo of"),
    "florence2": Family("text", "<CAPTION>", FLORENCE_TASKS),
    "paligemma": Family("text", "caption en"),
    "gemma3": CHAT,
    "idefics3": CHAT,
    "internvl": CHAT,
    "llava": CHAT,
    "llava_next": CHAT,
    "llava_onevision": CHAT,
    "qwen2_vl": CHAT,
    "qwen2_5_vl": CHAT,
    "qwen3_vl": CHAT,
    "smolvlm": CHAT,
}
PLACEHOLDERS = ("{name}", "{folder}", "{caption}")
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels")  # (1, tokens)
NO_LABEL = -100  # of a token that is not part of the loss
MOST_ELONGATED = 100  # times as long as wide; image processors refuse or enlarge what is beyond this
SMALLEST_SIDE = 16  # pixels; some image processors take less for colour channels


@dataclass
class ModelInputs:
    """A model with what prepares its images and prompts, and reads its words.

    Attributes:
        processor: image processor, tokenizer and chat template in one; None: these two alone.
        max_new_tokens: the longest caption in tokens, the prompt not counted; None: as the family has it.
        max_pixels: larger images are made smaller, to this area, 10000 or more; 0: as the processor does it.
        sidecars: where `{caption}` of a prompt is read.
        prompt, system_prompt, keep_prompt, style: what `set_prompt` sets.
    """

    model: PreTrainedModel = field(repr=False)
    image_processor: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    processor: Any = field(default=None, repr=False)
    max_new_tokens: int | None = None
    max_pixels: int = 0
    sidecars: Sidecars = field(default_factory=Sidecars)
    prompt: str = ""
    system_prompt: str = ""
    keep_prompt: bool = False
    style: str = "parts"

    def to_device(self) -> ModelInputs:
        """Itself, its model moved to the best device unless it has its places already."""
        if not (getattr(self.model, "hf_device_map", None) or getattr(self.model, "is_quantized", False)):
            self.model.to(pick_device())
        return self

    @property
    def family(self) -> Family:
        return FAMILIES[self.model.config.model_type]

    @property
    def limit(self) -> int:
        return self.max_new_tokens or self.family.max_new_tokens

    @property
    def name(self) -> str:
        return self.model.config._name_or_path or f"this {self.model.config.model_type} model"

    # --- prompts --------------------------------------------------------------------------------------------

    def set_prompt(self, prompt: str = "", system_prompt: str = "", keep_prompt: bool = False) -> None:
        """What the model is asked; "" is the family's own. `{name}`, `{folder}` and `{caption}` in it stand
        for the image's name, its folder's, and what its sidecar says.

        Raises:
            UserError: a prompt that this model does not take.
        """
        family, kind = self.family, self.model.config.model_type
        prompt, system_prompt = prompt.strip(), system_prompt.strip()
        if family.form == "pixels" and prompt:
            raise UserError(f"{self.name}: a {kind} model takes no prompt; leave --prompt out")
        if family.form != "chat" and system_prompt:
            raise UserError(f"{self.name}: a {kind} model takes no system prompt; leave --system_prompt out")
        if keep_prompt:
            raise UserError(
                f"{self.name}: a {kind} model does not repeat its prompt; leave --conditional out"
            )
        if family.tasks and prompt and prompt not in family.tasks:
            raise UserError(f"--prompt {prompt}: {self.name} knows {', '.join(family.tasks)}; give one alone")
        if not family.tasks:
            self._check_words(prompt, "--prompt")
        self._check_words(system_prompt, "--system_prompt")
        self.prompt, self.system_prompt = prompt or family.prompt, system_prompt
        if family.form == "chat":
            self.style = self._find_style()

    def _check_words(self, text: str, where: str) -> None:
        """Raise UserError where a text has a token in it that steers the model, such as <image>."""
        own = [getattr(self.processor, name, None) for name in ("image_token", "video_token", "boi_token")]
        added = self.tokenizer.added_tokens_decoder.values()
        special = [token.content for token in added if token.special]
        for token in {*self.tokenizer.all_special_tokens, *special, *own, "<image>"}:
            if isinstance(token, str) and token.strip() and token in text:
                raise UserError(
                    f"{where}: has {token} in it, which is a mark of the model's own; leave it out"
                )

    def _find_style(self) -> str:
        """The first way to write a message with which the chat template gives one image and all the words.

        Templates of recent processors want a list of parts; older ones, such as JoyCaption's, want a string,
        and place the image themselves or expect its token there.
        """
        problem = "its chat template places no image"
        if not (self.processor.chat_template or self.tokenizer.chat_template):
            raise UserError(f"{self.name}: has no chat template; fetch it anew, with chat_template.jinja")
        for style in ("parts", "string", "token"):
            try:
                text = self._render(self.prompt, style)
            except Exception as error:  # of the template, which comes with the model
                problem = first_line(error)
                continue
            whole = self.prompt in text and self.system_prompt in text and "'type'" not in text
            if whole and text.count(self.image_token) == 1:
                return style
        advice = "; try without --system_prompt" if self.system_prompt else ""
        raise UserError(f"{self.name}: its chat template cannot be used ({problem}){advice}")

    @property
    def image_token(self) -> str:
        """What stands for an image in a conversation."""
        return getattr(self.processor, "boi_token", None) or self.processor.image_token

    def _render(self, prompt: str, style: str, answer: str | None = None) -> str:
        """The conversation as the chat template writes it, up to where the model answers or with `answer`."""
        contents = {
            "parts": [{"type": "image"}, {"type": "text", "text": prompt}],
            "string": prompt,
            "token": f"{self.image_token}\n{prompt}",
        }
        messages = [{"role": "user", "content": contents[style]}]
        if self.system_prompt:
            parts = [{"type": "text", "text": self.system_prompt}]
            content = parts if style == "parts" else self.system_prompt
            messages.insert(0, {"role": "system", "content": content})
        if answer is not None:
            parts = [{"type": "text", "text": answer}]
            messages.append({"role": "assistant", "content": parts if style == "parts" else answer})
        template = self.processor.chat_template or self.tokenizer.chat_template
        return self.processor.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=answer is None, tokenize=False
        )

    def _prompt_of(self, path: str | Path | None) -> str:
        """The prompt of an image file; of an image in memory the placeholders are empty."""
        prompt = self.prompt
        for placeholder in (words for words in PLACEHOLDERS if words in prompt):
            words = ""
            if path is not None:
                place = Path(path).absolute()
                names = {"{name}": place.stem, "{folder}": place.parent.name}
                words = names.get(placeholder) or self.sidecars.read_text(str(path))
                words = os.fsencode(words).decode("utf-8", "backslashreplace")
                self._check_words(words, f"{path}: its {placeholder[1:-1]}")
            prompt = prompt.replace(placeholder, words)
        return prompt

    # --- images ---------------------------------------------------------------------------------------------

    def prepare(self, path: str | Path) -> Any:
        """An image file, with its prompt, as the model takes it: the inputs of a batch of one.

        Raises:
            UserError: the file is missing, holds no readable image, or is too much for the model.
        """
        return self._prepared(read_image(path), path)

    def prepare_array(self, array: np.ndarray) -> Any:
        """uint8 RGB (3, height, width) as `prepare` gives a file."""
        return self._prepared(array, None)

    def _prepared(self, array: np.ndarray, path: str | Path | None) -> dict[str, Tensor]:
        image = fit_image(Image.fromarray(array.transpose(1, 2, 0)), self.max_pixels)
        prompt, place = self._prompt_of(path), path or "the image"
        try:
            inputs = self.inputs_of(image, prompt)
        except Exception as error:  # of the processor, which has its own limits
            raise UserError(f"{place}: cannot be given to {self.name} ({first_line(error)})") from None
        tokens = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        needed = tokens + (0 if self.is_encoder_decoder else self.limit)
        if tokens and isinstance(room, int) and needed > room:
            raise UserError(
                f"{place}: {tokens} tokens with its prompt and {self.limit} for the caption are more than "
                f"{self.name} takes ({room}); give a shorter prompt, or a smaller --max_pixels"
            )
        return inputs

    def inputs_of(self, image: Image.Image, prompt: str) -> dict[str, Tensor]:
        """What the model's `generate` takes of one image and its prompt, on the CPU."""
        if self.family.form == "pixels":
            return {"pixel_values": self.image_processor(images=image, return_tensors="pt")["pixel_values"]}
        options = {"return_tensors": "pt", "padding": False, "truncation": False}
        if self.family.form == "text":
            inputs = self.processor(images=[image], text=[prompt], **options)
        else:
            text, start = self._render(prompt, self.style), self.tokenizer.bos_token
            if start and text.startswith(start):
                options["add_special_tokens"] = False  # or there were two
            inputs = self.processor(images=[[image]], text=[text], **options)
        return {name: value for name, value in inputs.items() if name != "labels" and value is not None}

    # --- training -------------------------------------------------------------------------------------------

    def encode_caption(self, caption: str, max_length: int) -> list[int]:
        """The tokens with which the model is to answer, at most `max_length` of them and what ends them.

        In a chat it is what the template writes behind the prompt, with the spaces and the end that this
        family has. They are tokens of their own: a model that captions goes on behind the tokens of the
        prompt, so none can be merged across that border.
        """
        text, starts_text = caption, self.is_encoder_decoder or self.family.form == "pixels"
        if self.family.form == "chat":
            before, whole = (self._render(self.prompt, self.style, answer) for answer in (None, caption))
            text = whole[len(before) :] if whole.startswith(before) else caption
        tokens = self.tokenizer(text, add_special_tokens=starts_text)["input_ids"]
        ends = set(self.end_tokens())
        place = next((i for i, token in enumerate(tokens) if token in ends and i), len(tokens))
        end = tokens[place] if place < len(tokens) else self.tokenizer.eos_token_id
        return [*tokens[:place][:max_length], end]

    def training_inputs(self, inputs: Mapping[str, Tensor], tokens: list[int]) -> dict[str, Tensor]:
        """What `prepare` gave and the caption's tokens as inputs of a batch of one, with labels: the loss is
        on these tokens alone.

        Raises:
            UserError: there is none.
        """
        caption = torch.tensor([tokens])
        if self.is_encoder_decoder:
            return dict(inputs) | {"labels": caption}
        prompt = inputs.get("input_ids", caption[:, :0])
        joined = dict(inputs) | {"input_ids": torch.cat([prompt, caption], dim=1)}
        joined["attention_mask"] = torch.ones_like(joined["input_ids"])
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in inputs:  # PaliGemma's prompt sees all of itself, its answer what stands before
                kind = int(self.model.config.model_type == "paligemma")
                joined[name] = F.pad(inputs[name], (0, len(tokens)), value=kind)
        joined["labels"] = F.pad(caption, (prompt.shape[1], 0), value=NO_LABEL)
        return joined

    def join(self, images: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Inputs with labels as one batch, on the CPU."""
        return join_inputs(images, self.pad_token_id, "right")

    @property
    def is_encoder_decoder(self) -> bool:
        config = self.model.config
        return bool(config.is_encoder_decoder or config.get_text_config().is_encoder_decoder)

    @property
    def pad_token_id(self) -> int:
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in known if token is not None)

    def batch(self, images: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Prepared images as one batch, on the model's device."""
        joined = join_inputs(images, self.pad_token_id, "right" if self.is_encoder_decoder else "left")
        device, dtype = self.model.device, self.model.dtype
        return {
            name: value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
            for name, value in joined.items()
        }


def fit_image(image: Image.Image, max_pixels: int = 0) -> Image.Image:
    """An RGB image in a shape and size that every image processor takes.

    One that is over MOST_ELONGATED times as long as wide gets white borders, one of a few pixels is enlarged,
    and one of more than `max_pixels` (0: any) is made smaller, in its shape.
    """
    width, height = image.size
    shortest = -(-max(width, height) // MOST_ELONGATED)
    if min(width, height) < shortest:
        size = (max(width, shortest), max(height, shortest))
        page = Image.new("RGB", size, "white")
        page.paste(image, ((size[0] - width) // 2, (size[1] - height) // 2))
        image = page
    area = image.width * image.height
    if max_pixels and area > max_pixels:
        image = ImageOps.scale(image, (max_pixels / area) ** 0.5, Image.Resampling.BICUBIC)
    elif min(image.size) < SMALLEST_SIDE:
        image = ImageOps.scale(image, -(-SMALLEST_SIDE // min(image.size)), Image.Resampling.NEAREST)
    return image


def join_inputs(
    images: Sequence[Mapping[str, Tensor]], pad_token_id: int, side: Literal["left", "right"]
) -> dict[str, Tensor]:
    """Inputs of single images as those of one batch, as a processor pads and stacks them.

    What belongs to the text (1, tokens) is padded on the `side`: on the left where the model continues the
    text. Of anything else, (number of images, tiles or patches, ...), the first dimension is joined, and the
    others are padded with zeros at their ends, as tiles that are not there are.
    """
    batch = {}
    for name in images[0]:
        tensors, is_text = [image[name] for image in images], name in TEXT_INPUTS
        largest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors))]
        value = {"input_ids": pad_token_id, "labels": NO_LABEL}.get(name, 0)
        padded = []
        for tensor in tensors:
            missing = [full - size for full, size in zip(largest, tensor.shape[1:])]
            pads = [(gap, 0) if is_text and side == "left" else (0, gap) for gap in reversed(missing)]
            padded.append(F.pad(tensor, [pad for both in pads for pad in both], value=value))
        batch[name] = torch.cat(padded)
    return batch


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:150] if lines else type(error).__name__

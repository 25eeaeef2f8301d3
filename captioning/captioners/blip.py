"""BLIP (Li et al., 2022) and captioners with its interface, as transformers has them: loading, captioning.

    captioner = load_captioner("Salesforce/blip-image-captioning-base")    # or a folder of train_model.py
    pixels = torch.stack([captioner.prepare(path) for path in ("a.jpg", "b.png")])
    captioner.caption_prepared(pixels, num_beams=3)    # two strings

Model, processor and search are transformers' own. captioning/captioners/tiny_blip.py builds a small BLIP with
random weights, for which nothing has to be downloaded; datasets.py has what a training needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BlipProcessor,
    DynamicCache,
    EncoderDecoderCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    logging,
)
from transformers.generation.utils import GenerateOutput

from captioning import HUB_MODEL
from captioning.captioners.base import BaseCaptioner, Caption, stack_maps
from captioning.captioners.blip_files import check_config, check_files, check_preparation
from captioning.data.images import read_image
from captioning.data.prepared import require_disk_space
from captioning.data.submissions import ScoredCaption
from captioning.decoding.options import DecodingOptions
from captioning.decoding.sampling import draw_words, image_seed, uniform_numbers
from utils import UserError

# transformers' advice and progress bars would stand among the lines of our scripts
logging.set_verbosity_error()
logging.disable_progress_bar()

AnyCaption = TypeVar("AnyCaption", ScoredCaption, Caption)


@dataclass
class BlipCaptioner(BaseCaptioner):
    """A captioning model with what prepares its images and reads its words."""

    model: PreTrainedModel
    image_processor: object
    tokenizer: object

    def prepare(self, path: str | Path) -> Tensor:
        """An image file as the model takes it: float32 (3, height, width), resized and normalized.

        Raises:
            UserError: the file is missing or holds no readable image.
        """
        return self.prepare_array(read_image(path))

    def prepare_array(self, array: np.ndarray) -> Tensor:
        """uint8 RGB (3, height, width) -> float32 (3, S, S), as `prepare` does with a file."""
        return self.process(Image.fromarray(array.transpose(1, 2, 0)))[0]

    def process(self, images: Image.Image | list[Tensor], **options: bool) -> Tensor:
        """What the image processor makes of an image, or of tensors (3, height, width): (N, 3, S, S).

        Args:
            options: the processor's, such as `do_resize=False`.
        """
        # transformers 4 would guess, and takes one row of pixels for the one channel of a grey image
        order = "channels_last" if isinstance(images, Image.Image) else "channels_first"
        options = {"input_data_format": order, "return_tensors": "pt", **options}
        return self.image_processor(images=images, **options)["pixel_values"]

    def caption_prepared(
        self, pixels: Tensor, num_beams: int = 3, max_new_tokens: int = 30, prompt: str = "",
        keep_prompt: bool = False,
    ) -> list[str]:  # fmt: skip
        """The captions of prepared images (N, 3, height, width); arguments as in `decode_prepared`."""
        search = {"max_new_tokens": max_new_tokens, "prompt": prompt, "keep_prompt": keep_prompt}
        return [own[0].text for own in self.decode_prepared(pixels, DecodingOptions(num_beams), **search)]

    @torch.no_grad()
    def decode_prepared(
        self,
        images: Tensor,
        options: DecodingOptions,
        ids: Sequence[str] = (),
        with_scores: bool = False,
        max_new_tokens: int = 30,
        prompt: str = "",
        keep_prompt: bool = False,
    ) -> list[list[ScoredCaption]]:
        """The captions of each of the prepared images (N, 3, height, width).

        Args:
            options: transformers ranks the captions of a beam by log-probability per token. Lengths and
                n-grams are counted in tokens.
            ids: the images' ids, for samples.
            with_scores: give log-probabilities, of what follows the prompt; for BLIP alone.
            max_new_tokens: longest caption in tokens, the prompt not counted.
            prompt: words that each caption begins with; for BLIP alone.
            keep_prompt: leave the prompt in the captions.
        """
        inputs, start = {}, ""
        if prompt:
            inputs = self.tokenizer([prompt] * len(images), return_tensors="pt", return_token_type_ids=False)
            inputs = inputs.to(self.model.device)
            (start,) = self.tokenizer.batch_decode(inputs["input_ids"][:1], skip_special_tokens=True)
        # of the beam all, where several are wanted: tokens that differ may spell the same caption
        wanted = options.num_captions if options.samples or options.num_captions == 1 else options.beam_size
        output = self._generate(images, options, ids, wanted, max_new_tokens, with_scores, **inputs)
        texts = self.tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
        scores = self._scores(output) if with_scores else [()] * len(texts)
        found = []
        for text, own in zip(map(str.strip, texts), scores):
            new = text.removeprefix(start.strip()).strip() if prompt else text
            text = text if keep_prompt else new
            if with_scores:
                log_prob, words = own
                found.append(ScoredCaption.of(text, log_prob, len(new.split()), words))
            else:
                found.append(ScoredCaption(text))
        groups = [found[i : i + wanted] for i in range(0, len(found), wanted)]
        groups = groups if options.samples else map(distinct, groups)
        return [own[: options.num_captions] for own in groups]

    def _generate(
        self,
        images: Tensor,
        options: DecodingOptions,
        ids: Sequence[str],
        count: int,
        max_new_tokens: int,
        with_logits: bool = False,
        **inputs: Tensor,
    ) -> GenerateOutput:
        """transformers' search or samples: `count` sequences an image, one image after the other."""
        refused = [
            name for name in ("length_penalty", "remove_bad_endings", "allow_unk") if getattr(options, name)
        ]
        if refused:
            raise UserError(f"--{refused[0]} is for attention models alone: leave it out")
        search, rows = {"num_beams": options.beam_size, "do_sample": False}, options.beam_size
        if options.samples:
            draw = DrawnWords(options, ids, count, max(max_new_tokens, options.min_length), self.model.device)
            # the draws are ours, and depend on the image's seed alone
            search = {"do_sample": True, "top_k": 0, "logits_processor": LogitsProcessorList([draw])}
            search, rows = {"num_beams": 1} | search, count
        with shared_by_beams(self.model, rows) as cache:
            return self.model.generate(
                pixel_values=images.to(self.model.device, self.model.dtype, non_blocking=True),
                num_return_sequences=count,
                max_new_tokens=max(max_new_tokens, options.min_length),
                min_new_tokens=options.min_length,
                no_repeat_ngram_size=options.no_repeat_ngram,
                return_dict_in_generate=True,
                output_logits=with_logits,
                **search,
                **cache,
                **inputs,
            )

    def _scores(self, output: GenerateOutput) -> list[tuple[float, list[tuple[str, float]]]]:
        """The log-probability of each sequence under the model, with that of its end, and of each word."""
        require_blip(self, self.model.config._name_or_path or "this captioner", "--with_scores")
        scores = self.model.text_decoder.compute_transition_scores(
            output.sequences, output.logits, getattr(output, "beam_indices", None), normalize_logits=True
        )
        tokens = output.sequences[:, -scores.shape[1] :]
        ended = tokens == self.model.config.text_config.sep_token_id
        scores = scores.masked_fill(ended.cumsum(dim=1) > ended.int(), 0.0)
        found = []
        for own, values in zip(tokens.tolist(), scores.tolist()):
            words = [(word, sum(values[i] for i in places)) for word, places in self._words_of(own)]
            found.append((sum(values), words))
        return found

    def _words_of(self, tokens: Sequence[int]) -> list[tuple[str, list[int]]]:
        """Each word of a sequence, and the places of its pieces."""
        special, words = set(self.tokenizer.all_special_ids), []
        for place, token in enumerate(tokens):
            piece = self.tokenizer.convert_ids_to_tokens(token)
            if token in special:
                continue
            if piece.startswith("##") and words:
                word, places = words.pop()
                words.append((word + piece[2:], [*places, place]))
            else:
                words.append((piece, [place]))
        return words

    @torch.no_grad()
    def describe_prepared(
        self, images: Tensor, options: DecodingOptions, ids: Sequence[str] = (), max_new_tokens: int = 30
    ) -> list[Caption]:
        """Prepared images -> their captions with log-probabilities, cross-attention and the n best, or all
        samples.

        Attention is the cross-attention of the decoder (N, heads, tokens, 1 + patches) at the step that
        chose a word: the mean over heads and over the last half of the layers, without the class token,
        made to sum to 1. Of a word of several pieces it is the pieces' mean, and the log-probability their
        sum.

        Raises:
            UserError: the model is not BLIP.
        """
        require_blip(self, self.model.config._name_or_path or "this captioner", "where it looked")
        count = options.num_captions if options.samples else options.beam_size
        images = images.to(self.model.device, self.model.dtype)
        found = self._generate(images, options, ids, count, max_new_tokens).sequences
        start, end = self.model.config.text_config.bos_token_id, self.model.config.text_config.sep_token_id
        # each a start token, the caption's, and where it is complete the end token; padding behind it
        sequences = [[start, *self._after_start(tokens, start, end)] for tokens in found.tolist()]
        states = self.model.vision_model(pixel_values=images).last_hidden_state
        captions = []
        for i in range(len(images)):
            own = [self._details(tokens, states[i : i + 1]) for tokens in sequences[i * count :][:count]]
            own = own if options.samples else distinct(own)
            captions.append(replace(own[0], n_best=own))
        return captions

    @staticmethod
    def _after_start(ids: list[int], start: int, end: int) -> list[int]:
        """The tokens that were generated, up to the end token."""
        ids = ids[1:] if ids[0] == start else ids
        return ids[: ids.index(end) + 1] if end in ids else ids

    def _details(self, ids: list[int], states: Tensor) -> Caption:
        """ids: `[DEC]`, tokens, `[SEP]`. states: (1, 1 + patches, D) of the image."""
        output = self.model.text_decoder(
            input_ids=torch.tensor([ids[:-1]], device=states.device),
            encoder_hidden_states=states,
            output_attentions=True,
            return_dict=True,
        )
        log_probs = output.logits[0].float().log_softmax(dim=1)
        log_probs = log_probs[torch.arange(len(ids) - 1), ids[1:]].tolist()  # of ids[1:]
        layers = output.cross_attentions[len(output.cross_attentions) // 2 :]
        maps = torch.stack([layer[0].float() for layer in layers]).mean(dim=(0, 1))[:, 1:].cpu()  # (L, P)
        maps = maps / maps.sum(dim=1, keepdim=True)
        side = round(maps.shape[1] ** 0.5)
        found = self._words_of(ids[1:])
        word_log_probs = [sum(log_probs[place] for place in places) for _, places in found]
        attention = stack_maps([maps[places].mean(dim=0) for _, places in found], side, side)
        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return Caption(text, [word for word, _ in found], sum(log_probs), word_log_probs, attention)

    def save(self, folder: str | Path) -> None:
        """Write the files by which `load_captioner`, or transformers' own classes, read a BLIP again."""
        size = sum(tensor.nbytes for tensor in self.model.state_dict().values())
        Path(folder).mkdir(parents=True, exist_ok=True)
        require_disk_space(Path(folder), size, "free some disk space")
        try:
            self.model.save_pretrained(folder, safe_serialization=True)
        except SafetensorError as error:
            raise UserError(f"{folder}: the model cannot be written ({error})") from None
        BlipProcessor(self.image_processor, self.tokenizer).save_pretrained(folder)
        self.image_processor.save_pretrained(folder)


def distinct(captions: Sequence[AnyCaption]) -> list[AnyCaption]:
    """The first caption of each text."""
    texts = [caption.text for caption in captions]
    return [caption for k, caption in enumerate(captions) if caption.text not in texts[:k]]


class DrawnWords(LogitsProcessor):
    """Leaves each sequence one word, drawn with the numbers of its image."""

    def __init__(
        self, options: DecodingOptions, ids: Sequence[str], count: int, steps: int, device: torch.device
    ):
        seeds = [image_seed(options.seed, image_id) for image_id in ids]
        numbers = uniform_numbers(seeds, count, steps).flatten(0, 1).to(device)  # (N * count, steps)
        self.columns = iter(numbers.unbind(dim=1))
        self.temperature, self.top_p = options.temperature or 1.0, options.top_p or 1.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        words = draw_words(scores, next(self.columns), self.temperature, self.top_p)
        return torch.full_like(scores, -torch.inf).scatter_(1, words.unsqueeze(1), 0.0)


# --- beams that share an image -----------------------------------------------------------------------------


class ImageCache(DynamicCache):
    """Keys and values of images (N, heads, tokens, D): the same, whichever beams a search goes on with."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        pass


@contextmanager
def shared_by_beams(model: PreTrainedModel, num_beams: int) -> Iterator[dict[str, EncoderDecoderCache]]:
    """Options for one `model.generate` with which the beams of an image share its keys and values.

    By itself `generate` has each beam compute, keep and, at every step, copy those of its image. Here
    BLIP's cross-attention takes the beams of an image (N * beams, L, D) as so many more of its queries
    (N, beams * L, D), which gives the same but for rounding. One beam, and other models, need no option.
    """
    if num_beams == 1 or model.config.model_type != "blip":
        yield {}
        return

    def join(module: nn.Module, inputs: tuple[Tensor], options: dict) -> tuple[tuple[Tensor], dict]:
        (hidden,) = inputs
        states = options["encoder_hidden_states"][::num_beams]  # `generate` repeats an image's for its beams
        # The mask has every beam's row, and masks nothing: images have no padding.
        options |= {"encoder_hidden_states": states, "attention_mask": None}
        return (hidden.unflatten(0, (-1, num_beams)).flatten(1, 2),), options

    def part(module: nn.Module, inputs: tuple[Tensor], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *rest = outputs
        return hidden.unflatten(1, (num_beams, -1)).flatten(0, 1), *rest

    with ExitStack() as hooks:
        for layer in model.text_decoder.bert.encoder.layer:
            hooks.enter_context(layer.crossattention.register_forward_pre_hook(join, with_kwargs=True))
            hooks.enter_context(layer.crossattention.register_forward_hook(part))
        yield {"past_key_values": EncoderDecoderCache(DynamicCache(), ImageCache())}


# --- loading ------------------------------------------------------------------------------------------------


def load_captioner(model_path: str | Path) -> BlipCaptioner:
    """A captioner in float32 on the CPU, in evaluation mode, from a folder or the hub; what was fetched from
    the hub before is used without asking it again. No code that comes with a model is run.

    Raises:
        UserError: no such folder or hub model, the hub cannot be reached, damaged files, no captioning model.
    """
    name = str(model_path)
    in_folder = Path(name).is_dir()
    if Path(name).is_file():
        raise UserError(f"{name}: is a file; give the folder that train_model.py wrote or a hub model")
    if in_folder and not (Path(name) / "config.json").is_file():
        raise UserError(f"{name}: no model in it (no config.json); give the folder that train_model.py wrote")
    if not in_folder and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"{name}: no such folder; train_model.py writes one, {HUB_MODEL} is on the hub")
    if in_folder:
        check_files(name)
    try:
        return _read_captioner(name, local_files_only=True)
    except UserError:
        raise
    except Exception as error:  # files from anywhere fail in any of transformers' and its readers' ways
        if in_folder:
            raise UserError(
                f"{name}: not a complete captioning model ({_first_line(error)}); fetch or train it anew"
            ) from None
    _require_on_hub(name)
    try:
        return _read_captioner(name, local_files_only=False)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name}: cannot be loaded ({_first_line(error)}); give another model") from None


def _read_captioner(name: str, local_files_only: bool) -> BlipCaptioner:
    options = {"trust_remote_code": False, "local_files_only": local_files_only}
    config = AutoConfig.from_pretrained(name, **options)
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise UserError(
            f"{name}: a {config.model_type} model, which captions no images; give BLIP or the like"
        )
    check_config(name, config)
    model, loaded = AutoModelForImageTextToText.from_pretrained(name, output_loading_info=True, **options)
    classes = config.architectures or [type(model).__name__]
    missing = find_missing(model, loaded["missing_keys"])
    if type(model).__name__ not in classes or missing:
        lacking = f" ({missing[0]} is missing)" if missing else ""
        raise UserError(f"{name}: weights of {classes[0]} that do not make a whole captioning model{lacking}")
    damaged = next((key for key, tensor in model.state_dict().items() if not tensor.isfinite().all()), None)
    if damaged:
        raise UserError(f"{name}: damaged weights ({damaged} is not finite); fetch or train them anew")
    image_processor = AutoImageProcessor.from_pretrained(name, **options)
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    captioner = BlipCaptioner(model.eval(), image_processor, tokenizer)
    check_preparation(name, captioner)
    return captioner


def find_missing(model: nn.Module, missing_keys: Iterable[str]) -> list[str]:
    """The parameters that are random, as no file has them, nor others that they are tied to."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = [name for name in missing_keys if name in parameters]
    loaded = {parameters[name].data_ptr() for name in parameters.keys() - set(missing)}
    return [name for name in missing if parameters[name].data_ptr() not in loaded]


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:150] if lines else type(error).__name__


def _require_on_hub(name: str) -> None:
    """Raise UserError unless the hub answers and has the model; a model's own loading would try for long."""
    try:
        HfApi().model_info(name, timeout=10)
    except RepositoryNotFoundError:
        raise UserError(
            f"{name}: neither a folder nor a model on the hub; train_model.py writes blip_finetuned_model/"
        ) from None
    except Exception:  # of whichever network library the hub's own has
        raise UserError(
            f"{name}: no such folder, and the hub cannot be reached; where there is a network, run "
            f"`hf download {name} --local-dir blip_model`, copy the folder here, and give its name instead"
        ) from None


def require_blip(captioner: BlipCaptioner, name: str | Path, what: str) -> None:
    """Raise UserError unless the captioner is BLIP. what: which needs it, such as "--prompt"."""
    if captioner.model.config.model_type != "blip":
        raise UserError(f"{name}: a {captioner.model.config.model_type} model; {what} is for BLIP alone")

"""BLIP (Li et al., 2022), as transformers has it: beams that share an image, where it looked, a tiny one.

    captioner = load_captioner("Salesforce/blip-image-captioning-base")    # or a folder of train_model.py
    captioner.set_prompt("a photo of", keep_prompt=True)
    captioner.caption("a.jpg")

Model, processor and search are transformers' own. `tiny_captioner` builds a small BLIP with random weights,
for which nothing has to be downloaded: the one that tests and the demonstration train. It has a hundredth of
BLIP's size, and starts from weights that let it learn from a thousand images in minutes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import BertWordPieceTokenizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch import Tensor, nn
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
)

from captioning.captioners.base import Caption, stack_maps
from captioning.captioners.model_inputs import PLACEHOLDERS
from captioning.captioners.vision_language import VisionLanguageCaptioner, distinct
from captioning.data.images import read_image
from captioning.decoding.options import DecodingOptions
from utils import UserError


@dataclass
class BlipCaptioner(VisionLanguageCaptioner):
    """BLIP, which continues its prompt, and whose cross-attention is known."""

    def set_prompt(self, prompt: str = "", system_prompt: str = "", keep_prompt: bool = False) -> None:
        """Words that every caption begins with. keep_prompt: leave them in the captions."""
        if system_prompt:
            raise UserError(f"{self.name}: BLIP takes no system prompt; leave --system_prompt out")
        for placeholder in (words for words in PLACEHOLDERS if words in prompt):
            raise UserError(
                f"--prompt: {placeholder} is for models that are asked; BLIP continues its prompt, which is "
                f"one for all images"
            )
        self._check_words(prompt, "--prompt")
        self.prompt, self.keep_prompt = prompt, keep_prompt

    def prepare_array(self, array: np.ndarray) -> Tensor:
        """uint8 RGB (3, height, width) -> float32 (3, S, S), resized and normalized; `prepare` gives the same
        of a file."""
        return self.process(Image.fromarray(array.transpose(1, 2, 0)))[0]

    def process(self, images: Image.Image | list[Tensor], **options: bool) -> Tensor:
        """What the image processor makes of an image, or of tensors (3, height, width): (N, 3, S, S).

        Args:
            options: the processor's, such as `do_resize=False`.
        """
        if not isinstance(
            images, Image.Image
        ):  # some would guess, and take one row of pixels for one channel
            options["input_data_format"] = "channels_first"
        return self.image_processor(images=images, return_tensors="pt", **options)["pixel_values"]

    def prepare(self, path: str | Path) -> Tensor:
        return self.prepare_array(read_image(path))

    def batch(self, images: Sequence[Tensor]) -> dict[str, Tensor]:
        pixels = torch.stack([*images]).to(self.model.device, self.model.dtype, non_blocking=True)
        inputs = {"pixel_values": pixels}
        if self.prompt:
            prompts = [self.prompt] * len(images)
            words = self.tokenizer(prompts, return_tensors="pt", return_token_type_ids=False)
            inputs |= words.to(self.model.device)
        return inputs

    def prompt_length(self, inputs: Mapping[str, Tensor]) -> int:
        """BLIP goes on from the prompt without its end token; the first token starts a text."""
        return inputs["input_ids"].shape[1] - 1 if "input_ids" in inputs else 1

    def searching(self, rows: int) -> Any:
        return shared_by_beams(self.model, rows)  # it has end and padding of its own

    def end_tokens(self) -> list[int]:
        return [self.model.config.text_config.sep_token_id]

    @property
    def scorer(self) -> PreTrainedModel:
        return self.model.text_decoder

    def caption_prepared(
        self, pixels: Sequence[Tensor], num_beams: int = 3, max_new_tokens: int = 30, prompt: str = "",
        keep_prompt: bool = False,
    ) -> list[str]:  # fmt: skip
        """The captions of prepared images, with these settings in place of the captioner's own."""
        other = replace(self, max_new_tokens=max_new_tokens, prompt=prompt, keep_prompt=keep_prompt)
        return [own[0].text for own in other.decode_prepared(pixels, DecodingOptions(num_beams))]

    def words_of(self, tokens: Sequence[int]) -> list[tuple[str, list[int]]]:
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
        self, images: Sequence[Tensor], options: DecodingOptions, ids: Sequence[str] = ()
    ) -> list[Caption]:
        """Prepared images -> their captions with log-probabilities, cross-attention and the n best, or all
        samples.

        Attention is the cross-attention of the decoder (N, heads, tokens, 1 + patches) at the step that
        chose a word: the mean over heads and over the last half of the layers, without the class token,
        made to sum to 1. Of a word of several pieces it is the pieces' mean, and the log-probability their
        sum.
        """
        count = options.num_captions if options.samples else options.beam_size
        inputs = replace(self, prompt="").batch(images)
        found = self.generate(inputs, options, ids, count).sequences
        start, end = self.model.config.text_config.bos_token_id, self.model.config.text_config.sep_token_id
        # each a start token, the caption's, and where it is complete the end token; padding behind it
        sequences = [[start, *self._after_start(tokens, start, end)] for tokens in found.tolist()]
        states = self.model.vision_model(**inputs).last_hidden_state
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
        found = self.words_of(ids[1:])
        word_log_probs = [sum(log_probs[place] for place in places) for _, places in found]
        attention = stack_maps([maps[places].mean(dim=0) for _, places in found], side, side)
        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return Caption(text, [word for word, _ in found], sum(log_probs), word_log_probs, attention)

    def save(self, folder: str | Path) -> None:
        """As every captioner, and the processor as transformers' own BLIP has it."""
        super().save(folder)
        if self.adapter is None:
            BlipProcessor(self.image_processor, self.tokenizer).save_pretrained(folder)
            self.image_processor.save_pretrained(folder)


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
    (N, beams * L, D), which gives the same but for rounding. One beam needs no option.
    """
    if num_beams == 1:
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


# --- a tiny one ---------------------------------------------------------------------------------------------

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")
MOST_WORDS = 4000  # in the vocabulary; rarer words are spelled letter by letter
IMAGE_SIZE, PATCH_SIZE = 64, 8  # pixels
WIDTH, HEADS = 96, 4
VISION_LAYERS, TEXT_LAYERS = 3, 2


def tiny_captioner(captions: Iterable[str], paths: Sequence[str] = ()) -> BlipCaptioner:
    """A small BLIP with random weights (from torch's generator) and the vocabulary of the captions.

    Its vision half starts with what a vision transformer otherwise takes long to learn: positions, attention
    of each patch to patches like it, and a patch embedding that whitens the patches of the images `paths`.
    """
    tokenizer = build_tokenizer(captions)
    model = build_model(tokenizer)
    processor = BlipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    captioner = BlipCaptioner(model.eval(), processor, tokenizer)
    images = []
    for path in paths:
        with suppress(UserError):  # the training names those that cannot be read
            images.append(captioner.prepare(path))
    if images:
        whiten_patches(model.vision_model.embeddings.patch_embedding, torch.stack(images))
    return captioner


def build_tokenizer(captions: Iterable[str]) -> BertTokenizerFast:
    """BERT's WordPiece tokenizer with a vocabulary of the captions' most frequent words and all letters."""
    split = BertPreTokenizer().pre_tokenize_str
    words = Counter(word for caption in captions for word, _ in split(caption.lower()))
    letters = sorted({letter for word in words for letter in word})
    frequent = sorted(words, key=lambda word: (-words[word], word))[:MOST_WORDS]
    pieces = [*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters), *frequent]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    word_pieces = BertWordPieceTokenizer(vocab=vocabulary, strip_accents=False)
    return BertTokenizerFast(tokenizer_object=word_pieces._tokenizer, bos_token="[DEC]")


def build_model(tokenizer: BertTokenizerFast) -> BlipForConditionalGeneration:
    """BLIP of the sizes above, its positions and its attention initialized."""
    shared = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_attention_heads": HEADS,
        "hidden_act": "relu",
        "initializer_range": WIDTH**-0.5,  # BLIP's own 0.02 is meant for large widths or loaded weights
    }
    pad, _, _, sep, _, start = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)
    text = {"pad_token_id": pad, "bos_token_id": start, "sep_token_id": sep, "eos_token_id": sep}
    text |= {"vocab_size": len(tokenizer), "num_hidden_layers": TEXT_LAYERS}
    vision = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "num_hidden_layers": VISION_LAYERS}
    model = BlipForConditionalGeneration(BlipConfig(text_config=shared | text, vision_config=shared | vision))
    with torch.no_grad():
        positions = model.vision_model.embeddings.position_embedding  # (1, 1 + num_patches, WIDTH)
        positions[0, 1:] = 0.5 * sine_positions(IMAGE_SIZE // PATCH_SIZE, WIDTH)
        for layer in model.vision_model.encoder.layers:
            start_attention(layer.self_attn.qkv.weight, layer.self_attn.projection.weight, HEADS)
    return model


def sine_positions(side: int, width: int) -> Tensor:
    """Sines and cosines of each patch's column and row: (side * side, width), row by row."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    rates = 100 ** (-torch.arange(width // 4) / (width // 4))  # radians per patch
    angles = [place.flatten().unsqueeze(1) * rates for place in (columns, rows)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)


def start_attention(qkv: Tensor, projection: Tensor, heads: int) -> None:
    """Initialize self-attention so that each patch attends to patches like it and subtracts what they share.

    This is how trained vision transformers attend (Trockman and Kolter, 2023, "Mimetic Initialization of
    Self-Attention Layers"): the product of the query and key weights is close to the identity, that of the
    value and output weights close to its negative.

    Args:
        qkv: (3 * width, width), written in place.
        projection: the output weights (width, width), written in place.
    """
    width = len(projection)
    head_width = width // heads

    def factors_near_identity(scale: float) -> tuple[Tensor, Tensor]:
        """Two matrices whose product is `scale` times the identity, with noise."""
        noise = torch.randn(width, width) / width**0.5
        left, singular_values, right = torch.linalg.svd(scale * (noise + torch.eye(width)))
        return left * singular_values.sqrt(), singular_values.sqrt().unsqueeze(1) * right

    for head in range(heads):
        left, right = factors_near_identity(0.7)
        own = slice(head * head_width, (head + 1) * head_width)
        qkv[:width][own], qkv[width : 2 * width][own] = left[:, :head_width].T, right[:head_width]
    projection[:], qkv[2 * width :] = factors_near_identity(-0.4)


@torch.no_grad()
def whiten_patches(embedding: nn.Conv2d, images: Tensor) -> None:
    """Initialize the patch embedding with the principal components of the patches, each scaled to variance 1.

    In raw patches, brightness drowns the edges by which shapes differ.

    Args:
        embedding: written in place; it has at most as many channels as a patch has values.
        images: prepared (N, 3, S, S).
    """
    patches = F.unfold(images, embedding.kernel_size, stride=embedding.stride).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(dim=0)
    variances, components = torch.linalg.eigh((patches - mean).T.cov(correction=0))  # ascending
    largest = slice(-embedding.out_channels, None)
    weight = (components[:, largest] / (variances[largest] + 0.01).sqrt()).T
    embedding.weight.copy_(weight.view_as(embedding.weight))
    embedding.bias.copy_(-weight @ mean)

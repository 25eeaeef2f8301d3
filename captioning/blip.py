"""BLIP (Li et al., 2022) and captioners with its interface, as transformers has them: loading, captioning.

    captioner = load_captioner("Salesforce/blip-image-captioning-base")    # or a folder of train_model.py
    pixels = torch.stack([captioner.prepare(path) for path in ("a.jpg", "b.png")])
    captioner.caption_prepared(pixels, num_beams=3)    # two strings

Model, processor and search are transformers' own. `tiny_captioner` builds a small BLIP with random weights,
for which nothing has to be downloaded; `BlipDataset`, `encode_captions` and `pad_captions` feed a training.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from PIL import Image
from tokenizers import BertWordPieceTokenizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
)
from transformers.models.blip import modeling_blip_text

from captioning.annotations import Record
from captioning.features import weights_digest
from captioning.images import read_image
from captioning.interface import BaseCaptioner, Caption, stack_maps
from utils import UserError, atomic_write, parallel_map, progress_bar

try:
    from transformers import AutoModelForImageTextToText
except ImportError:  # before transformers 4.46
    from transformers import AutoModelForVision2Seq as AutoModelForImageTextToText

HUB_MODEL = "Salesforce/blip-image-captioning-base"
MISSING_SHARE = 0.1  # of a model's tensors; where more are not in its file, it is another model's file


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
        image = Image.fromarray(array.transpose(1, 2, 0))
        return self.image_processor(images=image, return_tensors="pt")["pixel_values"][0]

    @torch.no_grad()
    def caption_prepared(
        self,
        pixels: Tensor,
        num_beams: int = 3,
        max_new_tokens: int = 30,
        prompt: str = "",
        keep_prompt: bool = False,
    ) -> list[str]:
        """The captions of prepared images (N, 3, height, width).

        Args:
            num_beams: hypotheses searched at a time; 1 is greedy.
            max_new_tokens: longest caption in tokens, the prompt not counted.
            prompt: words that each caption begins with; for BLIP alone.
            keep_prompt: leave the prompt in the captions.
        """
        inputs = {}
        if prompt:
            inputs = self.tokenizer([prompt] * len(pixels), return_tensors="pt", return_token_type_ids=False)
            inputs = inputs.to(self.model.device)
            (start,) = self.tokenizer.batch_decode(inputs["input_ids"][:1], skip_special_tokens=True)
        with shared_by_beams(self.model, num_beams) as cache:
            found = self.model.generate(
                pixel_values=pixels.to(self.model.device, self.model.dtype, non_blocking=True),
                num_beams=num_beams,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                **cache,
                **inputs,
            )
        captions = [text.strip() for text in self.tokenizer.batch_decode(found, skip_special_tokens=True)]
        if prompt and not keep_prompt:
            captions = [caption.removeprefix(start.strip()).strip() for caption in captions]
        return captions

    @torch.no_grad()
    def describe_prepared(
        self, pixels: Tensor, beam_size: int = 3, max_new_tokens: int = 30
    ) -> list[Caption]:
        """Prepared images -> their captions with log-probabilities, cross-attention and the n best.

        Attention is the cross-attention of the decoder (N, heads, tokens, 1 + patches) at the step that
        chose a word: the mean over heads and over the last half of the layers, without the class token,
        made to sum to 1. Of a word of several pieces it is the pieces' mean, and the log-probability their
        sum.

        Raises:
            UserError: the model is not BLIP.
        """
        require_blip(self, self.model.config._name_or_path or "this captioner", "where it looked")
        pixels = pixels.to(self.model.device, self.model.dtype)
        with shared_by_beams(self.model, beam_size) as cache:
            found = self.model.generate(
                pixel_values=pixels,
                num_beams=beam_size,
                num_return_sequences=beam_size,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                **cache,
            )
        start, end = self.model.config.text_config.bos_token_id, self.model.config.text_config.sep_token_id
        # each a start token, the caption's, and where it is complete the end token; padding behind it
        sequences = [[start, *self._after_start(ids, start, end)] for ids in found.tolist()]
        states = self.model.vision_model(pixel_values=pixels).last_hidden_state
        captions = []
        for i in range(len(pixels)):
            own = [self._details(ids, states[i : i + 1]) for ids in sequences[i * beam_size :][:beam_size]]
            texts = [caption.text for caption in own]
            n_best = [caption for k, caption in enumerate(own) if caption.text not in texts[:k]]
            captions.append(replace(n_best[0], n_best=n_best))
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
        special = set(self.tokenizer.all_special_ids)
        words, word_log_probs, word_maps = [], [], []
        for token, log_prob, weights in zip(ids[1:], log_probs, maps):
            piece = self.tokenizer.convert_ids_to_tokens(token)
            if token in special:
                continue
            if piece.startswith("##") and words:
                words[-1] += piece[2:]
                word_log_probs[-1] += log_prob
                word_maps[-1].append(weights)
            else:
                words.append(piece)
                word_log_probs.append(log_prob)
                word_maps.append([weights])
        attention = stack_maps([torch.stack(pieces).mean(dim=0) for pieces in word_maps], side, side)
        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return Caption(text, words, sum(log_probs), word_log_probs, attention)

    def save(self, folder: str | Path) -> None:
        """Write the files by which `load_captioner`, or transformers' own classes, read a BLIP again."""
        self.model.save_pretrained(folder, safe_serialization=True)
        BlipProcessor(self.image_processor, self.tokenizer).save_pretrained(folder)
        self.image_processor.save_pretrained(folder)


# --- beams that share an image -----------------------------------------------------------------------------

# transformers 4.54 and later keep BLIP's keys and values in an EncoderDecoderCache, which `generate` can be
# given; earlier ones keep bare tuples, and there every beam has a copy of its own.
CACHE_CAN_BE_SHARED = hasattr(modeling_blip_text, "EncoderDecoderCache")


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
    if num_beams == 1 or model.config.model_type != "blip" or not CACHE_CAN_BE_SHARED:
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
    model, loaded = AutoModelForImageTextToText.from_pretrained(name, output_loading_info=True, **options)
    classes = config.architectures or [type(model).__name__]
    if type(model).__name__ not in classes or len(loaded["missing_keys"]) > MISSING_SHARE * len(
        model.state_dict()
    ):
        raise UserError(
            f"{name}: weights of {classes[0]} that do not make a whole captioning model; give another"
        )
    image_processor = AutoImageProcessor.from_pretrained(name, **options)
    return BlipCaptioner(model.eval(), image_processor, AutoTokenizer.from_pretrained(name, **options))


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


# --- what it learns from ------------------------------------------------------------------------------------

KEPT_BYTES = 2**31  # of prepared images in memory; the rest is read anew every epoch


class BlipDataset:
    """Images as the model takes them; those that cannot be read are named and left out.

    Item i is float32 (3, S, S), or, after `cache_features`, the vision model's float16 (tokens, D).
    """

    def __init__(
        self, captioner: BlipCaptioner, images: list[Record], workers: int, accelerator: Accelerator
    ):
        self.captioner = captioner
        self.workers = workers
        self.kept: dict[str, Tensor] = {}
        self.room = KEPT_BYTES
        self.features: h5py.Dataset | None = None
        rank, processes = accelerator.process_index, accelerator.num_processes
        problems = parallel_map(self._problem, images[rank::processes], self.workers)
        share = len(images[rank::processes])
        found = [p for p in progress_bar(problems, total=share, desc="reading", unit="image") if p]
        unusable = dict(gather_object(found)) if processes > 1 else dict(found)
        for problem in unusable.values():
            accelerator.print(f"skipped: {problem}")
        self.images = [image for image in images if image.image_id not in unusable]

    def _problem(self, image: Record) -> tuple[str, str] | None:
        try:
            if image.path is None:
                raise UserError(f"{image.image_id}: no image file of this name in the folder")
            self._prepared(image.path)
        except UserError as error:
            return image.image_id, str(error)
        return None

    def _prepared(self, path: str) -> Tensor:
        if path in self.kept:
            return self.kept[path]
        pixels = self.captioner.prepare(path)
        if self.room >= pixels.nbytes:
            self.room -= pixels.nbytes
            self.kept[path] = pixels
        return pixels

    def __getitem__(self, index: int) -> Tensor:
        if self.features is not None:
            return torch.from_numpy(self.features[index])
        return self._prepared(self.images[index].path)

    def batches(self, batches: list[list[int]], vary: str | None = None) -> Iterator[Tensor]:
        """The stacked items of each batch of indices; threads read ahead.

        vary: a seed; each image is varied (`vary_image`) as it says, whatever batch it is in.
        """

        def item(index: int) -> Tensor:
            return self[index] if vary is None else vary_image(self[index], Random(f"{vary} {index}"))

        return parallel_map(lambda batch: torch.stack([item(i) for i in batch]), batches, self.workers)

    @torch.no_grad()
    def cache_features(self, file: Path, accelerator: Accelerator) -> None:
        """Put the vision model's output in place of the images, from `file` where its fingerprints fit.

        The HDF5 file has `features`, float16 (images, tokens, D), and fingerprints of the vision model's
        weights, of the preparation and of the image files.

        Raises:
            UserError: the disk has no room for it.
        """
        vision = self.captioner.model.vision_model
        stats = [(p.path, os.stat(p.path).st_size, os.stat(p.path).st_mtime_ns) for p in self.images]
        key = {
            "weights": weights_digest(vision),
            "preparation": self.captioner.image_processor.to_json_string(),
            "images": hashlib.sha256(json.dumps(stats).encode()).hexdigest(),
        }
        if accelerator.is_main_process and not _fits(file, key):
            vision.to(accelerator.device).eval()
            chunks = [list(range(i, min(i + 16, len(stats)))) for i in range(0, len(stats), 16)]
            progress = progress_bar(total=len(stats), desc="vision features", unit="image")
            with atomic_write(file) as tmp_path, h5py.File(tmp_path, "w") as cache, progress:
                cache.attrs.update(key)
                for chunk, pixels in zip(chunks, self.batches(chunks)):
                    with accelerator.autocast():
                        states = vision(pixel_values=pixels.to(accelerator.device)).last_hidden_state
                    if chunk[0] == 0:
                        shape = (len(stats), *states.shape[1:])
                        require_room(file.parent, 2 * math.prod(shape))
                        stored = cache.create_dataset("features", shape, "float16", chunks=(1, *shape[1:]))
                    stored[chunk[0] : chunk[-1] + 1] = states.half().cpu().numpy()
                    progress.update(len(chunk))
        accelerator.wait_for_everyone()
        self.kept.clear()
        self.features = h5py.File(file, "r")["features"]


def vary_image(pixels: Tensor, rng: Random) -> Tensor:
    """A prepared image (3, S, S) moved, enlarged or reduced, and made lighter or darker a little.

    Left stays left: captions speak of it.
    """
    zoom, contrast = rng.uniform(0.9, 1.1), rng.uniform(0.85, 1.15)
    across, down = rng.uniform(-0.12, 0.12), rng.uniform(-0.12, 0.12)  # of half the side
    places = torch.tensor([[[1 / zoom, 0, across], [0, 1 / zoom, down]]])
    grid = F.affine_grid(places, [1, *pixels.shape], align_corners=False)
    moved = F.grid_sample(pixels.unsqueeze(0), grid, padding_mode="reflection", align_corners=False)
    return contrast * moved.squeeze(0)


def _fits(file: Path, key: dict[str, str]) -> bool:
    if not file.is_file():
        return False
    with h5py.File(file, "r") as cache:
        return all(cache.attrs.get(name) == value for name, value in key.items())


def require_room(folder: Path, needed: int) -> None:
    """Raise UserError unless the disk of the folder has room for `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: {free / 1e9:.2f} GB free, the vision features take {needed / 1e9:.2f} GB: make room, "
            "or give --cache_features False"
        )


def encode_captions(captioner: BlipCaptioner, images: list[Record], max_length: int) -> list[list[list[int]]]:
    """For each image its captions as token ids, `[DEC] ... [SEP]`, at most `max_length` of them.

    In lower case and without punctuation, as BLIP's own training has them.
    """
    encoded = []
    for image in images:
        texts = [" ".join(words) for words in image.tokens if words]
        ids = captioner.tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        encoded.append([[captioner.model.config.text_config.bos_token_id, *tokens[1:]] for tokens in ids])
    return encoded


def pad_captions(captions: list[list[int]], pad: int) -> dict[str, Tensor]:
    """Token ids of each caption -> input_ids, attention_mask, labels (N, L), with padding out of the loss."""
    length = max(map(len, captions))
    ids = torch.tensor([caption + [pad] * (length - len(caption)) for caption in captions])
    mask = torch.arange(length) < torch.tensor([len(caption) for caption in captions]).unsqueeze(1)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


# --- the tiny one -------------------------------------------------------------------------------------------

TINY_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")
TINY_WORDS = 4000  # in the vocabulary at most; rarer words are spelt
TINY_IMAGE, TINY_PATCH = 64, 8  # pixels
TINY_WIDTH, TINY_HEADS = 96, 4
TINY_VISION_LAYERS, TINY_TEXT_LAYERS = 3, 2


def tiny_captioner(captions: Iterable[str], paths: Sequence[str] = ()) -> BlipCaptioner:
    """A small BLIP with random weights (of torch's generator) and a WordPiece vocabulary of the captions.

    Its vision half starts from what a transformer otherwise takes long to find, so that a thousand images
    and minutes are enough: positions, attention, and a patch embedding that whitens the patches of the
    images `paths`.
    """
    split = BertPreTokenizer().pre_tokenize_str
    words = Counter(word for caption in captions for word, _ in split(caption.lower()))
    letters = sorted({letter for word in words for letter in word})
    pieces = [*TINY_SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    frequent = sorted(words, key=lambda word: (-words[word], word))[:TINY_WORDS]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys([*pieces, *frequent]))}
    word_pieces = BertWordPieceTokenizer(vocab=vocabulary, strip_accents=False)
    tokenizer = BertTokenizerFast(tokenizer_object=word_pieces._tokenizer, bos_token="[DEC]")
    shared = {
        "hidden_size": TINY_WIDTH,
        "intermediate_size": 2 * TINY_WIDTH,
        "num_attention_heads": TINY_HEADS,
        "hidden_act": "relu",
        "initializer_range": TINY_WIDTH**-0.5,  # BLIP's own start is meant for large widths or loaded weights
    }
    pad, _, _, sep, _, start = tokenizer.convert_tokens_to_ids(TINY_SPECIAL)
    text = {"pad_token_id": pad, "bos_token_id": start, "sep_token_id": sep, "eos_token_id": sep}
    text |= {"vocab_size": len(tokenizer), "num_hidden_layers": TINY_TEXT_LAYERS}
    vision = {"image_size": TINY_IMAGE, "patch_size": TINY_PATCH, "num_hidden_layers": TINY_VISION_LAYERS}
    model = BlipForConditionalGeneration(BlipConfig(text_config=shared | text, vision_config=shared | vision))
    with torch.no_grad():
        positions = model.vision_model.embeddings.position_embedding  # (1, 1 + patches, D)
        positions[0, 1:] = 0.5 * sine_positions(TINY_IMAGE // TINY_PATCH, TINY_WIDTH)
        for layer in model.vision_model.encoder.layers:
            start_attention(layer.self_attn.qkv.weight, layer.self_attn.projection.weight, TINY_HEADS)
    size = {"height": TINY_IMAGE, "width": TINY_IMAGE}
    captioner = BlipCaptioner(model.eval(), BlipImageProcessor(size=size), tokenizer)
    images = []
    for path in paths:
        with suppress(UserError):  # named where the training reads all images
            images.append(captioner.prepare(path))
    if images:
        whiten_patches(model.vision_model.embeddings.patch_embedding, torch.stack(images))
    return captioner


@torch.no_grad()
def whiten_patches(embedding: nn.Conv2d, images: Tensor) -> None:
    """Let the patch embedding start as the principal components of the patches, each with deviation 1.

    In patches as they are, brightness drowns the edges by which shapes differ.

    Args:
        embedding: of D channels, written in place; D is no more than the numbers in a patch.
        images: prepared (N, 3, S, S).
    """
    patches = F.unfold(images, embedding.kernel_size, stride=embedding.stride).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(dim=0)
    sizes, directions = torch.linalg.eigh((patches - mean).T.cov(correction=0))  # rising
    largest = slice(-embedding.out_channels, None)
    weight = (directions[:, largest] / (sizes[largest] + 0.01).sqrt()).T
    embedding.weight.copy_(weight.view_as(embedding.weight))
    embedding.bias.copy_(-weight @ mean)


def sine_positions(side: int, width: int) -> Tensor:
    """Sines and cosines of the column and of the row of each cell (side * side, width), row by row."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    rates = 100 ** (-torch.arange(width // 4) / (width // 4))  # radians a cell
    angles = [place.flatten().unsqueeze(1) * rates for place in (columns, rows)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)


def start_attention(qkv: Tensor, projection: Tensor, heads: int) -> None:
    """Let each cell look first at cells like itself, and take from its value what it has in common with them.

    As attention is in trained vision transformers (Trockman and Kolter, 2023, "Mimetic initialization"): the
    product of query and key weights is near the identity, that of value and projection near its negative.

    Args:
        qkv: (3 D, D) and projection (D, D), written in place.
    """
    width = len(projection)
    deep = width // heads

    def near_identity(share: float) -> tuple[Tensor, Tensor]:
        noise = torch.randn(width, width) / width**0.5
        left, sizes, right = torch.linalg.svd(share * (noise + torch.eye(width)))
        return left * sizes.sqrt(), sizes.sqrt().unsqueeze(1) * right

    for head in range(heads):
        left, right = near_identity(0.7)
        own = slice(head * deep, (head + 1) * deep)
        qkv[:width][own], qkv[width : 2 * width][own] = left[:, :deep].T, right[:deep]
    projection[:], qkv[2 * width :] = near_identity(-0.4)

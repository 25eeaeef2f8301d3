"""What the benchmarks share: the clock, made-up images and captions, an encoder with random weights.

A benchmark imports this module before any of the repository's: it puts the repository on the path.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from captioning.data.prepared import END, PAD, START, UNK  # noqa: E402
from captioning.weights.pretrained import fold_batch_norms  # noqa: E402
from models import DecoderWithAttention, Encoder, normalize_images  # noqa: E402
from utils import write_json  # noqa: E402


def timed(work: Callable, *arguments, device: torch.device | None = None) -> tuple[Any, float]:
    """The result of `work(*arguments)` and its seconds; on CUDA until the device has done all of it."""
    synchronize(device)
    start = time.perf_counter()
    result = work(*arguments)
    synchronize(device)
    return result, time.perf_counter() - start


def synchronize(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


# --- made-up data -------------------------------------------------------------------------------------------


def make_images(count: int, height: int, width: int, seed: int) -> Tensor:
    """Soft patches of colour under grain, uint8 (count, 3, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.rand(count, 3, 6, 8, generator=generator)
    images = F.interpolate(patches, (height, width), mode="bicubic", align_corners=False)
    grain = torch.randn(count, 1, height, width, generator=generator)
    return ((images + 0.05 * grain) * 255).clamp(0, 255).byte()


def write_images(folder: Path, count: int, height: int, width: int, seed: int) -> list[Path]:
    """Write made-up images as JPEG files image_00000.jpg, ...; return their paths."""
    folder.mkdir(parents=True)
    paths = []
    for number in range(count):
        (image,) = make_images(1, height, width, seed + number)
        paths.append(folder / f"image_{number:05}.jpg")
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(paths[-1], quality=90)
    return paths


def make_word_map(vocabulary: int) -> dict[str, int]:
    words = [f"word{number}" for number in range(1, vocabulary - 3)]
    return {word: index for index, word in enumerate([PAD, *words, UNK, START, END])}


def make_captions(
    images: int, captions_per_image: int, vocabulary: int, max_len: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Random captions in the indices of `make_word_map`: as long as COCO's, some words far more frequent.

    Returns:
        captions int64 (images, captions_per_image, max_len + 2), `<start> ... <end>` then `<pad>`; lengths
        int64 (images, captions_per_image), of 8 to 20 words, about 10.5, `<start>` and `<end>` counted.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (images, captions_per_image)
    words = (7 + torch.empty(shape).geometric_(1 / 3.5, generator=generator).long()).clamp(max=20)
    # the logarithm of a word's rank is uniform: Zipf's law
    captions = (vocabulary - 4) ** torch.rand(*shape, max_len + 2, generator=generator)
    captions = captions.long().clamp(1, vocabulary - 4)
    captions[:, :, 0] = vocabulary - 2
    captions.scatter_(2, (words + 1).unsqueeze(2), vocabulary - 1)
    captions *= torch.arange(max_len + 2) <= (words + 1).unsqueeze(2)
    return captions, words + 2


def write_record(
    folder: Path, splits: dict[str, int], captions_per_image: int, image_size: int, vocabulary: int
) -> None:
    """Write the prepared.json of splits with so many images."""
    counts = {name: {"images": size, "captions": size * captions_per_image} for name, size in splits.items()}
    settings = {"image_size": image_size, "captions_per_image": captions_per_image}
    record = {"settings": settings, "inputs": {}, "splits": counts, "words": vocabulary - 4, "skipped": []}
    write_json(folder / "prepared.json", record)


def words_of(captions: Tensor, lengths: Tensor, vocabulary: int) -> list[list[list[str]]]:
    """The captions of `make_captions` as lists of words, without `<start>` and `<end>`."""
    words = list(make_word_map(vocabulary))
    return [
        [[words[index] for index in caption[1 : length - 1]] for caption, length in zip(*image)]
        for image in zip(captions.tolist(), lengths.tolist())
    ]


# --- models -------------------------------------------------------------------------------------------------


def random_encoder(encoder_name: str, seed: int, device: torch.device) -> Encoder:
    """A ResNet with random weights that is as well-behaved as a trained one.

    Its batch-norm statistics are those of made-up images: with none, values grow from block to block until
    float16 cannot hold them. Residual branches are scaled down: at full scale the rounding of float32 alone
    turns the gradients of a hundred random layers by several per cent.
    """
    torch.manual_seed(seed)
    encoder = Encoder(encoder_name)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # take the statistics of one batch as they are
        elif isinstance(module, (BasicBlock, Bottleneck)):
            last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
            nn.init.constant_(last.weight, 0.2)
    encoder.network.train()
    with torch.no_grad():
        encoder.grid(normalize_images(make_images(8, 128, 128, seed)))
    return fold_batch_norms(encoder.eval()).to(device)


def end_samples(decoder: DecoderWithAttention, words: float) -> DecoderWithAttention:
    """Make a decoder with random weights end its samples after so many words on average, `<end>` included."""
    decoder.fc.bias.data[-1] = math.log((decoder.fc.out_features - 1) / (words - 1))
    return decoder

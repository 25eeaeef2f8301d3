"""Damage: to bytes, to values of JSON, to images, to checkpoints; and what stands in place of files."""

from __future__ import annotations

import io
import json
import os
import random
from pathlib import Path

import numpy as np
import torch
from icc_profiles import ADOBE_RGB, cmyk_profile, grey_profile, rgb_profile
from PIL import Image


def mutate(content: bytes, rng: random.Random) -> bytes:
    """A few bits flipped, a part left out, doubled or overwritten, or the end cut off."""
    damaged, kind = bytearray(content or b"\0"), rng.randrange(5)
    start = rng.randrange(len(damaged))
    end = min(len(damaged), start + rng.randrange(1, 1 + max(1, len(damaged) // 4)))
    if kind == 0:
        for _ in range(rng.randrange(1, 20)):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del damaged[start:end]
    elif kind == 2:
        damaged[start:start] = damaged[start:end]
    elif kind == 3:
        damaged[start:end] = rng.randbytes(end - start)
    else:
        del damaged[start:]
    return bytes(damaged)


ODD_LETTERS = (
    '"', ",", ";", "\t", "|", "\r", "\n", "\r\n", "\0", "\ufeff", "'", "=", "\u0301", "\u200d", "\u72ac",
    "\xfc", "\x85", "\u2028", "#0", "{", "]", "\\", "/", "..", " ", "\xe9" * 300, "a" * 5000,
)  # fmt: skip


def mutate_text(text: str, rng: random.Random) -> str:
    """A few odd letters put in, or letters left out: still text."""
    for _ in range(rng.randrange(1, 5)):
        place = rng.randrange(len(text) + 1)
        end = place + rng.choice([0, 0, 1, 5, 200])
        text = text[:place] + rng.choice(["", *ODD_LETTERS]) + text[end:]
    return text


ODD_VALUES = (
    None, True, -1, 0, 1, 10**9, 10**30, 1.5, float("nan"), float("inf"), "", "text", "\x1b[2J", "\ud800",
    "../x", "/etc/passwd", "a\nb", [], {}, [[]], [None], {"a": {}}, "9" * 5000, [1] * 100, "\u202eabc", "\0",
)  # fmt: skip


def replace_a_value(value: object, rng: random.Random) -> object:
    """The same JSON-like value with something odd at a random place in it."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {other: part for other, part in value.items() if other != key}
        return value | {key: replace_a_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        place = rng.randrange(len(value))
        return [*value[:place], replace_a_value(value[place], rng), *value[place + 1 :]]
    return rng.choice(ODD_VALUES)


def damage_json(file: Path, rng: random.Random) -> None:
    """Bytes or values of a JSON file."""
    if rng.random() < 0.4:
        file.write_bytes(mutate(file.read_bytes(), rng))
    else:
        file.write_text(json.dumps(replace_a_value(json.loads(file.read_text()), rng)))


def put_something_else(file: Path, rng: random.Random) -> None:
    """In place of a file: nothing, a folder, a pipe, a link."""
    file.unlink()
    kind = rng.randrange(6)
    if kind == 0:
        file.mkdir()
    elif kind == 1:
        os.mkfifo(file)
    elif kind == 2:
        file.symlink_to("/dev/zero")
    elif kind == 3:
        file.symlink_to(file.name)
    elif kind == 4:
        file.write_bytes(b"")


FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "ICO", "MPO", "AVIF")
MODES = ("RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "F", "LAB", "YCbCr")
SHAPES = ((40, 30), (1, 1), (1, 300), (3, 3), (5000, 2), (2, 5000))


def odd_image(file: Path, rng: random.Random) -> None:
    """An image of any format, mode, shape and profile, sound or damaged."""
    mode, width_height = rng.choice(MODES), rng.choice(SHAPES)
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    image, stream = Image.fromarray(pixels).resize(width_height), io.BytesIO()
    options = {}
    if rng.random() < 0.3:
        exif = Image.Exif()
        exif[0x0112] = rng.randrange(12)
        options["exif"] = exif
    if rng.random() < 0.3:
        profile = rng.choice([rgb_profile(ADOBE_RGB, 2.2), grey_profile(1.8), cmyk_profile()])
        options["icc_profile"] = mutate(profile, rng) if rng.random() < 0.5 else profile
    try:
        image.convert("L" if mode in ("I;16", "F") else mode).convert(mode).save(
            stream, rng.choice(FORMATS), **options
        )
    except (OSError, ValueError, KeyError, SystemError, TypeError):  # not every format has every mode
        image.save(stream, "PNG")
    content = stream.getvalue()
    file.write_bytes(mutate(content, rng) if rng.random() < 0.7 else content)


def damage_checkpoint(file: Path, rng: random.Random) -> None:
    """A value of a checkpoint, or one of its tensors."""
    content = torch.load(file, weights_only=True)
    tensors = {name: part for name, part in content.items() if isinstance(part, dict) and name in STATES}
    if tensors and rng.random() < 0.4:
        part = rng.choice(list(tensors))
        names = [name for name, value in content[part].items() if isinstance(value, torch.Tensor)]
        if names:
            name = rng.choice(names)
            content[part][name] = rng.choice([
                content[part][name][..., :-1] if content[part][name].dim() else torch.zeros(3),
                torch.full_like(content[part][name], float("nan")) if content[part][name].is_floating_point()
                else content[part][name] + 1,
                torch.zeros(1).expand(10**10), torch.zeros(0), content[part][name].double(), "text", None,
                content[part][name].to_sparse() if content[part][name].dim() else torch.tensor(True),
            ])  # fmt: skip
    else:
        plain = {name: part for name, part in content.items() if name not in STATES}
        content = content | _replaced(plain, rng)
    torch.save(content, file)


STATES = ("encoder", "decoder", "optimizer", "scaler", "unaveraged")


def _replaced(values: dict, rng: random.Random) -> dict:
    changed = replace_a_value(values, rng)
    return changed if isinstance(changed, dict) else {"settings": changed}

"""Hypotheses and references for the benchmarks of the scores; small, as it loads where memory is measured."""

from __future__ import annotations

import csv
import random
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CAPTIONS = ROOT.parent / "shared" / "flickr8k_small" / "captions.txt"  # else captions are made up


def make_images(
    count: int, n_references: int, seed: int, plain: bool = False
) -> tuple[list[tuple[list[str], str]], str]:
    """(references, hypothesis) of each image, and in words where they come from.

    A hypothesis is a caption of the image; its other captions are references, filled up with any captions.
    No text comes twice, as the second time would be cheap for us: words are exchanged until it is new.

    Args:
        plain: captions in small letters and without their full stop.
    """
    generator = random.Random(seed)
    if CAPTIONS.exists():
        origin = "real captions"
        captions: dict[str, list[str]] = {}
        with CAPTIONS.open(newline="") as file:
            for row in csv.DictReader(file):
                captions.setdefault(row["image"], []).append(row["caption"])
        groups = [group for group in captions.values() if len(group) == 5]
    else:
        origin = "made-up captions"
        groups = [[make_caption(generator) for _ in range(5)] for _ in range(count)]
    if plain:
        groups = [[text.lower().removesuffix(".").strip() for text in group] for group in groups]
    vocabulary = [word for group in groups for text in group for word in text.split()]
    used = set()

    def unused(text: str) -> str:
        words = text.split()
        while (new := " ".join(words)) in used:
            words[generator.randrange(len(words))] = generator.choice(vocabulary)
        used.add(new)
        return new

    images = []
    for _ in range(count):
        hypothesis, *references = generator.sample(generator.choice(groups), 5)
        while len(references) < n_references:
            references.append(generator.choice(generator.choice(groups)))
        images.append(([unused(text) for text in references[:n_references]], unused(hypothesis)))
    return images, origin


def make_caption(generator: random.Random) -> str:
    parts = [
        ["A", "The", "Two", "A young", "A small", "One"],
        ["man", "woman", "child", "dog", "boys", "people", "cyclist"],
        ["runs", "is running", "plays", "are jumping", "sits", "doesn't stand", "climbing"],
        ["in", "on", "next to", "in front of", "near", "over", "through"],
        ["a", "the", "some", "a large", "the green", "somebody's"],
        ["field.", "grass", "beach .", "house", "t-shirt", "street, far away.", "snow"],
    ]
    return " ".join(map(generator.choice, parts))

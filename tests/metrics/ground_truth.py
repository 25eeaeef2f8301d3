"""The official program's recorded scores, and real captions; tests that need them are skipped elsewhere."""

import csv
import json
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[3] / "shared"
GOLDEN = SHARED / "golden" / "captions_a.json"
FLICKR8K = SHARED / "flickr8k_small" / "captions.txt"
COCO = SHARED / "coco_small" / "captions_train2017.json"


def golden() -> dict:
    if not GOLDEN.exists():
        pytest.skip("needs the recorded official scores")
    return json.loads(GOLDEN.read_text())


def has_real_captions() -> bool:
    return FLICKR8K.exists() and COCO.exists()


def real_captions() -> list[list[str]]:
    """The captions of each image."""
    if not has_real_captions():
        pytest.skip("needs real captions")
    images: dict = {}
    with FLICKR8K.open(newline="") as file:
        for row in csv.DictReader(file):
            images.setdefault(row["image"], []).append(row["caption"])
    for annotation in json.loads(COCO.read_text())["annotations"]:
        images.setdefault(annotation["image_id"], []).append(annotation["caption"])
    return list(images.values())

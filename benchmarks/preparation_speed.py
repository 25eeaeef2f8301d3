"""Time of create_input_files.py beside plain preparation, one image after the other, of the same files.

    python benchmarks/preparation_speed.py

Both turn the same folder of JPEG files and the same captions into image tensors and encoded captions on
disk. They must agree in images, word map and captions, or the script stops with an error. Pixels may differ
a little where a file is more than four times as large as the tensor: ours lets the JPEG decoder shrink it
first. The mean difference is reported, and is an error above `pixel_bound`. Then it is measured how long a
rerun takes to find that many images, links to one file, are as they were. On two CPU cores all takes about a
minute.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from common import make_captions, timed, write_images
from PIL import Image

import create_input_files
from captioning.command_line import check_at_least, run_script
from captioning.data.fingerprints import IMAGE_FILES, images_are_as_prepared, record_image_files
from captioning.data.prepared import Prepared, Record
from utils import write_json

MAX_LEN = 50  # words


@dataclass
class Settings:
    images: int = 300  # JPEG files made for the purpose
    width: int = 640  # of a file, pixels
    height: int = 480  # of a file, pixels
    image_size: int = 256  # of a tensor, pixels
    captions_per_image: int = 5  # captions of each image
    workers: int = os.cpu_count() or 1  # threads of create_input_files.py
    unchanged_images: int = 100_000  # of the rerun
    pixel_bound: float = 1.0  # largest mean difference of a pixel, of 255
    seed: int = 0  # of images and captions

    def __post_init__(self):
        check_at_least(self, 1, "images", "captions_per_image", "workers")
        check_at_least(self, 16, "width", "height")


def main(settings: Settings) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder, settings)
        ours = create_input_files.Settings(
            annotations=str(folder / "train.csv"),
            image_folder=str(folder / "train"),
            output_folder=str(folder / "ours"),
            val_fraction=0,
            captions_per_image=settings.captions_per_image,
            min_word_freq=5,
            max_len=MAX_LEN,
            image_size=settings.image_size,
            workers=settings.workers,
        )
        for path in (folder / "train").iterdir():
            path.read_bytes()  # into the file cache, for both
        _, plain_seconds = timed(prepare_plainly, folder, settings)
        _, our_seconds = timed(create_input_files.create_input_files, ours)
        compare(folder, settings)
    print(f"plain: {settings.images / plain_seconds:.1f} images/s ({plain_seconds:.2f} s)")
    print(
        f"ours:  {settings.images / our_seconds:.1f} images/s ({our_seconds:.2f} s, {settings.workers} "
        f"workers), {plain_seconds / our_seconds:.2f} times the plain rate"
    )
    time_rerun(settings.unchanged_images)


def time_rerun(count: int) -> None:
    """Print the CPU time of what a rerun does to find that the images have not changed."""
    with tempfile.TemporaryDirectory() as name:
        images, data = Path(name, "images"), Prepared.__new__(Prepared)  # of which the folder alone is used
        images.mkdir()
        data.folder = Path(name)
        paths = [str(images / f"img_{number:06d}.jpg") for number in range(count)]
        for number, path in enumerate(paths):
            if number % 10_000 == 0:
                Path(name, f"image_{number}.jpg").touch()  # a file has no more than some ten thousand links
            os.link(Path(name, f"image_{number // 10_000 * 10_000}.jpg"), path)
        write_json(
            data.folder / IMAGE_FILES, record_image_files([Record(path, path) for path in paths], [images])
        )
        began = time.process_time()
        if not images_are_as_prepared(data, [images]):
            sys.exit("unchanged images are not found to be so")
        seconds = time.process_time() - began
    print(f"rerun: {count} unchanged images are found to be so in {seconds:.2f} s CPU")


def make_files(folder: Path, settings: Settings) -> None:
    """Images in train/ and their captions in train.csv, as a Kaggle download has them."""
    paths = write_images(folder / "train", settings.images, settings.height, settings.width, settings.seed)
    captions, lengths = make_captions(
        settings.images, settings.captions_per_image, 9490, MAX_LEN, settings.seed
    )
    with (folder / "train.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("image_id", "caption"))
        for path, of_image, their_lengths in zip(paths, captions.tolist(), lengths.tolist()):
            for caption, length in zip(of_image, their_lengths):
                words = " ".join(f"word{index}" for index in caption[1 : length - 1])
                writer.writerow((path.stem, words))


def prepare_plainly(folder: Path, settings: Settings) -> None:
    """What create_input_files.py does with good files, in one thread."""
    output = folder / "plain"
    output.mkdir()
    captions: dict[str, list[list[str]]] = {}
    with (folder / "train.csv").open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            captions.setdefault(row["image_id"], []).append(row["caption"].split())

    size = settings.image_size
    with h5py.File(output / "train_images.hdf5", "w") as file:
        images = file.create_dataset("images", (len(captions), 3, size, size), "uint8")
        for index, image_id in enumerate(captions):
            with Image.open(folder / "train" / f"{image_id}.jpg") as image:
                image = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
            images[index] = np.asarray(image).transpose(2, 0, 1)

    counts = Counter(word for group in captions.values() for caption in group for word in caption)
    words = ["<pad>", *(word for word, count in counts.items() if count >= 5), "<unk>", "<start>", "<end>"]
    word_map = {word: index for index, word in enumerate(words)}
    encoded, lengths = [], []
    for group in captions.values():
        for caption in group:
            indices = [word_map.get(word, word_map["<unk>"]) for word in caption]
            padding = [word_map["<pad>"]] * (MAX_LEN - len(caption))
            encoded.append([word_map["<start>"], *indices, word_map["<end>"], *padding])
            lengths.append(len(caption) + 2)
    for name, value in (
        ("word_map", word_map),
        ("train_encoded_captions", encoded),
        ("train_caption_lengths", lengths),
        ("train_image_paths", [str(folder / "train" / f"{image_id}.jpg") for image_id in captions]),
    ):
        (output / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")


def compare(folder: Path, settings: Settings) -> None:
    def both(name: str) -> list:
        return [json.loads((folder / way / f"{name}.json").read_text("utf-8")) for way in ("plain", "ours")]

    plain_map, our_map = both("word_map")
    plain_paths, our_paths = both("train_image_paths")
    group = settings.captions_per_image
    # of an image's captions ours takes as many as are asked for, in an order of its own
    plain_captions, our_captions = (
        [sorted(captions[first : first + group]) for first in range(0, len(captions), group)]
        for captions in both("train_encoded_captions")
    )
    if plain_map != our_map or plain_paths != our_paths or plain_captions != our_captions:
        sys.exit("the prepared captions differ")
    with (
        h5py.File(folder / "plain" / "train_images.hdf5") as plain,
        h5py.File(folder / "ours" / "train_images.hdf5") as ours,
    ):
        differences = [
            np.abs(a.astype(int) - b.astype(int)).mean()
            for a, b in zip(plain["images"], ours["images"], strict=True)
        ]
    mean = float(np.mean(differences))
    print(
        f"{settings.images} images of {settings.width} x {settings.height}, the same captions; pixels "
        f"differ by {mean:.3f} of 255 on average, in the worst image by {max(differences):.3f}"
    )
    if not mean <= settings.pixel_bound:
        sys.exit(f"the pixels differ by more than {settings.pixel_bound}")


if __name__ == "__main__":
    run_script(main, Settings)

"""Prepare captioned images for training: annotations + images -> data_output/.

    python create_input_files.py      # train.csv, train/train/, test.csv, test/test/, as Kaggle has them
    python create_input_files.py --annotations captions.txt --image_folder Images
    python create_input_files.py --annotations dataset_coco.json --image_folder coco

The annotation file may be a Kaggle CSV, a Flickr8k captions.txt, Karpathy's JSON or COCO's; its content
tells.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from captioning.annotations import END, PAD, START, UNK, Record, held_out, read_annotations
from captioning.images import read_image
from utils import UserError, check_at_least, parallel_map, progress_bar, run_script, write_json


@dataclass
class Settings:
    annotations: str = "train.csv"  # captions to train on, any layout
    image_folder: str = "train/train"  # their images
    test_annotations: str | None = None  # None: test_captions.csv or test.csv beside a Kaggle train.csv
    test_image_folder: str | None = None  # None: test/test beside the test annotations
    output_folder: str = "data_output"  # where the prepared files go
    val_fraction: float = 0.1  # share of images to validate on, where the file names no splits
    captions_per_image: int = 5  # captions kept of each image; fewer are filled up with repeats
    min_word_freq: int = 5  # words seen less often in training captions become <unk>
    max_len: int = 50  # words; longer captions are left out
    image_size: int = 256  # pixels, width and height
    workers: int = os.cpu_count() or 1  # threads that read images
    strict: bool = False  # a missing or unreadable image ends the run
    seed: int = 123  # of the validation split and the choice among captions

    def __post_init__(self):
        check_at_least(self, 1, "captions_per_image", "min_word_freq", "max_len", "workers")
        check_at_least(self, 32, "image_size")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"--val_fraction is {self.val_fraction}: give 0 or more and less than 1")


def main(settings: Settings) -> None:
    create_input_files(settings)


def create_input_files(settings: Settings) -> dict:
    """Write the prepared files (see README, "Data on disk"); return the record in `prepared.json`.

    Everything is written aside and moved into place at the end, the record last: an interrupted run leaves
    nothing that a later step takes for complete.
    """
    splits = read_splits(settings)
    output = Path(settings.output_folder)
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; give another --output_folder")
    tmp_path = output / f".preparing.{os.getpid()}.partial"
    new = not output.exists()
    try:
        tmp_path.mkdir(parents=True)
        record = write_splits(splits, settings, tmp_path)
        (output / "prepared.json").unlink(missing_ok=True)
        for stale in output.glob("*_*.*"):
            if stale.name.startswith(("train_", "val_", "test_")):
                stale.unlink()  # of an earlier preparation: images, captions and features belong together
        for file in sorted(tmp_path.iterdir()):
            os.replace(file, output / file.name)
        write_json(output / "prepared.json", record)
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)
        if new and output.is_dir() and not any(output.iterdir()):
            output.rmdir()
    print_summary(record, output)
    return record


def read_splits(settings: Settings) -> dict[str, list[Record]]:
    """The images of train, val and, where there are any, test."""
    images = read_annotations(settings.annotations, settings.image_folder)
    if any(image.split for image in images):
        splits = {name: [p for p in images if p.split == name] for name in ("train", "val", "test")}
    else:
        validating = held_out(images, settings.val_fraction, settings.seed)
        splits = {
            "train": [p for p in images if p.image_id not in validating],
            "val": [p for p in images if p.image_id in validating],
            "test": [],
        }
    test_annotations, test_image_folder = find_test(settings)
    if test_annotations:
        splits["test"] = read_annotations(test_annotations, test_image_folder)
    if not any(image.captions for image in splits["train"]):
        raise UserError(
            f"{settings.annotations}: no training captions in it; expected a caption column with text"
        )
    return {name: images for name, images in splits.items() if images}


def find_test(settings: Settings) -> tuple[str | None, str | None]:
    """The test annotations and their images: as set, or what lies beside a Kaggle train.csv."""
    annotations = settings.test_annotations
    beside = Path(settings.annotations).parent
    if annotations is None and Path(settings.annotations).name == "train.csv":
        found = [beside / name for name in ("test_captions.csv", "test.csv") if (beside / name).is_file()]
        if found and (settings.test_image_folder or (beside / "test" / "test").is_dir()):
            annotations = str(found[0])
    if annotations is None:
        if settings.test_image_folder is not None:
            raise UserError(
                "--test_image_folder needs --test_annotations: a CSV with the column image_id at least"
            )
        return None, None
    return annotations, settings.test_image_folder or str(Path(annotations).parent / "test" / "test")


def write_splits(splits: dict[str, list[Record]], settings: Settings, folder: Path) -> dict:
    """Write the files of all splits to `folder`; return the record of what was done."""
    skipped: list[tuple[str, str]] = []
    kept: dict[str, list[Record]] = {}
    for name, images in splits.items():
        usable = [] if name != "test" else images  # test images need no captions
        for image in images if name != "test" else []:
            if any(0 < len(tokens) <= settings.max_len for tokens in image.tokens):
                usable.append(image)
            else:
                skipped.append((image.image_id, f"no caption of 1 to {settings.max_len} words"))
        kept[name] = write_images(usable, name, settings, folder, skipped)
        if not kept[name]:
            (folder / f"{name}_images.hdf5").unlink()
    if not kept["train"]:
        raise UserError(
            f"{settings.image_folder}: none of the training images can be used; first: {skipped[0][1]}"
        )

    words = Counter(word for image in kept["train"] for tokens in image.tokens for word in tokens)
    frequent = [word for word, count in words.items() if count >= settings.min_word_freq]
    if not frequent:
        raise UserError(
            f"no word occurs {settings.min_word_freq} times: lower --min_word_freq or add captions"
        )
    word_map = {word: index for index, word in enumerate([PAD, *frequent, UNK, START, END])}
    write_json(folder / "word_map.json", word_map)

    rng = random.Random(settings.seed)
    record = {
        "settings": asdict(settings),
        "inputs": input_files(settings),
        "splits": {},
        "words": len(frequent),
    }
    for name, images in kept.items():
        if not images:
            continue
        paths = [image.path for image in images]
        write_json(folder / f"{name}_image_ids.json", [image.image_id for image in images])
        write_json(folder / f"{name}_image_paths.json", paths)
        write_json(folder / f"{name}_references.json", [image.captions for image in images])
        counts = {"images": len(images), "captions": sum(len(p.captions) for p in images)}
        if all(any(0 < len(t) <= settings.max_len for t in image.tokens) for image in images):
            counts["unknown_share"] = write_captions(images, name, word_map, settings, folder, rng)
        record["splits"][name] = counts
    record["skipped"] = skipped
    return record


def write_images(
    records: list[Record], split: str, settings: Settings, folder: Path, skipped: list[tuple[str, str]]
) -> list[Record]:
    """Write the readable ones of `records` to SPLIT_images.hdf5, add the others to `skipped`; return the
    readable."""
    size = settings.image_size
    kept, digest = [], hashlib.sha256()
    with h5py.File(folder / f"{split}_images.hdf5", "w") as file:
        shape = (size, size)
        stored = file.create_dataset(
            "images", (len(records), 3, *shape), "uint8", maxshape=(None, 3, *shape), chunks=(1, 3, *shape)
        )
        results = read_images(records, size, settings.workers)
        for record, pixels in progress_bar(results, total=len(records), desc=f"{split} images", unit="image"):
            if isinstance(pixels, UserError):
                if settings.strict:
                    raise pixels
                tqdm.write(f"skipped: {pixels}", file=sys.stderr)
                skipped.append((record.image_id, str(pixels)))
                continue
            stored[len(kept)] = pixels
            digest.update(pixels)
            kept.append(record)
        stored.resize(len(kept), axis=0)
        file.attrs["captions_per_image"] = settings.captions_per_image
        file.attrs["digest"] = digest.hexdigest()  # by which cached features know their images
    return kept


def read_images(
    images: list[Record], size: int, workers: int
) -> Iterator[tuple[Record, np.ndarray | UserError]]:
    """Each image with its pixels (3, size, size), or with what was wrong with its file; in order."""

    def read(image: Record) -> tuple[Record, np.ndarray | UserError]:
        if image.path is None:
            return image, UserError(f"{image.image_id}: no image file of this name in the folder")
        try:
            return image, read_image(image.path, size)
        except UserError as error:
            return image, error

    return parallel_map(read, images, workers)


def write_captions(
    images: list[Record],
    split: str,
    word_map: dict[str, int],
    settings: Settings,
    folder: Path,
    rng: random.Random,
) -> float:
    """Write `captions_per_image` encoded captions of each image and their lengths; return the share of
    `<unk>`."""
    encoded, lengths, unknown = [], [], 0
    for image in images:
        choices = [tokens for tokens in image.tokens if 0 < len(tokens) <= settings.max_len]
        missing = settings.captions_per_image - len(choices)
        chosen = choices + rng.choices(choices, k=missing) if missing > 0 else None
        for tokens in chosen or rng.sample(choices, settings.captions_per_image):
            indices = [word_map.get(word, word_map[UNK]) for word in tokens]
            unknown += indices.count(word_map[UNK])
            padding = [word_map[PAD]] * (settings.max_len - len(tokens))
            encoded.append([word_map[START], *indices, word_map[END], *padding])
            lengths.append(len(tokens) + 2)
    write_json(folder / f"{split}_encoded_captions.json", encoded)
    write_json(folder / f"{split}_caption_lengths.json", lengths)
    return unknown / (sum(lengths) - 2 * len(lengths))


def input_files(settings: Settings) -> dict[str, list[int]]:
    """Size and time of each annotation file, by which a later run sees whether they are still the same."""
    files = [settings.annotations, find_test(settings)[0]]
    stats = {str(Path(file).resolve()): os.stat(file) for file in files if file}
    return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}


def print_summary(record: dict, output: Path) -> None:
    for name, counts in record["splits"].items():
        unknown = f", {counts['unknown_share']:.1%} of words unknown" if "unknown_share" in counts else ""
        print(f"{name:5} {counts['images']} images, {counts['captions']} captions{unknown}")
    print(f"words {record['words']} in the word map")
    if record["skipped"]:
        print(f"skipped {len(record['skipped'])} images (listed in {output / 'prepared.json'})")
    print(f"written to {output}/")


if __name__ == "__main__":
    run_script(main, Settings)

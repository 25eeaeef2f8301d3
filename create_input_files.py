"""Prepare captioned images for training: annotations + images -> data_output/.

    python create_input_files.py      # train.csv, train/train/, test.csv, test/test/, as Kaggle has them
    python create_input_files.py --annotations captions.txt --image_folder Images
    python create_input_files.py --annotations Flickr8k.token.txt --image_folder Flicker8k_Dataset
    python create_input_files.py --annotations dataset_coco.json --image_folder coco
    python create_input_files.py --annotations photos --image_folder photos       # photo.txt beside photo.jpg
    python create_input_files.py --annotations a.json b.csv --image_folder images_a images_b

Which layout the annotations have (tables with any separator, Flickr8k, Flickr30k, Karpathy, COCO, Hugging
Face, Parquet, sidecars) is recognized by their content. docs/file_formats.md describes them, and the files
written here. Captions are split into words by metrics/tokenizer.py, unless the file brings tokens of its own,
as Karpathy's does.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import h5py
import numpy as np

from captioning.command_line import allow_single, check_at_least, check_share, run_script
from captioning.data.annotations import (
    read_annotations,
    read_training_splits,
    sources,
    test_records,
)
from captioning.data.fingerprints import (
    IMAGE_FILES,
    digest_files,
    images_are_as_prepared,
    is_whole,
    record_image_files,
)
from captioning.data.image_names import require_apart, require_image
from captioning.data.images import parallel_map, read_image
from captioning.data.prepared import (
    CHECKSUMS,
    END,
    PAD,
    START,
    UNK,
    Prepared,
    Record,
    find_checksums,
    require_disk_space,
)
from captioning.data.tables import Columns
from captioning.files import OutputFile, lock_folder
from utils import Messages, UserError, check_output, progress_bar, replace_file, say, write_json

LARGEST_UNKNOWN_SHARE = 0.1  # of a split's words above which the setting is named that keeps more
REMEDY = "free some disk space, or lower --image_size"


@dataclass
class Settings:
    # what to read
    annotations: tuple[str, ...] = ("train.csv",)  # captions to train on, any layout of docs/file_formats.md
    image_folder: tuple[str, ...] = ("train/train",)  # their images
    test_annotations: tuple[str, ...] = ()  # if empty: test_captions.csv or test.csv beside train.csv
    test_image_folder: tuple[str, ...] = ()  # none: test/test beside the test annotations
    id_column: str | None = None  # column of the images in tables of any names; None: recognized
    caption_column: str | None = None  # column of the captions; None: recognized
    # what to write
    output_folder: str = "data_output"  # where the prepared files go
    val_fraction: float = 0.1  # share of the images to validate on, where the file names no splits
    captions_per_image: int = 5  # captions sampled from each image; where it has fewer, some are repeated
    min_word_freq: int = 5  # words that occur less often in the training captions become <unk>
    max_len: int = 50  # words; longer captions are left out
    lowercase: bool = True  # False: the vocabulary and the captions keep capitals, as of German nouns
    image_size: int = 256  # pixels, width and height
    # the run
    workers: int = min(os.cpu_count() or 1, 64)  # threads that read images
    strict: bool = False  # stop at the first missing or unreadable image
    seed: int = 123  # for the validation split and the sampling of captions

    def __post_init__(self):
        allow_single(self, "annotations", "image_folder", "test_annotations", "test_image_folder")
        check_at_least(self, 1, "captions_per_image", "min_word_freq", "max_len", "workers")
        check_at_least(self, 32, "image_size")
        check_at_least(self, 0, "seed")
        check_share(self, "val_fraction")


def main(settings: Settings) -> None:
    create_input_files(settings)


def create_input_files(settings: Settings) -> dict:
    """Write the prepared files (see docs/file_formats.md); return the record in `prepared.json`.

    All files are first written to a temporary folder and moved into place at the end, the record last, so
    that an interrupted run leaves nothing that a later step takes for complete.
    """
    output = Path(settings.output_folder)
    check_output(output, folder=True)
    splits = read_splits(settings)
    with lock_folder(output):
        record = write_folder(splits, settings, output)
    print_summary(record, output)
    return record


def write_folder(splits: dict[str, list[Record]], settings: Settings, output: Path) -> dict:
    tmp_path = output / f".preparing.{os.getpid()}.partial"
    try:
        tmp_path.mkdir()
        records = [record for split in splits.values() for record in split]
        images = record_image_files(records, image_folders(settings))  # before they are read
        record = write_splits(splits, settings, tmp_path)
        record["files"] = digest_files(tmp_path)  # by which later steps know that these belong together
        write_json(tmp_path / IMAGE_FILES, images)
        (output / "prepared.json").unlink(missing_ok=True)
        for stale in output.glob("*_*.*"):
            if stale.name.removeprefix(".").startswith(("train_", "val_", "test_")):
                stale.unlink()  # of an earlier preparation: images, captions and features belong together
        for file in sorted(tmp_path.iterdir()):
            replace_file(file, output / file.name)
        write_json(output / "prepared.json", record)
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)
    return record


def read_splits(settings: Settings) -> dict[str, list[Record]]:
    """The records of "train", "val" and "test", without splits that have none."""
    columns = Columns(settings.id_column, settings.caption_column)
    how = {"columns": columns, "lowercase": settings.lowercase}
    data = settings.annotations, settings.image_folder
    splits = read_training_splits(*data, settings.val_fraction, settings.seed, **how)
    test_annotations, test_image_folders = find_test(settings)
    if test_annotations:
        splits["test"] = test_records(read_annotations(test_annotations, test_image_folders, **how))
    columns.check()
    require_apart(splits)
    return {name: records for name, records in splits.items() if records}


def find_test(settings: Settings) -> tuple[Sequence[str], Sequence[str]]:
    """The test annotations and the folders of their images: as set, or found beside a Kaggle train.csv."""
    annotations, folders = settings.test_annotations, settings.test_image_folder
    if not annotations and [Path(file).name for file in settings.annotations] == ["train.csv"]:
        beside = Path(settings.annotations[0]).parent
        found = [beside / name for name in ("test_captions.csv", "test.csv") if (beside / name).is_file()]
        if found and (folders or (beside / "test" / "test").is_dir()):
            annotations = (str(found[0]),)
    if not annotations:
        if folders:
            raise UserError(
                "--test_image_folder needs --test_annotations: a CSV with at least the column image_id"
            )
        return (), ()
    return annotations, folders or (str(Path(annotations[0]).parent / "test" / "test"),)


def image_folders(settings: Settings) -> list[str]:
    """All folders that have images: also one that is given in place of annotations."""
    annotations, folders = find_test(settings)
    own = [file for file in (*settings.annotations, *annotations) if os.path.isdir(file)]
    return [*settings.image_folder, *folders, *own]


def write_splits(splits: dict[str, list[Record]], settings: Settings, folder: Path) -> dict:
    """Write the files of all splits to `folder`; return the record of what was done."""
    size = sum(map(len, splits.values())) * 3 * settings.image_size**2
    require_disk_space(folder, size, REMEDY)
    skipped: list[tuple[str, str]] = []  # (image_id, reason)
    kept: dict[str, list[Record]] = {}
    for name, records in splits.items():
        if name != "test":  # test images need no captions
            warn_of_long_captions(records, name, settings.max_len)
            records = skip_without_captions(records, settings.max_len, skipped)
        kept[name] = write_images(records, name, settings, folder, skipped)
        if not kept[name]:
            (folder / f"{name}_images.hdf5").unlink()
    if not kept["train"]:
        raise UserError(
            f"{', '.join(settings.image_folder)}: none of the training images can be used; first: "
            f"{skipped[0][1]}"
        )
    word_map = build_word_map(kept["train"], settings.min_word_freq)
    write_json(folder / "word_map.json", word_map)

    rng = random.Random(settings.seed)
    counts = {
        name: write_texts(records, name, word_map, settings, folder, rng)
        for name, records in kept.items()
        if records
    }
    return {
        "settings": asdict(settings),
        "inputs": input_files(settings),
        "splits": counts,
        "words": len(word_map) - 4,  # without <pad>, <unk>, <start>, <end>
        "skipped": skipped,
    }


def skip_without_captions(
    records: list[Record], max_len: int, skipped: list[tuple[str, str]]
) -> list[Record]:
    """The records with a caption of at most `max_len` words; the others are added to `skipped`."""
    usable = []
    for record in records:
        if usable_captions(record, max_len):
            usable.append(record)
        else:
            longest = max(map(len, record.tokens), default=0)
            reason = f"captions of {longest} words: raise --max_len {max_len}" if longest else "no caption"
            skipped.append((record.image_id, reason))
    return usable


def warn_of_long_captions(records: list[Record], split: str, max_len: int) -> None:
    lengths = [len(tokens) for record in records for tokens in record.tokens]
    long = sum(length > max_len for length in lengths)
    if long:
        share = f"{long} of {len(lengths)} captions have more than {max_len} words, up to {max(lengths)}"
        say(f"{split:5} {share}, and are left out; --max_len takes longer ones")


def usable_captions(record: Record, max_len: int) -> list[list[str]]:
    return [tokens for tokens in record.tokens if 0 < len(tokens) <= max_len]


def write_images(
    records: list[Record], split: str, settings: Settings, folder: Path, skipped: list[tuple[str, str]]
) -> list[Record]:
    """Write the images of `records` to SPLIT_images.hdf5 and return the records of those that can be read.

    The others are added to `skipped`.
    """
    kept, digest, messages = [], hashlib.sha256(), Messages("skipped")
    with RowWriter(folder / f"{split}_images.hdf5", "images", len(records), REMEDY) as writer:
        results = read_images(records, settings.image_size, settings.workers)
        for record, pixels in progress_bar(results, total=len(records), desc=f"{split} images", unit="image"):
            if isinstance(pixels, UserError):
                if settings.strict:
                    raise pixels
                messages.add(str(pixels))
                skipped.append((record.image_id, str(pixels)))
                continue
            writer.append(pixels[np.newaxis])
            digest.update(pixels)
            kept.append(record)
        messages.finish("; prepared.json lists all")
        writer.file.attrs["captions_per_image"] = settings.captions_per_image
        writer.file.attrs["digest"] = digest.hexdigest()  # tells whether cached features are of these images
    return kept


class RowWriter:
    """Writes a dataset row by row to a new HDF5 file; a context manager.

    Args:
        path: the file; give it the temporary path of an `atomic_write`.
        name: of the dataset.
        rows: how many there will be, at most.
        remedy: what to do where the disk has not enough space for them.

    Raises:
        UserError: the disk has not enough space. OSError: a write failed.
    """

    def __init__(self, path: str | Path, name: str, rows: int, remedy: str):
        self.path, self.name, self.rows, self.remedy = Path(path), name, rows, remedy
        self.checksums: list[int] = []
        self.dataset: h5py.Dataset | None = None

    def __enter__(self) -> RowWriter:
        self.stream = OutputFile(self.path)
        self.file = h5py.File(self.stream, "w")
        return self

    def append(self, values: np.ndarray) -> None:
        """Write the next rows (n, ...)."""
        if self.dataset is None:
            shape = values.shape[1:]
            require_disk_space(self.path.parent, self.rows * values[0].nbytes, self.remedy)
            chunks = (1,) * max(1, values.ndim - 3) + values.shape[1:][-3:]  # an image, or one view of it
            options = {"maxshape": (None, *shape), "chunks": chunks}
            self.dataset = self.file.create_dataset(self.name, (self.rows, *shape), values.dtype, **options)
        written = len(self.checksums)
        self.dataset[written : written + len(values)] = values
        self.stream.check()
        self.checksums += find_checksums(values).tolist()

    def __exit__(self, kind, error, traceback) -> None:
        with self.stream:
            if self.dataset is not None:
                self.dataset.resize(len(self.checksums), axis=0)
                self.file[CHECKSUMS] = np.array(self.checksums, np.uint32)
            self.file.close()
            if error is not None:
                raise error


def read_images(
    records: list[Record], size: int, workers: int
) -> Iterator[tuple[Record, np.ndarray | UserError]]:
    """Each record with its pixels (3, size, size), or with the error where its image cannot be read."""

    def read(record: Record) -> tuple[Record, np.ndarray | UserError]:
        try:
            return record, read_image(require_image(record.image_id, record.path), size)
        except UserError as error:
            return record, error

    return parallel_map(read, records, workers)


def build_word_map(records: list[Record], min_word_freq: int) -> dict[str, int]:
    """An index for each word that occurs `min_word_freq` times in the captions, and for the special tokens.

    What counts as a word was decided where the annotations were read (`Record.tokens`): by `metrics.tokenize`
    or, of Karpathy's JSON, by whoever made the file.
    """
    counts = Counter(word for record in records for tokens in record.tokens for word in tokens)
    frequent = [word for word, count in counts.items() if count >= min_word_freq]
    if not frequent:
        raise UserError(f"no word occurs {min_word_freq} times: lower --min_word_freq or add captions")
    return {word: index for index, word in enumerate([PAD, *frequent, UNK, START, END])}


def write_texts(
    records: list[Record],
    split: str,
    word_map: dict[str, int],
    settings: Settings,
    folder: Path,
    rng: random.Random,
) -> dict[str, float]:
    """Write a split's JSON files; return its numbers of images and captions and its share of `<unk>`.

    A split with an image that has no usable caption, as in a test.csv without captions, gets no encoded ones.
    """
    write_json(folder / f"{split}_image_ids.json", [record.image_id for record in records])
    write_json(folder / f"{split}_image_paths.json", [record.path for record in records])
    write_json(folder / f"{split}_references.json", [record.captions for record in records])
    counts = {"images": len(records), "captions": sum(len(record.captions) for record in records)}
    if all(usable_captions(record, settings.max_len) for record in records):
        counts["unknown_share"] = write_encoded_captions(records, split, word_map, settings, folder, rng)
    return counts


def write_encoded_captions(
    records: list[Record],
    split: str,
    word_map: dict[str, int],
    settings: Settings,
    folder: Path,
    rng: random.Random,
) -> float:
    """Write `captions_per_image` encoded captions per image, and their lengths; return `<unk>`'s share."""
    encoded, lengths, unknown = [], [], 0
    for record in records:
        choices = usable_captions(record, settings.max_len)
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
    """Size and modification time of each annotation file, which tell a later run whether it has changed; of a
    folder of sidecars the sum of their sizes, and a fingerprint of their names and times."""
    inputs = {}
    for file in (*settings.annotations, *find_test(settings)[0]):
        stats = {path: os.stat(path) for path in sources(file)}
        if len(stats) > 10:
            times = [(os.path.basename(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()]
            digest = hashlib.sha256(json.dumps(times).encode("utf-8", "replace")).digest()
            sizes = sum(stat.st_size for stat in stats.values())
            inputs[str(Path(file).resolve())] = [sizes, int.from_bytes(digest[:6], "big")]
        else:
            inputs |= {os.path.realpath(path): [s.st_size, s.st_mtime_ns] for path, s in stats.items()}
    return inputs


def is_prepared(settings: Settings) -> bool:
    """Whether the output folder has the data, whole, that these settings and the annotations give."""
    if not (Path(settings.output_folder) / "prepared.json").is_file():
        return False
    with lock_folder(settings.output_folder, reading=True):
        data = Prepared(settings.output_folder)
        inputs = input_files(settings)
        same = has_settings(data.record, settings) and data.record["inputs"] == inputs
        images = image_folders(settings)
        return same and is_whole(data) and images_are_as_prepared(data, images)


def has_settings(record: dict, settings: Settings) -> bool:
    """Whether the data of this `prepared.json` were made with these settings, also by an earlier release,
    which lacks some, and has single files as text."""
    recorded = record["settings"]
    wanted = json.loads(json.dumps(asdict(settings)))
    default = json.loads(json.dumps(asdict(Settings())))
    for name, value in wanted.items():
        own = recorded.get(name, default[name])
        if isinstance(value, list) and not isinstance(own, list):
            own = [] if own is None else [own]
        if own != value:
            return False
    return True


def print_summary(record: dict, output: Path) -> None:
    for name, counts in record["splits"].items():
        unknown = f", {counts['unknown_share']:.1%} of words unknown" if "unknown_share" in counts else ""
        if counts.get("unknown_share", 0) > LARGEST_UNKNOWN_SHARE:
            unknown += f": a --min_word_freq below {record['settings']['min_word_freq']} keeps more of them"
        say(f"{name:5} {counts['images']} images, {counts['captions']} captions{unknown}")
    say(f"words {record['words']} in the word map")
    if record["skipped"]:
        say(f"skipped {len(record['skipped'])} images (listed in {output / 'prepared.json'})")
    say(f"written to {output}/")


if __name__ == "__main__":
    run_script(main, Settings)

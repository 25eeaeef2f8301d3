"""What the models learn from and are tried on: annotation files, prepared captions and pictures, feature
caches.

Annotation readers turn four layouts into one list of `Picture`s. `CaptionDataset` reads what
create_input_files.py prepared, `cache_features` keeps a frozen encoder's output beside it.
"""

from __future__ import annotations

import csv
import hashlib
import os
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

from metrics import tokenize
from utils import PICTURE_EXTENSIONS, UserError, natural_order, progress_bar, read_json, written_aside

PAD, UNK, START, END = "<pad>", "<unk>", "<start>", "<end>"


# --- annotation files ---------------------------------------------------------------------------------------


@dataclass
class Picture:
    """One picture of an annotation file.

    image_id: as the file names it. path: None where no picture file was found (or none was looked for).
    captions: raw, in file order; what scores are counted against. tokens: the same captions in words.
    split: "train", "val", "test" where the file says so, else None.
    """

    image_id: str
    path: str | None
    captions: list[str] = field(default_factory=list)
    tokens: list[list[str]] = field(default_factory=list)
    split: str | None = None


def read_annotations(file: str | Path, image_folder: str | Path | None = None) -> list[Picture]:
    """Read an annotation file; its content tells the layout.

    * Kaggle CSV: columns `image_id,caption` (or `image_id` alone); ids are file names, less the extension
    * Flickr8k `captions.txt`: columns `image,caption`
    * Karpathy JSON: `images`, each with `filename`, `split` and `sentences`
    * COCO captions JSON: `images` and `annotations`

    Args:
        image_folder: where the pictures are looked for; None leaves every `path` None.

    Raises:
        UserError: the file or folder is missing, or the file has none of these layouts or no picture.
    """
    file = Path(file)
    if not file.is_file():
        raise UserError(f"{file}: no such annotation file; give the CSV or JSON file that holds the captions")
    finder = PictureFinder(image_folder) if image_folder is not None else None
    with file.open("rb") as stream:
        first = stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    try:
        pictures = _read_json(file, finder) if first[:1] in (b"{", b"[") else _read_csv(file, finder)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    if not pictures:
        raise UserError(f"{file}: no pictures in it; expected one line a caption below the header")
    return pictures


def held_out(pictures: list[Picture], fraction: float, seed: int) -> set[str]:
    """Ids of a `fraction` of the captioned pictures, drawn by picture, whatever the order of the file."""
    ids = sorted(picture.image_id for picture in pictures if picture.captions)
    random.Random(seed).shuffle(ids)
    return set(ids[: round(fraction * len(ids))])


class PictureFinder:
    """Finds the picture files of a folder by file name, with or without the extension."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(
                f"{folder}: no such folder of pictures; give the one that holds the picture files"
            )
        names = sorted(os.listdir(self.folder), key=natural_order)
        self.by_name = {name: name for name in names}
        for name in reversed(names):  # of several pictures with one stem, the first by name
            stem, extension = os.path.splitext(name)
            if extension.lower() in PICTURE_EXTENSIONS:
                self.by_name.setdefault(stem, name)

    def __call__(self, *names: str) -> str | None:
        """The path of the first of `names` that exists, else None."""
        for name in names:
            if name in self.by_name:
                return str(self.folder / self.by_name[name])
            if "/" in name and (self.folder / name).is_file():
                return str(self.folder / name)
        return None


def _read_csv(file: Path, finder: PictureFinder | None) -> list[Picture]:
    pictures: dict[str, Picture] = {}
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, restkey="rest")
            columns = [(name or "").strip() for name in reader.fieldnames or []]
            reader.fieldnames = columns
            id_column = next((name for name in ("image_id", "image") if name in columns), None)
            if id_column is None or (id_column == "image" and "caption" not in columns):
                found = f"has the columns {','.join(columns)[:100]}" if columns else "is empty"
                raise UserError(
                    f"{file}: {found}; expected image_id,caption or image,caption, or Karpathy or COCO JSON"
                )
            for row in reader:
                image_id = row[id_column]
                if not image_id:
                    continue
                if image_id not in pictures:
                    pictures[image_id] = Picture(image_id, finder(image_id) if finder else None)
                # a caption with commas that nobody quoted goes on in the columns that have no name
                parts = [row.get("caption"), *row.get("rest", [])]
                caption = ",".join(part for part in parts if part).strip()
                if caption:
                    pictures[image_id].captions.append(caption)
                    pictures[image_id].tokens.append(tokenize(caption))
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: not a CSV file ({error})") from None
    return list(pictures.values())


def _read_json(file: Path, finder: PictureFinder | None) -> list[Picture]:
    content = read_json(file)
    images = content.get("images") if isinstance(content, dict) else None
    try:
        if isinstance(images, list) and "annotations" in content:
            return _read_coco(images, content["annotations"], finder)
        if isinstance(images, list) and all("sentences" in image for image in images):
            return _read_karpathy(images, finder)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: damaged annotations: an entry lacks or misuses {error}") from None
    raise UserError(
        f"{file}: neither Karpathy JSON (images with sentences) nor COCO JSON (images, annotations)"
    )


def _read_karpathy(images: list[dict], finder: PictureFinder | None) -> list[Picture]:
    pictures = []
    for image in images:
        name = image["filename"]
        names = [f"{image['filepath']}/{name}", name] if image.get("filepath") else [name]
        split = "train" if image["split"] == "restval" else image["split"]
        picture = Picture(name, finder(*names) if finder else None, split=split)
        for sentence in image["sentences"]:
            tokens = [token.lower() for token in sentence["tokens"]]
            picture.tokens.append(tokens)
            picture.captions.append(sentence.get("raw") or " ".join(tokens))
        pictures.append(picture)
    return pictures


def _read_coco(images: list[dict], annotations: list[dict], finder: PictureFinder | None) -> list[Picture]:
    pictures = {}
    for image in images:
        path = finder(image["file_name"]) if finder else None
        pictures[image["id"]] = Picture(str(image["id"]), path)
    for annotation in annotations:
        picture = pictures[annotation["image_id"]]
        caption = annotation["caption"].strip()
        picture.captions.append(caption)
        picture.tokens.append(tokenize(caption))
    return list(pictures.values())


# --- prepared data ------------------------------------------------------------------------------------------


def read_prepared(data_folder: str | Path) -> dict:
    """The record `prepared.json` that create_input_files.py writes last, when everything else is complete."""
    path = Path(data_folder) / "prepared.json"
    if not path.is_file():
        raise UserError(f"{data_folder}: no prepared data in it; run create_input_files.py first")
    return read_json(path)


class Request(NamedTuple):
    """A batch: which pictures, in file order, and a seed for what is random in it."""

    indices: np.ndarray
    seed: int


class CaptionDataset(Dataset):
    """The pictures of one prepared split, each with its N_c captions, read a batch at a time.

    Of a `Request` for n pictures it gives (pictures, captions, lengths): pictures as uint8 (n, 3, S, S), or
    their features as float16 (n, h, w, D) where a cache is given; captions int64 (n, N_c, L), padded with 0;
    lengths int64 (n, N_c), `<start>` and `<end>` counted.

    Captions are kept as small integers in one array, which worker processes share; their memory stays flat.

    Args:
        augment: change pictures at random, see `augment_picture`.

    Raises:
        UserError: the split is missing or its files do not fit each other.
    """

    def __init__(
        self,
        data_folder: str | Path,
        split: str,
        features_file: str | Path | None = None,
        augment: bool = False,
    ):
        folder = Path(data_folder)
        if split not in read_prepared(folder)["splits"]:
            raise UserError(f"{folder}: no {split} split in it; run create_input_files.py with one")
        self.file = Path(features_file) if features_file else folder / f"{split}_images.hdf5"
        self.key = "features" if features_file else "images"
        words = read_json(folder / "word_map.json")
        lengths = np.array(read_json(folder / f"{split}_caption_lengths.json"), dtype=np.int16)
        captions = np.array(
            read_json(folder / f"{split}_encoded_captions.json"), dtype=np.min_scalar_type(len(words))
        )
        with h5py.File(folder / f"{split}_images.hdf5", "r") as pictures:
            per_image = int(pictures.attrs["captions_per_image"])
            self.size = len(pictures["images"])
        if len(captions) != self.size * per_image or len(lengths) != len(captions):
            raise UserError(
                f"{folder}: the {split} split's files do not fit each other; run create_input_files.py"
            )
        longest = lengths.max(initial=1)
        self.captions = captions[:, :longest].reshape(self.size, per_image, longest).copy()
        self.lengths = lengths.reshape(self.size, per_image)
        self.augment = augment
        if augment:
            sided = [index for word, index in words.items() if SIDED.search(word)]
            self.sided = np.isin(self.captions, sided).any(
                axis=(1, 2)
            )  # (I,) some caption says left or right
        self.stored = None  # opened where it is read: an open HDF5 file must not cross into a worker process

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, request: Request) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.stored is None:
            self.stored = h5py.File(self.file, "r")[self.key]
        indices = request.indices
        pictures = np.empty((len(indices), *self.stored.shape[1:]), self.stored.dtype)
        for row, index in enumerate(indices):
            self.stored.read_direct(pictures, np.s_[index], np.s_[row])
        pictures = torch.from_numpy(pictures)
        if self.augment:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(request.seed)
                pictures = torch.stack(
                    [
                        augment_picture(picture, flip=not self.sided[index])
                        for picture, index in zip(pictures, indices)
                    ]
                )
        lengths = self.lengths[indices].astype(np.int64)
        captions = self.captions[indices, :, : lengths.max()].astype(np.int64)
        return pictures, torch.from_numpy(captions), torch.from_numpy(lengths)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"stored": None}


class BatchSampler:
    """The batches of an epoch, shared out to processes and cut into parts that fit the device.

    A step takes batch_size * parts * processes pictures. All steps of an epoch are equally large, to one
    picture, and so are the parts of a step. Which pictures make a step depends only on their number, not on
    how the step is cut up.

    Args:
        size: pictures in all. batch_size: the largest part. parts: of a step in each process.
        shuffle: new order in each epoch; otherwise file order.

    Raises:
        UserError: fewer pictures than parts.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        parts: int = 1,
        rank: int = 0,
        processes: int = 1,
        shuffle: bool = False,
        seed: int = 0,
    ):
        if size < parts * processes:
            raise UserError(
                f"{size} pictures cannot be shared out to {parts * processes} batches a step: "
                f"lower --grad_accumulation or the number of processes"
            )
        self.size, self.shuffle, self.seed = size, shuffle, seed
        self.parts, self.rank, self.processes = parts, rank, processes
        # no part of a step may be empty
        self.count = min(-(-size // (batch_size * parts * processes)), size // (parts * processes))
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Draw the order of an epoch; the same for the same seed and epoch."""
        self.epoch = epoch
        order = np.arange(self.size)
        if self.shuffle:
            np.random.default_rng([self.seed, epoch]).shuffle(order)
        self.steps = np.array_split(order, self.count)

    def __len__(self) -> int:
        return self.count * self.parts

    def __iter__(self) -> Iterator[Request]:
        for number, step in enumerate(self.steps):
            shares = np.array_split(step, self.parts * self.processes)
            for part in range(self.parts):
                place = part * self.processes + self.rank
                seed = np.random.SeedSequence([self.seed, self.epoch, number, place]).generate_state(1)[0]
                yield Request(np.sort(shares[place]), int(seed))


SIDED = re.compile(r"(^|-)(left|right)(most|wards?|hand|handed|side)?(-|$)")  # words that a flip makes false


def augment_picture(picture: torch.Tensor, flip: bool) -> torch.Tensor:
    """A random crop of at least 70 % of the area, brought back to size, with other colours, perhaps flipped.

    Args:
        picture: uint8 (3, S, S).
        flip: whether a horizontal flip may happen; not where a caption says left or right.
    """
    picture = v2.functional.to_image(picture)
    transforms = [
        v2.RandomResizedCrop(picture.shape[1:], scale=(0.7, 1.0), ratio=(0.8, 1.25), antialias=True),
        v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02),
    ]
    if flip:
        transforms.append(v2.RandomHorizontalFlip())
    return v2.Compose(transforms)(picture).as_subclass(torch.Tensor)


# --- a frozen encoder's features, kept on disk --------------------------------------------------------------


def weights_digest(module: torch.nn.Module) -> str:
    """A fingerprint of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def cached_features(encoder, data_folder: str | Path, split: str) -> Path | None:
    """The HDF5 file with this encoder's features of these pictures, if there is one."""
    folder = Path(data_folder)
    file = folder / f"{split}_features_{encoder.name}.hdf5"
    if not file.is_file():
        return None
    with h5py.File(file, "r") as cache:
        key = _cache_key(encoder, folder, split)
        return file if all(cache.attrs.get(name) == value for name, value in key.items()) else None


def _cache_key(encoder, folder: Path, split: str) -> dict[str, str]:
    with h5py.File(folder / f"{split}_images.hdf5", "r") as pictures:
        return {"weights": weights_digest(encoder), "pictures": pictures.attrs["digest"]}


def cache_features(encoder, data_folder: str | Path, split: str, device: torch.device) -> Path:
    """Encode each picture of a split once; return the HDF5 file with `features`, float16 (I, h, w, D),
    native grid.

    The file carries fingerprints of the encoder's weights and of the pictures. One whose fingerprints fit is
    used as it is, any other is made anew.

    Raises:
        UserError: the disk has no room for it.
    """
    file = cached_features(encoder, data_folder, split)
    if file:
        return file
    folder = Path(data_folder)
    file = folder / f"{split}_features_{encoder.name}.hdf5"
    batch_size = 64
    with h5py.File(folder / f"{split}_images.hdf5", "r") as pictures:
        images = pictures["images"]
        grid = encoder.encode(torch.from_numpy(images[:1]).to(device))[0]
        needed = 2 * grid.numel() * len(images)  # bytes
        free = shutil.disk_usage(folder).free
        print(f"features of {len(images)} {split} pictures: {needed / 1e9:.2f} GB in {file}")
        if needed > free:
            raise UserError(
                f"{folder}: {free / 1e9:.2f} GB free, the features take {needed / 1e9:.2f} GB: make room, or "
                f"give --cache_features False to encode anew in every epoch"
            )
        with written_aside(file) as aside, h5py.File(aside, "w") as cache:
            cache.attrs.update(_cache_key(encoder, folder, split))
            shape = (len(images), *grid.shape)
            stored = cache.create_dataset("features", shape, "float16")
            with progress_bar(
                total=len(images), desc=f"encoding {split} pictures", unit="picture"
            ) as progress:
                for start in range(0, len(images), batch_size):
                    batch = torch.from_numpy(images[start : start + batch_size]).to(device)
                    stored[start : start + len(batch)] = encoder.encode(batch).half().cpu().numpy()
                    progress.update(len(batch))
    return file

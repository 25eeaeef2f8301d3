"""Damaged, foreign and hostile prepared data: refused with one line, never trusted, never a traceback."""

import json
import os
import random
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import create_input_files as preparation
from captioning.data.features import cache_features, cached_features
from captioning.data.prepared import Prepared
from datasets import CaptionDataset, Request
from models import Encoder
from utils import UserError


@pytest.fixture
def folder(prepared, tmp_path) -> Path:
    """A copy of prepared data, without feature caches."""
    copy = tmp_path / "data"
    shutil.copytree(prepared, copy, ignore=shutil.ignore_patterns("*_features_*"))
    return copy


def read_all(folder: Path) -> None:
    """Read everything that a training and an evaluation read."""
    data = Prepared(folder)
    data.word_map()
    for split in ("train", "val"):
        data.records(split)
        dataset = CaptionDataset(folder, split)
        dataset[Request(np.arange(len(dataset)), 0)]


def as_before_digests(folder: Path) -> None:
    """Make the record what it was when prepared.json had no digests."""
    record = json.loads((folder / "prepared.json").read_text())
    del record["files"]
    (folder / "prepared.json").write_text(json.dumps(record))


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        read_all(folder)
    message = str(error.value)
    assert str(folder) in message and "\n" not in message and "run " in message
    return message


def change(name: str, function):
    """A damage: a function of a folder that replaces the value in a JSON file."""

    def damage(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(function(value)))

    return damage


def change_images(function):
    def damage(folder: Path) -> None:
        with h5py.File(folder / "train_images.hdf5", "r+") as file:
            function(file)

    return damage


def replace_images(function):
    def damage(folder: Path) -> None:
        with h5py.File(folder / "train_images.hdf5", "r+") as file:
            del file["images"]
            function(file, folder)

    return damage


CAPTIONS, LENGTHS = "train_encoded_captions.json", "train_caption_lengths.json"
REFERENCES = "val_references.json"
RENUMBERED = {"double": lambda i: min(i, 5), "negative": lambda i: -i, "huge": lambda i: i * 10**9}
DAMAGES = {
    "empty record": change("prepared.json", lambda _: {}),
    "list as record": change("prepared.json", lambda _: []),
    "no settings": change("prepared.json", lambda r: r | {"settings": 1}),
    "no counts": change("prepared.json", lambda r: r | {"splits": {"train": {}, "val": {}}}),
    "other counts": change("prepared.json", lambda r: r | {"splits": {
        name: {"images": 3, "captions": 3} for name in r["splits"]}}),
    "other image size": change("prepared.json", lambda r: r | {"settings": r["settings"] | {
        "image_size": 96}}),
    "huge image size": change("prepared.json", lambda r: r | {"settings": r["settings"] | {
        "image_size": 10**9}}),
    "more per image": change("prepared.json", lambda r: r | {"settings": r["settings"] | {
        "captions_per_image": 7}}),
    "other words": change("word_map.json", lambda m: {f"x{w}": i for w, i in m.items()}),
    "word map as list": change("word_map.json", list),
    "word map of text": change("word_map.json", lambda m: {w: str(i) for w, i in m.items()}),
    "no <start>": change("word_map.json", lambda m: {w.replace("<start>", "s"): i for w, i in m.items()}),
    "pad not 0": change("word_map.json", lambda m: m | {"<pad>": 1, "a": 0}),
    "one word less": change("word_map.json", lambda m: dict(list(m.items())[:-1])),
    "lengths 0": change(LENGTHS, lambda v: [0] * len(v)),
    "lengths 1": change(LENGTHS, lambda v: [1] * len(v)),
    "lengths too large": change(LENGTHS, lambda v: [999] * len(v)),
    "lengths of 2 ** 40": change(LENGTHS, lambda v: [2**40] * len(v)),
    "lengths of 10 ** 30": change(LENGTHS, lambda v: [10**30] * len(v)),
    "negative lengths": change(LENGTHS, lambda v: [-3] * len(v)),
    "lengths one short": change(LENGTHS, lambda v: v[1:]),
    "lengths one off": change(LENGTHS, lambda v: [n - 1 for n in v]),
    "lengths of text": change(LENGTHS, lambda v: ["5"] * len(v)),
    "no lengths": change(LENGTHS, lambda v: []),
    "null": change(LENGTHS, lambda v: None),
    "captions beyond the vocabulary": change(CAPTIONS, lambda v: [[i * 99 for i in c] for c in v]),
    "negative captions": change(CAPTIONS, lambda v: [[-i for i in c] for c in v]),
    "captions of fractions": change(CAPTIONS, lambda v: [[i + 0.5 for i in c] for c in v]),
    "ragged captions": change(CAPTIONS, lambda v: [v[0][:-1], *v[1:]]),
    "captions one short": change(CAPTIONS, lambda v: v[1:]),
    "captions without rows": change(CAPTIONS, lambda v: [[] for _ in v]),
    "no <end>": change(CAPTIONS, lambda v: [[1 if i == len(c) else i for i in c] for c in v] and
                       [[*c[:2], 0, *c[3:]] for c in v]),
    "captions too deep": change(CAPTIONS, lambda v: [[c] for c in v]),
    "captions as dictionary": change(CAPTIONS, lambda v: {"a": v}),
    "references one short": change(REFERENCES, lambda v: v[1:]),
    "references of numbers": change(REFERENCES, lambda v: [[1] for _ in v]),
    "references of text": change(REFERENCES, lambda v: ["a" for _ in v]),
    "ids of numbers": change("val_image_ids.json", lambda v: list(range(len(v)))),
    "ids one short": change("val_image_ids.json", lambda v: v[1:]),
    "paths one short": change("train_image_paths.json", lambda v: v[1:]),
    "paths of lists": change("train_image_paths.json", lambda v: [[] for _ in v]),
    "fewer images": change_images(lambda f: f["images"].resize(3, axis=0)),
    "more images": change_images(lambda f: f["images"].resize(99, axis=0)),
    "another name": change_images(lambda f: f.move("images", "pictures")),
    "foreign": replace_images(lambda f, folder: f.create_dataset("images", (32, 3, 64, 64), "float32")),
    "of other sides": replace_images(lambda f, folder: f.create_dataset("images", data=np.zeros(
        (32, 3, 32, 64), "uint8"))),
    "never written": replace_images(lambda f, folder: f.create_dataset(
        "images", (32, 3, 64, 64), "uint8", chunks=(1, 3, 64, 64))),
    "bomb": replace_images(lambda f, folder: f.create_dataset(
        "images", (32, 3, 64, 64), "uint8", compression="gzip")),
    "external link": replace_images(lambda f, folder: f.__setitem__(
        "images", h5py.ExternalLink(str(folder / "val_images.hdf5"), "images"))),
    "external values": replace_images(lambda f, folder: f.create_dataset(
        "images", (32, 3, 64, 64), "uint8", external=[(str(folder / "word_map.json"), 0, 32 * 3 * 64 * 64)])),
}  # fmt: skip
for name, renumber in RENUMBERED.items():
    DAMAGES[f"{name} indices"] = change(
        "word_map.json", lambda m, renumber=renumber: {w: renumber(i) for w, i in m.items()}
    )


def test_sound_data_are_read_with_and_without_digests(folder):
    read_all(folder)
    as_before_digests(folder)
    read_all(folder)


@pytest.mark.parametrize("digests", [True, False], ids=["digests", "before"])
@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_data_are_refused(name, digests, folder):
    if not digests:
        as_before_digests(folder)
    if not digests and name == "other words":
        pytest.skip("a word map of another run with as many words is what only a digest can tell")
    DAMAGES[name](folder)
    refused(folder)


def test_every_missing_cut_or_flipped_file_is_noticed(folder, prepared):
    rng, tried = random.Random(0), 0
    unread = "test_", "image_files"  # the latter only says whether the images are as they were
    files = [path for path in sorted(folder.iterdir()) if not path.name.startswith(unread)]
    for path in files:
        content = path.read_bytes()
        flips = [rng.randrange(len(content)) for _ in range(8)] if path.suffix == ".json" else []
        flipped = [
            content[:i] + bytes([content[i] ^ 1 << rng.randrange(8)]) + content[i + 1 :] for i in flips
        ]
        cuts = [content[: int(len(content) * share)] for share in (0, 0.001, 0.3, 0.9)] + [content[:-1]]
        for damaged in [None, b"text", b"[]", b"\xff\xfe", b"[" * 100_000, *cuts, *flipped]:
            path.unlink() if damaged is None else path.write_bytes(damaged)
            try:
                read_all(folder)
            except UserError as error:
                assert "\n" not in str(error)
            else:  # a change of prepared.json that says nothing else, such as another time of an input
                assert path.name == "prepared.json" and damaged in flipped
            tried += 1
        path.write_bytes(content)
    assert tried > 150
    read_all(folder)


def test_files_of_two_preparations_do_not_mix(demo, prepared, folder, tmp_path):
    other = tmp_path / "other"
    preparation.create_input_files(preparation.Settings(
        str(demo / "train.csv"), str(demo / "train" / "train"), output_folder=str(other),
        min_word_freq=1, image_size=64, val_fraction=0.2, seed=5,
    ))  # fmt: skip
    for path in sorted(other.iterdir()):
        if path.read_bytes() != (folder / path.name).read_bytes() and path.name != "prepared.json":
            mine = (folder / path.name).read_bytes()
            shutil.copy(path, folder)
            if not path.name.startswith(("test_", "image_files")):
                refused(folder)
            (folder / path.name).write_bytes(mine)
    read_all(folder)


def test_images_replaced_while_a_training_runs_are_noticed_by_its_workers(demo, folder):
    dataset = CaptionDataset(folder, "train")
    preparation.create_input_files(preparation.Settings(
        str(demo / "train.csv"), str(demo / "train" / "train"), output_folder=str(folder),
        min_word_freq=1, image_size=64, val_fraction=0.2, seed=5,
    ))  # fmt: skip
    with pytest.raises(UserError, match="another preparation"):
        dataset[Request(np.arange(2), 0)]


def test_a_damaged_feature_cache_is_made_anew(folder):
    encoder, cpu = Encoder("resnet18"), torch.device("cpu")
    file = cache_features(encoder, folder, "val", cpu)
    content = file.read_bytes()
    with h5py.File(file) as cache:
        truth = cache["features"][:]
    with h5py.File(file, "r+") as cache:
        del cache["features"]
        cache["features"] = truth[:3]
    shorter = file.read_bytes()
    with h5py.File(file, "r+") as cache:
        del cache["features"]
        cache["features"] = h5py.ExternalLink(str(folder / "val_images.hdf5"), "images")
    linked = file.read_bytes()
    for damaged in (
        b"",
        b"text",
        content[: len(content) // 2],
        content[:-1],
        content[:2000],
        shorter,
        linked,
    ):
        file.write_bytes(damaged)
        assert cached_features(encoder, folder, "val") is None
        with h5py.File(cache_features(encoder, folder, "val", cpu)) as cache:
            assert (cache["features"][:] == truth).all()
    dataset = CaptionDataset(folder, "val", file)
    dataset[Request(np.arange(2), 0)]
    with pytest.raises(UserError, match="of other images"):
        CaptionDataset(folder, "train", file)


def test_features_that_are_no_numbers_are_not_blamed_on_the_learning_rate(folder):
    encoder = Encoder("resnet18")
    next(encoder.parameters()).data.fill_(float("nan"))
    with pytest.raises(UserError, match="encoder's features"):
        cache_features(encoder, folder, "val", torch.device("cpu"))
    assert not list(folder.glob("*features*"))


@pytest.mark.parametrize("kind", ["images", "features"])
def test_a_flipped_bit_is_noticed_where_it_is_read(folder, kind):
    features = cache_features(Encoder("resnet18"), folder, "val", torch.device("cpu"))
    file = {"images": folder / "val_images.hdf5", "features": features}[kind]
    with h5py.File(file) as stored:
        row = stored[kind][3].tobytes()
        assert stored["checksums"].shape == (len(stored[kind]),)
    content = bytearray(file.read_bytes())
    content[content.index(row) + len(row) // 2] ^= 4
    file.write_bytes(content)
    requests = [Request(np.arange(3), 0), Request(np.arange(3, 5), 0)]

    def read(count: int, workers: int) -> None:
        dataset = CaptionDataset(folder, "val", features if kind == "features" else None)
        list(torch.utils.data.DataLoader(dataset, None, sampler=requests[:count], num_workers=workers))

    for workers in (0, 1):
        read(1, workers)
        with pytest.raises(UserError, match="its row 3 is damaged") as error:
            read(2, workers)
        assert "\n" not in str(error.value)
    with h5py.File(file) as stored, h5py.File(folder / "old", "w") as old:
        old.attrs.update(stored.attrs)
        old[kind] = stored[kind][:]
    os.replace(folder / "old", file)  # as written before there were checksums
    read(2, 0)

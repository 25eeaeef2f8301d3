"""Data sets, batches, augmentation and feature caches of both trainings."""

import json
import random
from collections import namedtuple

import h5py
import numpy as np
import pytest
import torch

from captioning.captioners.blip import tiny_captioner
from captioning.data import features
from captioning.data import prepared as prepared_data
from captioning.data.annotations import read_annotations
from captioning.data.features import cache_features, cached_features, encode_images
from captioning.files import remove_unfinished
from captioning.training import blip_data
from captioning.training.blip_data import BlipDataset
from datasets import LEFT_OR_RIGHT, BatchSampler, CaptionDataset, Request, augment_image
from models import Encoder
from utils import UserError

# --- prepared images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, batch_size, accumulation_steps, processes",
    [(32, 5, 1, 1), (32, 8, 2, 2), (7, 16, 1, 3), (5, 1, 2, 2), (9, 4, 1, 2)],
)
def test_an_epoch_has_every_image_once(size, batch_size, accumulation_steps, processes):
    samplers = [
        BatchSampler(size, batch_size, accumulation_steps, rank, processes, shuffle=True, seed=3)
        for rank in range(processes)
    ]
    orders = []
    for epoch in (1, 2):
        seen = []
        for sampler in samplers:
            sampler.start_epoch(epoch)
            requests = list(sampler)
            assert len(requests) == len(sampler) == len(samplers[0])
            assert all(len(request.indices) for request in requests)
            if (size, batch_size) != (5, 1):  # where a micro-batch would be empty they are larger
                assert max(len(request.indices) for request in requests) <= batch_size
            seen += [index for request in requests for index in request.indices.tolist()]
        assert sorted(seen) == list(range(size))
        # a step has the same images however it is divided
        whole = BatchSampler(size, batch_size * accumulation_steps * processes, shuffle=True, seed=3)
        whole.start_epoch(epoch)
        if len(whole) == len(samplers[0].steps):
            for request, step in zip(whole, samplers[0].steps):
                assert request.indices.tolist() == sorted(step.tolist())
        orders.append([request.indices.tolist() for request in samplers[0]])
    assert orders[0] != orders[1]
    with pytest.raises(UserError, match="cannot be divided"):
        BatchSampler(3, 1, 2, 0, 2)


def test_an_epoch_goes_on_with_a_later_step():
    sampler = BatchSampler(33, 4, accumulation_steps=2, rank=1, processes=2, shuffle=True, seed=3)
    sampler.start_epoch(2)
    whole = [(request.indices.tolist(), request.seed) for request in sampler]
    sampler.start_epoch(2, first_step=1)
    rest = [(request.indices.tolist(), request.seed) for request in sampler]
    assert rest == whole[2:] and len(sampler) == len(rest) > 0


def test_a_batch_is_its_images_one_by_one(prepared):
    dataset = CaptionDataset(prepared, "train")
    images, captions, lengths = dataset[Request(np.array([3, 4, 9]), 0)]
    for row, index in enumerate((3, 4, 9)):
        image, caption, length = dataset[Request(np.array([index]), 0)]
        assert torch.equal(images[row], image[0]) and torch.equal(lengths[row], length[0])
        assert torch.equal(captions[row, :, : caption.shape[2]], caption[0])
        assert not captions[row, :, caption.shape[2] :].any()


def test_augmented_images_keep_left_and_right_where_captions_say_so(prepared):
    half = torch.zeros(3, 64, 64, dtype=torch.uint8)
    half[:, :, 32:] = 255  # white is on the right
    results = {False: [], True: []}
    for flip in results:
        for seed in range(40):
            image = augment_image(half, random.Random(seed), flip).float()
            assert image.shape == half.shape
            results[flip].append(bool(image[:, :, -16:].mean() > image[:, :, :16].mean()))
    assert all(results[False]) and 10 < sum(results[True]) < 30

    dataset = CaptionDataset(prepared, "train", augment=True)
    words = {index: word for word, index in json.loads((prepared / "word_map.json").read_text()).items()}
    for index in range(len(dataset)):
        says = {words[word] for word in dataset.captions[index].flatten().tolist()} & {"left", "right"}
        assert dataset.may_flip[index] == (not says)
    assert 0 < dataset.may_flip.sum() < len(dataset)
    for word in ("left", "right", "left-hand", "leftmost", "upper-right", "rightwards"):
        assert LEFT_OR_RIGHT.search(word)
    for word in ("bright", "rights", "lefty", "upright", "cleft"):
        assert not LEFT_OR_RIGHT.search(word)

    # the seed of the request alone decides
    order = torch.get_rng_state()
    first, again, another = (dataset[Request(np.arange(4), seed)][0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, another)
    assert torch.equal(torch.get_rng_state(), order)


# --- image files, for BLIP ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captioner(demo_captions):
    return tiny_captioner(caption for captions in demo_captions for caption in captions)


@pytest.fixture(scope="module")
def records(demo):
    return read_annotations(demo / "train.csv", demo / "train" / "train")[:6]


def test_images_are_prepared_as_for_captioning(captioner, records, monkeypatch):
    """From memory (uint8, resized) or read again from the file, they are exactly what `prepare` returns."""
    truth = torch.stack([captioner.prepare(record.path) for record in records])
    for memory, kept in ((blip_data.KEPT_BYTES, 6), (2 * 3 * 64 * 64 + 1, 2), (0, 0)):
        monkeypatch.setattr(blip_data, "KEPT_BYTES", memory)
        dataset = BlipDataset(captioner, records, workers=2)
        for _ in range(2):
            found = torch.cat([*dataset.batches([[0, 1, 2, 3], [4, 5]])])
            assert torch.equal(found, truth) and found.dtype == torch.float32
        assert len(dataset.kept) == kept
        assert all(image.dtype == torch.uint8 for image in dataset.kept.values())


def test_augmentation_depends_on_seed_and_image_alone(captioner, records):
    dataset = BlipDataset(captioner, records, workers=3)
    (together,) = dataset.batches([[0, 1, 2, 3, 4, 5]], "1")
    order = torch.get_rng_state()
    alone = torch.cat([*dataset.batches([[index] for index in (5, 4, 3, 2, 1, 0)], "1")]).flip(0)
    assert torch.equal(together, alone)
    (another,) = dataset.batches([[0, 1, 2, 3, 4, 5]], "2")
    assert (together != another).flatten(1).any(dim=1).all()
    assert torch.equal(torch.get_rng_state(), order)
    for record, may_flip in zip(records, dataset.may_flip, strict=True):
        assert may_flip == (not {"left", "right"} & {word for tokens in record.tokens for word in tokens})
    assert 0 < sum(dataset.may_flip) < len(records)


# --- feature caches -----------------------------------------------------------------------------------------


def test_feature_cache_is_made_once_and_never_stale(prepared):
    torch.manual_seed(149)  # weights that no other test has
    encoder = Encoder("resnet18")
    assert cached_features(encoder, prepared, "val") is None
    file = cache_features(encoder, prepared, "val", torch.device("cpu"))
    assert cached_features(encoder, prepared, "val") == file
    with h5py.File(file) as cache, h5py.File(prepared / "val_images.hdf5") as images:
        assert set(cache.attrs) == {"weights", "pictures"}, "caches on users' disks would be made anew"
        truth = encode_images(encoder, torch.from_numpy(images["images"][:]))
        difference = np.abs(cache["features"][:] - truth.numpy()).max()
        assert difference < 1e-3 * truth.abs().max()
    made = file.stat().st_mtime_ns
    assert cache_features(encoder, prepared, "val", torch.device("cpu")).stat().st_mtime_ns == made
    torch.manual_seed(1)
    other = Encoder("resnet18")
    assert cached_features(other, prepared, "val") is None
    assert cache_features(other, prepared, "val", torch.device("cpu")).stat().st_mtime_ns != made


def test_a_full_disk_is_noticed_before_the_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(prepared_data.shutil, "disk_usage", lambda folder: usage(free=99))
    encoded = []

    def encode(batch):
        encoded.append(batch)
        return batch

    def batches(first):
        return (torch.ones(2, 5) for _ in range(50))

    with pytest.raises(UserError, match="--cache_features False") as error:
        features.write_features(tmp_path / "f.hdf5", {}, batches, encode, 100, 2, "images")
    assert "\n" not in str(error.value)
    assert len(encoded) == 1 and not list(tmp_path.iterdir())


def write_squares(file, size: int, fingerprint: str = "w", stop_at: int | None = None) -> list[int]:
    """A cache of the squares of 0, 1, ...; the first numbers of the batches that were encoded."""
    encoded = []

    def batches(first):
        for start in range(first, size, 4):
            if stop_at is not None and start >= stop_at:
                raise KeyboardInterrupt
            encoded.append(start)
            yield torch.arange(start, min(start + 4, size)).float().unsqueeze(1)

    features.write_features(file, {"weights": fingerprint}, batches, torch.square, size, 4, "images")
    return encoded


def test_an_interrupted_cache_goes_on(tmp_path):
    file, partial = tmp_path / "f.hdf5", tmp_path / ".f.hdf5.partial"

    def interrupt(*arguments, **options):
        with pytest.raises(KeyboardInterrupt) as interrupted:
            write_squares(file, *arguments, **options)
        assert not file.exists()
        return str(interrupted.value)

    interrupt(10, stop_at=0)
    assert not list(tmp_path.iterdir())
    assert interrupt(10, stop_at=8) == "8 of 10 images are encoded; the same command goes on from there"
    remove_unfinished(tmp_path)  # this is not for it
    content = partial.read_bytes()
    truth = [index**2 for index in range(10)]

    def complete(*arguments) -> list[int]:
        try:
            encoded = write_squares(file, 10, *arguments)
        except UserError as error:  # a header that says float16 no more, say
            assert "start it again" in str(error)
            encoded = write_squares(file, 10, *arguments)
        assert [path.name for path in tmp_path.iterdir()] == ["f.hdf5"]
        assert prepared_data.open_dataset(file, "features", np.float16)[:].flatten().tolist() == truth
        assert features.is_up_to_date(file, {"weights": arguments[0] if arguments else "w"}, 10)
        assert not features.is_up_to_date(file, {"weights": "other"}, 10)
        assert not features.is_up_to_date(file, {"weights": "w"}, 11)
        file.unlink()
        return encoded

    assert complete() == [8]
    partial.write_bytes(content)
    assert complete("v") == [0, 4, 8], "those of other weights are not used"
    rng, counts = np.random.default_rng(0), []
    for position in rng.permutation(len(content) * 8)[:200]:  # a flipped bit anywhere
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << position % 8
        partial.write_bytes(damaged)
        counts.append(len(complete()))
    for length in range(0, len(content), len(content) // 50):  # cut short
        partial.write_bytes(content[:length])
        counts.append(len(complete()))
    assert set(counts) == {1, 2, 3}
    with pytest.raises(KeyboardInterrupt):
        write_squares(file, 10, stop_at=8)
    write_squares(file, 11)
    assert features.is_up_to_date(file, {"weights": "w"}, 11)

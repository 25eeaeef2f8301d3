"""What benchmarks/gpu.py measures with: images and captions in memory and on disk, models, precisions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from common import make_captions, make_images, make_word_map, random_encoder, write_record  # isort: skip
import h5py
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from captioning.data.features import encode_images
from captioning.decoding.fast_energies import use_fast_energies
from datasets import BatchSampler, CaptionDataset
from models import DecoderWithAttention
from tests.reference import TextbookDecoder, TextbookEncoder
from utils import write_json

PRECISIONS = ("float32", "tf32", "bf16")


class Data:
    """Made-up images and captions, in memory and on disk, and models of both implementations' weights."""

    def __init__(self, settings, device: torch.device, folder: Path):
        self.settings, self.device, self.folder = settings, device, folder
        size, count = settings.image_size, settings.images
        self.images = torch.cat([make_images(n, size, size, settings.seed) for n in chunks(count)])
        self.word_map = make_word_map(settings.vocabulary)
        self.captions, self.lengths = make_captions(count, 5, settings.vocabulary, 20, settings.seed)
        encoder = random_encoder(settings.encoder_name, settings.seed, device)
        self.textbook_encoder = TextbookEncoder(settings.encoder_name)
        self.textbook_encoder.load_state_dict(encoder.state_dict())
        self.textbook_encoder.to(device)
        self.encoder = encoder
        with full_precision():
            features = [encode_images(encoder, part.to(device)).half() for part in self.images.split(64)]
        self.features = torch.cat(features).clone()  # on the device: (I, h, w, D)
        self.host_features = self.features.cpu()
        sizes = (settings.width, settings.width, settings.width, settings.vocabulary, encoder.dim)
        torch.manual_seed(settings.seed)
        self.weights = DecoderWithAttention(*sizes).state_dict()
        self.sizes = sizes
        self.write_prepared()

    def write_prepared(self) -> None:
        """A training split as create_input_files.py writes it, and its features as train.py does."""
        write_json(self.folder / "word_map.json", self.word_map)
        write_json(self.folder / "train_encoded_captions.json", self.captions.flatten(0, 1).tolist())
        write_json(self.folder / "train_caption_lengths.json", self.lengths.flatten().tolist())
        with h5py.File(self.folder / "train_images.hdf5", "w") as file:
            file["images"] = self.images.numpy()
            file.attrs.update({"captions_per_image": 5, "digest": "made up"})
        with h5py.File(self.folder / "train_features.hdf5", "w") as file:
            file["features"] = self.host_features.numpy()
            file.attrs["pictures"] = "made up"  # the digest of their images
        write_record(self.folder, {"train": len(self.images)}, 5, self.images.shape[3], len(self.word_map))

    def decoder(self) -> DecoderWithAttention:
        decoder = DecoderWithAttention(*self.sizes, dropout=0)  # without, losses can be compared
        decoder.load_state_dict(self.weights)
        use_fast_energies(decoder)
        return decoder.to(self.device)

    def textbook(self) -> TextbookDecoder:
        decoder = TextbookDecoder(*self.sizes)
        decoder.load_state_dict(self.weights)
        return decoder.to(self.device)

    def batches(self, place: str, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches without end: features or images, captions (N, 5, L), lengths (N, 5), these on the CPU.

        place: "device" or "host" memory; "disk", or "images on disk", through the loader of a training.
        """
        if place.endswith("disk"):
            features = None if place.startswith("images") else self.folder / "train_features.hdf5"
            yield from self.load(CaptionDataset(self.folder, "train", features), batch_size)
        generator = torch.Generator().manual_seed(self.settings.seed)
        while True:
            index = torch.randperm(len(self.images), generator=generator)[:batch_size]
            lengths = self.lengths[index]
            if place == "device":
                grid = self.features[index.to(self.device, non_blocking=True)]
            else:
                grid = self.host_features[index]
            yield grid, self.captions[index, :, : int(lengths.max())], lengths

    def load(self, dataset: CaptionDataset, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        sampler = BatchSampler(len(dataset), batch_size, shuffle=True)
        workers = self.settings.workers
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda",
        )
        for epoch in itertools.count():
            sampler.start_epoch(epoch)
            yield from loader


def chunks(count: int, size: int = 64) -> list[int]:
    """count in parts of at most `size`."""
    return [min(size, count - start) for start in range(0, count, size)]


@contextmanager
def full_precision(tf32: bool = False) -> Iterator[None]:
    """float32 products as they are; with tf32 in TensorFloat-32 where the device has it."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    low = torch.autocast(device.type, torch.bfloat16) if name == "bf16" else nullcontext()
    with full_precision(tf32=name != "float32"), low:
        yield

"""A frozen encoder's output, computed once and kept on disk, for both trainings."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import h5py
import torch
from torch import Tensor, nn

from models import Encoder, normalize_images
from utils import UserError, atomic_write, progress_bar

CPU_BATCH = 8  # images; ran 1.2 (resnet101) to 2.5 times (efficientnet_lite0) as fast as 32


@torch.inference_mode()
def encode_images(encoder: Encoder, images: Tensor) -> Tensor:
    """uint8 images (N, 3, H, W) in [0, 255] -> the encoder's native grid (N, h, w, D), without gradients."""
    batch_size = CPU_BATCH if images.device.type == "cpu" else len(images)
    return torch.cat([encoder.grid(normalize_images(batch)) for batch in images.split(batch_size)])


def weights_digest(module: nn.Module) -> str:
    """A fingerprint of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# --- the cache file -----------------------------------------------------------------------------------------


def write_features(
    file: str | Path,
    fingerprints: dict[str, str],
    batches: Iterable[Tensor],
    encode: Callable[[Tensor], Tensor],
    size: int,
    description: str,
) -> None:
    """Encode `size` images batch by batch into an HDF5 file.

    The file has the dataset `features`, float16 (size, *shape of an image's features), and `fingerprints` as
    its attributes, by which `is_up_to_date` knows it again.

    Args:
        batches: what `encode` takes, in the order of the images.
        encode: a batch -> its features (N, ...).
        description: what is encoded, such as "train images".

    Raises:
        UserError: the disk has not enough space.
    """
    file, done = Path(file), 0
    progress = progress_bar(total=size, desc=f"encoding {description}", unit="image")
    with atomic_write(file) as tmp_path, h5py.File(tmp_path, "w") as cache, progress:
        cache.attrs.update(fingerprints)
        for batch in batches:
            features = encode(batch).half().cpu().numpy()
            if done == 0:
                needed = size * features[0].nbytes
                progress.write(f"features of {size} {description}: {needed / 1e9:.2f} GB in {file}")
                require_disk_space(file.parent, needed)
                stored = cache.create_dataset("features", (size, *features.shape[1:]), "float16")
            stored[done : done + len(features)] = features
            done += len(features)
            progress.update(len(features))


def is_up_to_date(file: str | Path, fingerprints: dict[str, str]) -> bool:
    """Whether the file is there and its fingerprints are these."""
    if not Path(file).is_file():
        return False
    with h5py.File(file, "r") as cache:
        return all(cache.attrs.get(name) == value for name, value in fingerprints.items())


def require_disk_space(folder: Path, needed: int) -> None:
    """Raise UserError unless `needed` bytes are free on the folder's disk."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: {free / 1e9:.2f} GB free, the features take {needed / 1e9:.2f} GB: free some disk "
            f"space, or give --cache_features False to encode the images anew in every epoch"
        )


# --- the attention model's encoder --------------------------------------------------------------------------


def cache_features(encoder: Encoder, data_folder: str | Path, split: str, device: torch.device) -> Path:
    """Encode each image of a prepared split once; return the HDF5 file with `features`, float16 (I, h, w, D).

    A file that is there and up to date is used as it is, any other is replaced.

    Raises:
        UserError: the disk has not enough space.
    """
    file = _cache_file(encoder, data_folder, split)
    fingerprints = _fingerprints(encoder, data_folder, split)
    if is_up_to_date(file, fingerprints):
        return file
    with h5py.File(Path(data_folder) / f"{split}_images.hdf5", "r") as stored:
        images, batch_size = stored["images"], 64
        batches = (
            torch.from_numpy(images[start : start + batch_size])
            for start in range(0, len(images), batch_size)
        )
        write_features(
            file,
            fingerprints,
            batches,
            lambda batch: encode_images(encoder, batch.to(device)),
            len(images),
            f"{split} images",
        )
    return file


def cached_features(encoder: Encoder, data_folder: str | Path, split: str) -> Path | None:
    """The HDF5 file that `cache_features` wrote of this encoder and these images, if there is one."""
    file = _cache_file(encoder, data_folder, split)
    if file.is_file() and is_up_to_date(file, _fingerprints(encoder, data_folder, split)):
        return file
    return None


def _cache_file(encoder: Encoder, data_folder: str | Path, split: str) -> Path:
    return Path(data_folder) / f"{split}_features_{encoder.name}.hdf5"


def _fingerprints(encoder: Encoder, data_folder: str | Path, split: str) -> dict[str, str]:
    with h5py.File(Path(data_folder) / f"{split}_images.hdf5", "r") as images:
        # "pictures" is what files on users' disks have
        return {"weights": weights_digest(encoder), "pictures": images.attrs["digest"]}

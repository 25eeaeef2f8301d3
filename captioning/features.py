"""A frozen encoder's output, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import h5py
import torch

from utils import UserError, atomic_write, progress_bar


def weights_digest(module: torch.nn.Module) -> str:
    """A fingerprint of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def cached_features(encoder, data_folder: str | Path, split: str) -> Path | None:
    """The HDF5 file with this encoder's features of these images, if there is one."""
    folder = Path(data_folder)
    file = folder / f"{split}_features_{encoder.name}.hdf5"
    if not file.is_file():
        return None
    with h5py.File(file, "r") as cache:
        key = _cache_key(encoder, folder, split)
        return file if all(cache.attrs.get(name) == value for name, value in key.items()) else None


def _cache_key(encoder, folder: Path, split: str) -> dict[str, str]:
    with h5py.File(folder / f"{split}_images.hdf5", "r") as images:
        return {"weights": weights_digest(encoder), "pictures": images.attrs["digest"]}


def cache_features(encoder, data_folder: str | Path, split: str, device: torch.device) -> Path:
    """Encode each image of a split once; return the HDF5 file with `features`, float16 (I, h, w, D),
    native grid.

    The file carries fingerprints of the encoder's weights and of the images. One whose fingerprints fit is
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
    with h5py.File(folder / f"{split}_images.hdf5", "r") as stored_images:
        images = stored_images["images"]
        grid = encoder.encode(torch.from_numpy(images[:1]).to(device))[0]
        needed = 2 * grid.numel() * len(images)  # bytes
        free = shutil.disk_usage(folder).free
        print(f"features of {len(images)} {split} images: {needed / 1e9:.2f} GB in {file}")
        if needed > free:
            raise UserError(
                f"{folder}: {free / 1e9:.2f} GB free, the features take {needed / 1e9:.2f} GB: make room, or "
                f"give --cache_features False to encode anew in every epoch"
            )
        with atomic_write(file) as tmp_path, h5py.File(tmp_path, "w") as cache:
            cache.attrs.update(_cache_key(encoder, folder, split))
            shape = (len(images), *grid.shape)
            stored = cache.create_dataset("features", shape, "float16")
            with progress_bar(total=len(images), desc=f"encoding {split} images", unit="image") as progress:
                for start in range(0, len(images), batch_size):
                    batch = torch.from_numpy(images[start : start + batch_size]).to(device)
                    stored[start : start + len(batch)] = encoder.encode(batch).half().cpu().numpy()
                    progress.update(len(batch))
    return file

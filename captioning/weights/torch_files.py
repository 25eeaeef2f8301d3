"""Files of torch.save from anywhere: what they hold, without running anything that they say."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from utils import UserError, require_regular_file

DEEPEST = 50  # dictionaries and lists within each other; a checkpoint of ours has 6
MOST = 2_000_000  # values in all; a checkpoint has 20,000, and two for each word of its vocabulary


def load_torch_file(path: str | Path, missing: str = "no such file", mmap: bool = False) -> object:
    """What `torch.save` wrote, on the CPU: tensors and plain values, in as much memory as the file is large.

    Args:
        missing: what is said where there is no such file.
        mmap: leave the tensors' values on the disk until they are used.

    Raises:
        UserError: no such file; an archive that is compressed, or whose parts overlap; values nested without
            end; tensors that claim more memory than they have. ValueError: no file of torch's, or one that
            names more than tensors and plain values.
    """
    require_regular_file(path, missing)
    try:
        check_archive(path, checksums=not mmap)  # torch does not look at them
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # pickle, zipfile and torch each fail in their own ways
        raise ValueError(f"{path}: no file of torch.save with tensors and plain values alone") from error
    problem = find_excess(content)
    if problem:
        raise UserError(f"{path}: {problem}, as no checkpoint has; it is damaged, or made to do harm")
    return content


def check_archive(path: str | Path, checksums: bool = False) -> None:
    """Where the file is a zip archive, check that it takes no more memory than it is large.

    torch.save stores its records as they are; one that is compressed may be of a kilobyte and become ten
    gigabytes as soon as it is read.

    Args:
        checksums: compare those of the records too.

    Raises:
        UserError: it would take more, or is damaged. BadZipFile, and what else zipfile raises.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        packed = next((record for record in records if record.compress_type != zipfile.ZIP_STORED), None)
        if packed:
            raise UserError(
                f"{path}: refused, as its {packed.filename} is compressed, which torch.save never does; if "
                f"you trust it, load it with torch and save it anew"
            )
        if sum(record.file_size for record in records) > os.path.getsize(path):
            raise UserError(f"{path}: damaged (its records are larger than the file); copy it anew")
        damaged = archive.testzip() if checksums else None
    if damaged:
        raise UserError(f"{path}: damaged ({damaged} has another checksum); copy it or train again")


def find_excess(content: object) -> str | None:
    """What of the values asks for more than they are: a phrase; None where nothing does."""
    waiting, count = [([content], 0)], 0
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, Tensor):
            if not _is_plain(value):
                return "a tensor that is not plain, or larger than its content"
            continue
        parts = [*value, *value.values()] if isinstance(value, dict) else [*value]
        count += len(parts)
        if depth > DEEPEST:
            return f"values nested more than {DEEPEST} deep"
        if count > MOST:
            return f"more than {MOST} values"
        waiting += [(part, depth + 1) for part in parts if isinstance(part, HOLDING_MORE)]
    return None


HOLDING_MORE = (dict, list, tuple, set, frozenset, Tensor)


def _is_plain(tensor: Tensor) -> bool:
    """Whether its values are in memory, each once: a view may repeat one of them a million million times."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()

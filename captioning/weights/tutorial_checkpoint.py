"""Turns the published checkpoint of the 2018 PyTorch tutorial on image captioning into one of train.py.

That file is a pickle of whole models and optimizers. `captioning/weights/tutorial_pickle.py` reads it without
running anything in it; what remains are the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from captioning.data.prepared import END, PAD, START, UNK
from captioning.weights.tutorial_pickle import (
    ForeignName,
    Object,
    Storage,
    TensorRecord,
    printable,
    read_torch_file,
    require,
)
from models import ENCODED_SIZE, ENCODERS, DecoderWithAttention, Encoder
from utils import UserError

IMAGE_SIZE = 256  # pixels, as the tutorial prepares images


def read_tutorial_checkpoint(path: str | Path, word_map: dict[str, int] | None) -> dict:
    """The tutorial's checkpoint as one of train.py: settings, word_map, data, history, encoder, decoder.

    The weights are float32 on the CPU, `num_batches_tracked` int64. `history` has one line, with the epoch
    and the tutorial's BLEU-4 as `teacher_forced_bleu4`: it was computed with teacher forcing, so it says
    little about the captions that the model generates.

    Args:
        word_map: the content of the tutorial's WORDMAP_*.json.

    Raises:
        UserError: the file is not such a checkpoint, is damaged, or names a function or class that such a
            checkpoint does not need; the word map is missing or does not fit.
    """
    try:
        with open(path, "rb") as stream:
            content, read_storage = read_torch_file(stream)
            return _convert(content, read_storage, word_map, path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except ForeignName as error:
        raise UserError(
            f"{path}: asks for {error}, which no tutorial checkpoint needs: refused, nothing of it was run"
        ) from None
    except (UserError, PermissionError):
        raise
    except Exception as error:  # damage makes zipfile, pickletools and torch raise nearly anything
        reason = printable(str(error) if type(error) is ValueError else f"{type(error).__name__} {error}")
        raise UserError(f"{path}: not a checkpoint of train.py or of the tutorial ({reason})") from None


def _convert(
    content: object,
    read_storage: Callable[[Storage], bytes],
    word_map: dict[str, int] | None,
    path: str | Path,
) -> dict:
    """The checkpoint of train.py with the weights, settings and history of the records `content`."""
    for part, kind in (("encoder", Object), ("decoder", Object), ("epoch", int), ("bleu-4", (int, float))):
        if not isinstance(content, dict) or not isinstance(content.get(part), kind):
            raise ValueError(f"it has no {part}")
    grid = require(int, content["encoder"].state.get("enc_image_size", ENCODED_SIZE))
    if grid != ENCODED_SIZE:
        raise UserError(f"{path}: attends to {grid} x {grid} pixels, not to {ENCODED_SIZE} x {ENCODED_SIZE}")
    encoder = {
        "network." + name.removeprefix("resnet."): r for name, r in _weights(content["encoder"]).items()
    }
    encoder_name, encoder_names = _identify_encoder(encoder, path)

    decoder = _weights(content["decoder"])
    vocab_size, emb_dim = decoder["embedding.weight"].shape
    attention_dim, encoder_dim = decoder["attention.encoder_att.weight"].shape
    decoder_dim = decoder["decode_step.weight_hh"].shape[1]
    dropout = float(content["decoder"].state["_modules"]["dropout"].state["p"])
    if not 0 <= dropout < 1 or not 0 <= content["epoch"] < 2**31:
        raise ValueError("its dropout or epoch is damaged")
    with torch.device("meta"):  # shapes without weights
        expected = DecoderWithAttention(attention_dim, emb_dim, decoder_dim, vocab_size, encoder_dim)
    if not _fits(decoder, expected):
        raise ValueError("its decoder's weights do not fit each other")
    _check_word_map(word_map, vocab_size, path)
    return {
        "settings": {
            "encoder_name": encoder_name,
            "encoder_weights": "imagenet",  # what the tutorial's training starts from
            "emb_dim": emb_dim,
            "attention_dim": attention_dim,
            "decoder_dim": decoder_dim,
            "dropout": dropout,
            "attention": "soft",
            "fine_tune_encoder": content.get("encoder_optimizer") is not None,
        },
        "word_map": word_map,
        "data": {"settings": {"image_size": IMAGE_SIZE}, "inputs": {}},
        # the tutorial counts epochs from 0
        "history": [{"epoch": content["epoch"] + 1, "teacher_forced_bleu4": float(content["bleu-4"])}],
        "encoder": {
            name: _tensor(encoder[name], read_storage) if name in encoder else torch.tensor(0)
            for name in encoder_names
        },
        "decoder": {name: _tensor(record, read_storage) for name, record in decoder.items()},
    }


def _weights(module: Object) -> dict[str, TensorRecord]:
    """Parameters and buffers of a module and its submodules, named as in a state_dict."""
    weights = {}
    waiting, seen = [("", module)], set()
    while waiting:
        prefix, module = waiting.pop()
        if id(module) in seen or len(prefix) > 200:  # in itself, or nested without end
            raise ValueError("its modules are damaged")
        seen.add(id(module))
        for name, record in (module.state["_parameters"] | module.state["_buffers"]).items():
            if record is not None:
                weights[prefix + require(str, name)] = require(TensorRecord, record)
        for name, child in module.state["_modules"].items():
            waiting.append((f"{prefix}{require(str, name)}.", require(Object, child)))
    return weights


def _identify_encoder(records: dict[str, TensorRecord], path: str | Path) -> tuple[str, list[str]]:
    """The ResNet's name and the names in its state_dict."""
    resnets = [name for name in ENCODERS if "res" in name]
    for name in resnets:
        with torch.device("meta"):
            expected = Encoder(name)
        if _fits(records, expected):
            return name, list(expected.state_dict())
    raise UserError(f"{path}: its encoder is none of {', '.join(resnets)}")


def _fits(records: dict[str, TensorRecord], module: nn.Module) -> bool:
    """Whether the records are the module's weights; before torch 0.4.1 there was no num_batches_tracked."""
    shapes = {name: tuple(weight.shape) for name, weight in module.state_dict().items()}
    found = {name: record.shape for name, record in records.items()}
    lacking = shapes.keys() - found.keys()
    return shapes | found == shapes and all(name.endswith(".num_batches_tracked") for name in lacking)


def _check_word_map(word_map: dict[str, int] | None, vocab_size: int, path: str | Path) -> None:
    if word_map is None:
        raise UserError(
            f"{path}: the tutorial keeps its word map in a file of its own: give that WORDMAP_*.json with "
            f"--word_map"
        )
    if not isinstance(word_map, dict) or not all(isinstance(index, int) for index in word_map.values()):
        raise UserError(
            f"--word_map for {path} is not a word map: give the WORDMAP_*.json that belongs to it"
        )
    if len(word_map) != vocab_size or set(word_map.values()) != set(range(vocab_size)):
        raise UserError(
            f"--word_map has {len(word_map)} words where {path} has {vocab_size}, numbered from 0 on: "
            f"give the WORDMAP_*.json that belongs to it"
        )
    lacking = [word for word in (PAD, UNK, START, END) if word not in word_map]
    if lacking:
        raise UserError(
            f"--word_map lacks {', '.join(lacking)}: give the WORDMAP_*.json that belongs to {path}"
        )


def _tensor(record: TensorRecord, read_storage: Callable[[Storage], bytes]) -> Tensor:
    """The tensor of a record: float32, or int64 where it is a count."""
    data = bytearray(read_storage(record.storage))
    if len(data) != record.storage.numel * record.storage.dtype.itemsize:
        raise ValueError("it is cut short, or its storages are damaged")
    flat = torch.frombuffer(data, dtype=record.storage.dtype)
    dtype = torch.float32 if record.storage.dtype.is_floating_point else torch.int64
    tensor = flat.as_strided(record.shape, record.stride, record.offset).to(dtype)
    return tensor.clone(memory_format=torch.contiguous_format)

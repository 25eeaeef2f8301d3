"""Reads the published checkpoint of the 2018 PyTorch tutorial on image captioning, without running it.

That file is a pickle of whole models and optimizers: unpickled the usual way, it may run any function that
it names. Here nothing is unpickled: the instructions are followed with records in place of objects, so that
no class is looked up, no function called and no attribute set, and a name that such a checkpoint does not
need is refused. What remains are the weights, which become a checkpoint of train.py.

Formats: torch.save of torch 0.4 to 1.5 (pickles, then raw storages) and from 1.6 on (a zip archive).
"""

from __future__ import annotations

import io
import math
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from captioning.annotations import END, PAD, START, UNK
from models import ENCODED_SIZE, ENCODERS, DecoderWithAttention, Encoder
from utils import UserError

IMAGE_SIZE = 256  # pixels, as the tutorial prepares images
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a file of torch before 1.6
LEGACY_PROTOCOL = 1001  # second pickle
MOST_INSTRUCTIONS = 1_000_000  # of a pickle; a ResNet-101 and both optimizers take 70,000
CONSTANTS = (  # instructions that push a number or a text
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING",
)  # fmt: skip

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
}
STORAGE_TYPES = {
    f"{module}.{name}": dtype for module in ("torch", "torch.cuda") for name, dtype in STORAGES.items()
}
DICTIONARIES = ("collections.OrderedDict", "collections.defaultdict")
TENSOR = "torch._utils._rebuild_tensor_v2"
PARAMETERS = ("torch._utils._rebuild_parameter", "torch.nn.parameter.Parameter")  # the latter: torch 0.4
OTHERS = (
    "models.Encoder",
    "models.Attention",
    "models.DecoderWithAttention",
    "torch.nn.backends.thnn._get_thnn_function_backend",  # `_backend` of every module in early torch
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.activation.Sigmoid",
    "torch.nn.modules.activation.Softmax",
    "torch.nn.modules.batchnorm.BatchNorm2d",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.conv.Conv2d",
    "torch.nn.modules.dropout.Dropout",
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.pooling.AdaptiveAvgPool2d",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.rnn.LSTMCell",
    "torch.nn.modules.sparse.Embedding",
    "torch.optim.adam.Adam",
    "torchvision.models.resnet.BasicBlock",
    "torchvision.models.resnet.Bottleneck",
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("dict", "set")),
)
KNOWN_NAMES = frozenset((*STORAGE_TYPES, *DICTIONARIES, TENSOR, *PARAMETERS, *OTHERS))


def read_tutorial_checkpoint(path: str | Path, word_map: dict[str, int] | None) -> dict:
    """The tutorial's checkpoint as one of train.py: settings, word_map, data, history, encoder, decoder.

    The weights are float32 on the CPU, `num_batches_tracked` int64. `history` has one line, with the epoch
    and the tutorial's BLEU-4 as `teacher_forced_bleu4`: the true words were put in at every step, so it says
    little about the captions that the model makes by itself.

    Args:
        word_map: the content of the tutorial's WORDMAP_*.json.

    Raises:
        UserError: not such a checkpoint, a damaged one, or one that asks for anything foreign; no word map,
            or one that does not fit.
    """
    try:
        with open(path, "rb") as stream:
            is_zip = stream.read(4) == b"PK\x03\x04"
            content, read_storage = _read_zip(stream) if is_zip else _read_legacy(stream)
            return _convert(content, read_storage, word_map, path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except _ForeignName as error:
        raise UserError(
            f"{path}: asks for {error}, which no tutorial checkpoint needs: refused, nothing of it was run"
        ) from None
    except (UserError, PermissionError):
        raise
    except Exception as error:  # damage makes zipfile, pickletools and torch raise nearly anything
        reason = _printable(str(error) if type(error) is ValueError else f"{type(error).__name__} {error}")
        raise UserError(f"{path}: not a checkpoint of train.py or of the tutorial ({reason})") from None


# --- pickles ------------------------------------------------------------------------------------------------


class _ForeignName(Exception):
    """The file names something that is not in KNOWN_NAMES."""


@dataclass(eq=False)
class _Name:
    """A class or function that the file names."""

    path: str


@dataclass(eq=False)
class _Object:
    """What would have come of calling `path`."""

    path: str
    state: dict = field(default_factory=dict)


@dataclass(eq=False)
class _Storage:
    key: str
    dtype: torch.dtype
    numel: int


@dataclass(eq=False)
class _TensorRecord:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self):
        numbers = (self.offset, *self.shape, *self.stride)
        if not all(isinstance(number, int) and 0 <= number < 2**40 for number in numbers):
            raise ValueError("a tensor's shape is damaged")
        if len(self.shape) != len(self.stride) or len(self.shape) > 4 or 0 in self.shape:
            raise ValueError("a tensor's shape is damaged")
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride))
        if max(math.prod(self.shape), last + 1) > self.storage.numel:
            raise ValueError("a tensor is larger than its storage")


def _read_pickle(stream: BinaryIO, storages: dict[str, _Storage]):
    """Follow the next pickle of the stream: numbers, texts, lists, tuples, dictionaries and records.

    The storages that it names are added to `storages`, by their keys.
    """
    stack: list = []
    marks: list[int] = []
    memo: dict[int, object] = {}

    def pop_to_mark() -> list:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count > MOST_INSTRUCTIONS:
            raise ValueError("its pickle is too long")
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode.name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                _as(list, stack[-2]).append(stack.pop())
            case "APPENDS":
                items = pop_to_mark()
                _as(list, stack[-1]).extend(items)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _as(dict, stack[-1])[_as_key(key)] = value
            case "SETITEMS":
                items = pop_to_mark()
                for key, value in zip(items[::2], items[1::2], strict=True):
                    _as(dict, stack[-1])[_as_key(key)] = value
            case "EMPTY_SET":
                stack.append(_Object("builtins.set"))
            case "ADDITEMS":
                pop_to_mark()  # names of buffers that are not saved: of no use here
                _as(_Object, stack[-1])
            case "GLOBAL":
                stack.append(_known_name(*argument.split(" ", 1)))  # "module name"
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_known_name(_as(str, module), _as(str, name)))
            case "REDUCE" | "NEWOBJ":
                arguments = stack.pop()
                stack.append(_called(_as(_Name, stack.pop()).path, _as(tuple, arguments)))
            case "BUILD":
                state = stack.pop()
                _as(_Object, stack[-1]).state = _as(dict, state)
            case "BINPERSID":
                stack.append(_persistent(_as(tuple, stack.pop()), storages))
            case constant if constant in CONSTANTS:
                stack.append(argument)
            case _:
                raise ValueError(f"it has a pickle instruction {opcode.name}")


def _as(kind: type, value):
    if not isinstance(value, kind):
        raise ValueError("its pickle is damaged")
    return value


def _as_key(value):
    """A key that is hashed at once: nested tuples can take forever."""
    return _as((str, int, _TensorRecord), value)


def _known_name(module: str, name: str) -> _Name:
    path = f"{module}.{name}"
    if path not in KNOWN_NAMES:
        raise _ForeignName(_printable(path))
    return _Name(path)


def _called(path: str, arguments: tuple):
    """The record of a call: nothing is called."""
    if path in DICTIONARIES:
        return {}
    if path == TENSOR:
        storage, offset, shape, stride = arguments[:4]
        return _TensorRecord(_as(_Storage, storage), offset, _as(tuple, shape), _as(tuple, stride))
    if path in PARAMETERS:
        return _as(_TensorRecord, arguments[0])
    return _Object(path)


def _persistent(identifier: tuple, storages: dict[str, _Storage]) -> _Name | _Storage:
    """("module", class, file, source) or ("storage", type, key, location, numel[, None])."""
    if identifier[0] == "module":
        return _as(_Name, identifier[1])
    kind, storage_type, key, _, numel, *view = identifier
    if kind != "storage" or view not in ([], [None]):
        raise ValueError("it has a storage of an unknown kind")
    storage = _Storage(_as(str, key), STORAGE_TYPES[_as(_Name, storage_type).path], _as(int, numel))
    earlier = storages.setdefault(storage.key, storage)
    if (earlier.dtype, earlier.numel) != (storage.dtype, storage.numel):
        raise ValueError("a storage is given two sizes")
    return earlier


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text[:120])


# --- files --------------------------------------------------------------------------------------------------


def _read_zip(stream: BinaryIO) -> tuple[object, Callable[[_Storage], bytes]]:
    """The object in a zip archive NAME/data.pkl, NAME/data/KEY, NAME/byteorder, and a reader of storages."""
    archive = zipfile.ZipFile(stream)
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("a zip archive that torch.save did not write")
    root = pickles[0].removesuffix("data.pkl")

    def read(name: str) -> bytes:
        if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:  # torch never packs; a bomb would
            raise ValueError("its parts are compressed")
        return archive.read(name)

    if root + "byteorder" in archive.namelist():
        _check_byte_order(read(root + "byteorder") == b"little")
    content = _read_pickle(io.BytesIO(read(pickles[0])), {})
    return content, lambda storage: read(f"{root}data/{storage.key}")


def _read_legacy(stream: BinaryIO) -> tuple[object, Callable[[_Storage], bytes]]:
    """The object in a file of pickles (magic number, protocol, machine, object, keys) and raw storages."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(257)
    if stream.read(5) == b"ustar":
        raise ValueError("a tar archive: give the file in it")
    stream.seek(0)
    if _read_pickle(stream, {}) != LEGACY_MAGIC or _read_pickle(stream, {}) != LEGACY_PROTOCOL:
        raise ValueError("it does not begin as torch.save does")
    _check_byte_order(_read_pickle(stream, {})["little_endian"])
    storages: dict[str, _Storage] = {}
    content = _read_pickle(stream, storages)
    keys = _read_pickle(stream, {})
    places = {}
    for key in keys:
        storage = storages[_as(str, key)]
        numel = int.from_bytes(stream.read(8), "little")
        places[key] = stream.tell()
        end = places[key] + numel * storage.dtype.itemsize
        if numel != storage.numel or end > size:
            raise ValueError("it is cut short, or its storages are damaged")
        stream.seek(end)

    def read_storage(storage: _Storage) -> bytes:
        stream.seek(places[storage.key])
        return stream.read(storage.numel * storage.dtype.itemsize)

    return content, read_storage


def _check_byte_order(little_endian: bool) -> None:
    if not little_endian:
        raise ValueError("it was saved on a big-endian machine: load it and save it again on a usual one")


# --- the models ---------------------------------------------------------------------------------------------


def _convert(
    content: object,
    read_storage: Callable[[_Storage], bytes],
    word_map: dict[str, int] | None,
    path: str | Path,
) -> dict:
    for part, kind in (("encoder", _Object), ("decoder", _Object), ("epoch", int), ("bleu-4", (int, float))):
        if not isinstance(content, dict) or not isinstance(content.get(part), kind):
            raise ValueError(f"it has no {part}")
    grid = _as(int, content["encoder"].state.get("enc_image_size", ENCODED_SIZE))
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
            "encoder_weights": "imagenet",  # where the tutorial's training begins
            "emb_dim": emb_dim,
            "attention_dim": attention_dim,
            "decoder_dim": decoder_dim,
            "dropout": dropout,
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


def _weights(module: _Object) -> dict[str, _TensorRecord]:
    """Parameters and buffers of a module and those in it, named as in a state_dict."""
    weights = {}
    waiting, seen = [("", module)], set()
    while waiting:
        prefix, module = waiting.pop()
        if id(module) in seen or len(prefix) > 200:  # in a circle, or a tree that grows without end
            raise ValueError("its modules are damaged")
        seen.add(id(module))
        for name, record in (module.state["_parameters"] | module.state["_buffers"]).items():
            if record is not None:
                weights[prefix + _as(str, name)] = _as(_TensorRecord, record)
        for name, child in module.state["_modules"].items():
            waiting.append((f"{prefix}{_as(str, name)}.", _as(_Object, child)))
    return weights


def _identify_encoder(records: dict[str, _TensorRecord], path: str | Path) -> tuple[str, list[str]]:
    """The ResNet's name and the names in its state_dict."""
    resnets = [name for name in ENCODERS if "res" in name]
    for name in resnets:
        with torch.device("meta"):
            expected = Encoder(name)
        if _fits(records, expected):
            return name, list(expected.state_dict())
    raise UserError(f"{path}: its encoder is none of {', '.join(resnets)}")


def _fits(records: dict[str, _TensorRecord], module: nn.Module) -> bool:
    """Whether the records are the module's weights; counts of batches may lack (before torch 0.4.1)."""
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
        raise UserError(f"--word_map for {path} is no word map: give the WORDMAP_*.json that belongs to it")
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


def _tensor(record: _TensorRecord, read_storage: Callable[[_Storage], bytes]) -> Tensor:
    """The tensor of a record: float32, or int64 where it is a count."""
    data = bytearray(read_storage(record.storage))
    if len(data) != record.storage.numel * record.storage.dtype.itemsize:
        raise ValueError("it is cut short, or its storages are damaged")
    flat = torch.frombuffer(data, dtype=record.storage.dtype)
    dtype = torch.float32 if record.storage.dtype.is_floating_point else torch.int64
    tensor = flat.as_strided(record.shape, record.stride, record.offset).to(dtype)
    return tensor.clone(memory_format=torch.contiguous_format)

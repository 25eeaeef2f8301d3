"""Reads the pickles in a file of torch.save without running them.

Unpickled the usual way, a file may run any function that it names. Here its instructions are followed with
records in place of objects: no class is looked up, no function called and no attribute set, and a name that
the tutorial's checkpoint does not need is refused.

Formats: torch.save of torch 0.4 to 1.5 (pickles, then raw storages) and from 1.6 on (a zip archive).
"""

from __future__ import annotations

import io
import math
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import BinaryIO

import torch

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

# --- pickles ------------------------------------------------------------------------------------------------


class ForeignName(Exception):
    """The file names something that is not in KNOWN_NAMES."""


@dataclass(eq=False)
class _Name:
    """A class or function that the file names."""

    path: str


@dataclass(eq=False)
class Object:
    """Stands for the result of calling `path`, which is not called."""

    path: str
    state: dict = field(default_factory=dict)


@dataclass(eq=False)
class Storage:
    key: str
    dtype: torch.dtype
    numel: int


@dataclass(eq=False)
class TensorRecord:
    storage: Storage
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


class _Stack(list):
    """The values of a pickle that is being read, and the marks that it has set among them."""

    def __init__(self):
        super().__init__()
        self.marks: list[int] = []

    def pop_to_mark(self) -> list:
        start = self.marks.pop()
        items = self[start:]
        del self[start:]
        return items


EMPTY = {  # instructions that push a constant or an empty container
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": lambda: Object("builtins.set"),
}


def _read_pickle(stream: BinaryIO, storages: dict[str, Storage]):
    """Follow the next pickle of the stream: numbers, texts, lists, tuples, dictionaries and records.

    The storages that it names are added to `storages`, by their keys.
    """
    stack, memo = _Stack(), {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count > MOST_INSTRUCTIONS:
            raise ValueError("its pickle is too long")
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                stack.marks.append(len(stack))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_known_name(*argument.split(" ", 1)))  # "module name"
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_known_name(require(str, module), require(str, name)))
            case "REDUCE" | "NEWOBJ":
                arguments = stack.pop()
                stack.append(_called(require(_Name, stack.pop()).path, require(tuple, arguments)))
            case "BUILD":
                state = stack.pop()
                require(Object, stack[-1]).state = require(dict, state)
            case "BINPERSID":
                stack.append(_persistent(require(tuple, stack.pop()), storages))
            case name if name in CONSTANTS:
                stack.append(argument)
            case name if name in EMPTY:
                stack.append(EMPTY[name]())
            case name:
                _fill_container(name, stack)


def _fill_container(instruction: str, stack: _Stack) -> None:
    """Follow an instruction that puts values of the stack into a tuple, list, dictionary or set."""
    match instruction:
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
            size = int(instruction[-1])
            stack[-size:] = [tuple(stack[-size:])]
        case "TUPLE":
            stack.append(tuple(stack.pop_to_mark()))
        case "APPEND":
            item = stack.pop()
            require(list, stack[-1]).append(item)
        case "APPENDS":
            items = stack.pop_to_mark()
            require(list, stack[-1]).extend(items)
        case "SETITEM":
            value, key = stack.pop(), stack.pop()
            require(dict, stack[-1])[_require_key(key)] = value
        case "SETITEMS":
            items = stack.pop_to_mark()
            for key, value in zip(items[::2], items[1::2], strict=True):
                require(dict, stack[-1])[_require_key(key)] = value
        case "ADDITEMS":
            stack.pop_to_mark()  # names of buffers that are not saved: not needed here
            require(Object, stack[-1])
        case _:
            raise ValueError(f"it has a pickle instruction {instruction}")


def require(kind: type | tuple[type, ...], value):
    """`value`, if it is of this kind. Raises ValueError otherwise."""
    if not isinstance(value, kind):
        raise ValueError("its pickle is damaged")
    return value


def _require_key(value):
    """A key that can be hashed at once; nested tuples can take forever."""
    return require((str, int, TensorRecord), value)


def _known_name(module: str, name: str) -> _Name:
    path = f"{module}.{name}"
    if path not in KNOWN_NAMES:
        raise ForeignName(printable(path))
    return _Name(path)


def _called(path: str, arguments: tuple):
    """What stands for the result of a call; nothing is called."""
    if path in DICTIONARIES:
        return {}
    if path == TENSOR:
        storage, offset, shape, stride = arguments[:4]
        return TensorRecord(require(Storage, storage), offset, require(tuple, shape), require(tuple, stride))
    if path in PARAMETERS:
        return require(TensorRecord, arguments[0])
    return Object(path)


def _persistent(identifier: tuple, storages: dict[str, Storage]) -> _Name | Storage:
    """("module", class, file, source) or ("storage", type, key, location, numel[, None])."""
    if identifier[0] == "module":
        return require(_Name, identifier[1])
    kind, storage_type, key, _, numel, *view = identifier
    if kind != "storage" or view not in ([], [None]):
        raise ValueError("it has a storage of an unknown kind")
    storage = Storage(
        require(str, key), STORAGE_TYPES[require(_Name, storage_type).path], require(int, numel)
    )
    earlier = storages.setdefault(storage.key, storage)
    if (earlier.dtype, earlier.numel) != (storage.dtype, storage.numel):
        raise ValueError("a storage is given two sizes")
    return earlier


def printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text[:120])


# --- files --------------------------------------------------------------------------------------------------


def read_torch_file(stream: BinaryIO) -> tuple[object, Callable[[Storage], bytes]]:
    """The saved object as records, and a function that reads the bytes of a storage from the stream.

    Raises:
        ForeignName: the file asks for a name that is not in KNOWN_NAMES.
        Exception: of nearly any kind, where the file is damaged.
    """
    is_zip = stream.read(4) == b"PK\x03\x04"
    return _read_zip(stream) if is_zip else _read_legacy(stream)


def _read_zip(stream: BinaryIO) -> tuple[object, Callable[[Storage], bytes]]:
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


def _read_legacy(stream: BinaryIO) -> tuple[object, Callable[[Storage], bytes]]:
    """The object in a file of pickles (magic number, protocol, machine, object, keys) and raw storages."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(257)
    if stream.read(5) == b"ustar":
        raise ValueError("a tar archive: give the file in it")
    stream.seek(0)
    if _read_pickle(stream, {}) != LEGACY_MAGIC or _read_pickle(stream, {}) != LEGACY_PROTOCOL:
        raise ValueError("it does not begin as torch.save does")
    _check_byte_order(_read_pickle(stream, {})["little_endian"])
    storages: dict[str, Storage] = {}
    content = _read_pickle(stream, storages)
    keys = _read_pickle(stream, {})
    places = {}
    for key in keys:
        storage = storages[require(str, key)]
        numel = int.from_bytes(stream.read(8), "little")
        places[key] = stream.tell()
        end = places[key] + numel * storage.dtype.itemsize
        if numel != storage.numel or end > size:
            raise ValueError("it is cut short, or its storages are damaged")
        stream.seek(end)

    def read_storage(storage: Storage) -> bytes:
        stream.seek(places[storage.key])
        return stream.read(storage.numel * storage.dtype.itemsize)

    return content, read_storage


def _check_byte_order(little_endian: bool) -> None:
    if not little_endian:
        raise ValueError("it was saved on a big-endian machine: load it and save it again on a usual one")

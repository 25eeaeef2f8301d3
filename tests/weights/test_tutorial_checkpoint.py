"""Files like the 2018 tutorial's checkpoint are read exactly; files that name anything else are refused."""

import functools
import json
import os
import pickle
import random
import zipfile
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_one_line
from torch import nn
from tutorial_files import (
    VOCABULARY,
    WORD_MAP,
    Call,
    Encoder,
    _get_thnn_function_backend,
    make_tutorial,
    save,
    tutorial_modules,
)

import convert_checkpoint
from captioning.weights import tutorial_checkpoint, tutorial_pickle
from captioning.weights.checkpoints import decoder_from, encoder_from
from captioning.weights.tutorial_checkpoint import read_tutorial_checkpoint
from models import Encoder as OurEncoder
from utils import UserError

FORMATS = ("legacy", "zip")


@pytest.fixture(scope="module")
def tutorial() -> dict:
    return make_tutorial()


def save_raw(pickled: bytes, path, file_format):
    """A file whose object is the given pickle; no storages."""
    if file_format == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
    else:
        parts = [tutorial_pickle.LEGACY_MAGIC, 1001, {"little_endian": True}, []]
        parts = [pickle.dumps(part, protocol=2) for part in parts]
        path.write_bytes(b"".join([*parts[:3], pickled, parts[3]]))
    return path


def save_as_torch_04(content, path):
    """As torch 0.4 did on a GPU: legacy form, `_backend`, Parameter called, no counts of batches."""
    modules = [*content["encoder"].modules(), *content["decoder"].modules()]
    counts = {}
    for module in modules:
        module._backend = Call(_get_thnn_function_backend)
        counts[module] = module._buffers.pop("num_batches_tracked", None)
    with tutorial_modules() as patch:
        as_called = lambda self, protocol: (nn.Parameter, (self.data, self.requires_grad))  # noqa: E731
        patch.setattr(nn.Parameter, "__reduce_ex__", as_called)
        torch.save(content, path, _use_new_zipfile_serialization=False)
    for module in modules:
        del module._backend
        if counts[module] is not None:
            module._buffers["num_batches_tracked"] = counts[module]
    data = path.read_bytes()
    assert b"thnn" in data and b"ctorch.nn.parameter\nParameter\n" in data
    data = data.replace(b"ctorch\nFloatStorage\n", b"ctorch.cuda\nFloatStorage\n")
    path.write_bytes(data.replace(b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0"))
    return path


@pytest.fixture(scope="module")
def files(tutorial, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("tutorial")
    return {
        "legacy": save(tutorial, folder / "legacy.pth.tar", "legacy"),
        "zip": save(tutorial, folder / "zip.pth.tar", "zip"),
        "protocol 4": save(tutorial, folder / "protocol4.pth.tar", "zip", pickle_protocol=4),
        "torch 0.4": save_as_torch_04(tutorial, folder / "torch04.pth.tar"),
    }


def refusal(path, word_map=WORD_MAP) -> str:
    with pytest.raises(UserError) as caught:
        read_tutorial_checkpoint(path, word_map)
    message = str(caught.value)
    assert str(path) in message and message.isprintable()  # so it is one line
    return message


# --- what is read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["legacy", "zip", "protocol 4", "torch 0.4"])
def test_weights_are_those_of_the_file(tutorial, files, name):
    checkpoint = read_tutorial_checkpoint(files[name], WORD_MAP)
    assert checkpoint["word_map"] == WORD_MAP
    assert checkpoint["settings"].items() >= {
        "encoder_name": "resnet18", "attention_dim": 12, "emb_dim": 10, "decoder_dim": 14, "dropout": 0.25,
        "attention": "soft",
    }.items()  # fmt: skip
    assert checkpoint["history"] == [{"epoch": 8, "teacher_forced_bleu4": 0.24}]
    for part, prefix in (("encoder", "network."), ("decoder", "")):
        expected = {
            prefix + key.removeprefix("resnet."): value for key, value in tutorial[part].state_dict().items()
        }
        assert checkpoint[part].keys() == expected.keys()
        for key, value in checkpoint[part].items():
            if name == "torch 0.4" and key.endswith("num_batches_tracked"):
                expected[key] = torch.tensor(0)
            assert torch.equal(value, expected[key]) and value.dtype == expected[key].dtype
            assert value.is_contiguous() and not value.requires_grad


def test_models_compute_as_the_originals(tutorial, files):
    checkpoint = read_tutorial_checkpoint(files["legacy"], WORD_MAP)
    encoder, decoder = encoder_from(checkpoint, "file"), decoder_from(checkpoint, "file")
    images, captions = torch.randn(3, 3, 64, 64), torch.randint(VOCABULARY, (3, 6))
    with torch.no_grad():
        encoding = tutorial["encoder"](images)
        torch.testing.assert_close(encoder(images), encoding, atol=1e-5, rtol=1e-5)
        scores, _, _, _, order = decoder(encoder.grid(images), captions, torch.full((3, 1), 6))
        expected = tutorial["decoder"](encoding, captions)[order]
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


def test_half_precision_and_odd_strides_become_plain_float32(tutorial, tmp_path):
    content = dict(tutorial, decoder_optimizer=None)
    with tutorial_modules():
        content["decoder"] = pickle.loads(pickle.dumps(tutorial["decoder"])).half()
    decoder = content["decoder"]
    decoder.fc.weight.data = decoder.fc.weight.data.t().contiguous().t()
    checkpoint = read_tutorial_checkpoint(save(content, tmp_path / "half", "legacy"), WORD_MAP)
    for key, value in decoder.state_dict().items():
        assert torch.equal(checkpoint["decoder"][key], value.float())
        assert checkpoint["decoder"][key].is_contiguous()


@pytest.mark.parametrize("name", ["resnet18", "resnet101", "wide_resnet50_2"])
def test_each_resnet_is_known_by_its_shapes(name):
    with torch.device("meta"):
        state = OurEncoder(name).state_dict()
    records = {key: SimpleNamespace(shape=tuple(value.shape)) for key, value in state.items()}
    assert tutorial_checkpoint._identify_encoder(records, "file") == (name, list(state))
    del records["network.0.weight"]
    with pytest.raises(UserError, match="none of"):
        tutorial_checkpoint._identify_encoder(records, "file")


def test_script_writes_a_checkpoint_of_ours(files, tmp_path, run_main):
    word_map, output = tmp_path / "WORDMAP.json", tmp_path / "new" / "tutorial.pth"
    word_map.write_text(json.dumps(WORD_MAP))
    done = run_main(
        convert_checkpoint, "--checkpoint", files["legacy"], "--word_map", word_map, "--output", output
    )
    assert done.returncode == 0, done.stderr
    assert "resnet18" in done.stdout and "0.2400" in done.stdout and "teacher-forced" in done.stdout
    checkpoint = torch.load(output, weights_only=True)
    expected = read_tutorial_checkpoint(files["zip"], WORD_MAP)
    for part in ("encoder", "decoder"):
        torch.testing.assert_close(checkpoint.pop(part), expected.pop(part), atol=0, rtol=0)
    assert checkpoint == expected


# --- what is refused ----------------------------------------------------------------------------------------


def test_word_maps(files):
    assert "--word_map" in refusal(files["zip"], None)
    smaller = {word: index for word, index in WORD_MAP.items() if index}
    assert f"has {VOCABULARY - 1} words" in refusal(files["zip"], smaller)
    without_unk = {"<UNK>" if word == "<unk>" else word: index for word, index in WORD_MAP.items()}
    assert "lacks <unk>" in refusal(files["zip"], without_unk)
    refusal(files["zip"], WORD_MAP | {"word1": 2})
    refusal(files["zip"], WORD_MAP | {"word1": "1"})


FOREIGN = {
    "os.system": (os.system, "touch {marker}"),
    "eval": (eval, "open({marker!r}, 'w')"),
    "getattr": (getattr, "text", "upper"),
    "torch.load": (torch.load, "{marker}"),
    "partial": (functools.partial, os.system, "touch {marker}"),
    "method": (Encoder.__init__, None),
}


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_functions_are_refused_and_not_run(tutorial, tmp_path, name, file_format):
    marker = tmp_path / "was_run"
    function, *arguments = FOREIGN[name]
    arguments = [
        argument.format(marker=str(marker)) if isinstance(argument, str) else argument
        for argument in arguments
    ]
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(2))])
    (parameter,) = optimizer.param_groups[0]["params"]
    optimizer.state[parameter] = {"step": torch.ones(()), "note": [{"deep": Call(function, *arguments)}]}
    content = {"epoch": 1, "bleu-4": 0.1, "decoder": tutorial["decoder"], "decoder_optimizer": optimizer}
    protocol = 4 if name == "method" else 2  # STACK_GLOBAL with a dotted name
    path = save(content, tmp_path / "evil.pth.tar", file_format, pickle_protocol=protocol)
    message = refusal(path)
    assert "nothing of it was run" in message
    module = {"builtins": "__builtin__"}.get(function.__module__, function.__module__)  # as Python 2 had it
    assert f"asks for {module}.{function.__qualname__}," in message
    assert not marker.exists()
    if name in ("os.system", "eval"):  # the file is as evil as it claims
        with tutorial_modules():
            torch.load(path, weights_only=False)
        assert marker.exists()


@pytest.mark.parametrize("file_format", FORMATS)
def test_handmade_pickles_are_refused_and_not_run(tmp_path, file_format):
    marker = tmp_path / "was_run"
    command = f"touch {marker}".encode()
    text = b"X" + len(command).to_bytes(4, "little") + command
    handmade = {
        "memoized names": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x86h\x00h\x01\x93" + text + b"\x85R.",
        "INST": b"(S'" + command + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\n" + text + b"o.",
        "extension": b"\x80\x02\x82\x01.",
    }
    for name, pickled in handmade.items():
        path = save_raw(pickled, tmp_path / name, file_format)
        message = refusal(path)
        assert not marker.exists()
        assert ("os.system" if name in ("memoized names", "OBJ") else "instruction") in message
    pickle.loads(handmade["memoized names"])
    assert marker.exists()


def test_handmade_pickles_of_known_names_do_nothing(tmp_path):
    """Names on the list, put to uses that no honest file has."""
    encoder = b"cmodels\nEncoder\n"
    handmade = {
        "class given attributes": encoder + b"}X\x05\0\0\0stateNsb.",
        "class attributes by slots": encoder + b"N}X\x08\0\0\0__init__Ns\x86b.",
        "tensor without a storage": b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00))tR.",
        "class as an argument of set": b"c__builtin__\nset\n" + encoder + b"\x85R.",
        "dictionary in itself": b"}q\x00X\x07\0\0\0encoderh\x00s.",
        "nested tuples as a key": b"})" + b"q\x00h\x00\x86" * 200 + b"Ns.",
        "object in itself": encoder + b")\x81q\x00}X\x08\0\0\0_modules}X\x01\0\0\0ah\x00ssb.",
        "deep": b"]" * 200_000 + b"a" * 199_999 + b".",
        "endless": b"]q\x00" + b"h\x00a" * 600_000 + b".",
        "no pickle": b"hello",
        "nothing": b"",
    }
    for name, pickled in handmade.items():
        refusal(save_raw(b"\x80\x02" + pickled, tmp_path / name, "zip"))


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize(
    "offset, size, stride",
    [(0, (101,), (1,)), (1, (100,), (1,)), (0, (10, 10), (1, 11)), (0, (2**20, 2**20), (0, 0)),
     (-1, (9,), (1,)), (0, (9,), (-1,)), (0, (2**70,), (0,)), (0, (0, 9), (9, 1)), (0, (9, 9), (1,)),
     (0, (1,) * 64, (1,) * 64), (0, ("9",), (1,))],
)  # fmt: skip
def test_tensors_beyond_their_storage(tmp_path, file_format, offset, size, stride):
    bytes_of_it = torch.zeros(100).untyped_storage()
    storage = torch.storage.TypedStorage(wrap_storage=bytes_of_it, dtype=torch.float32, _internal=True)
    tensor = Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())
    message = refusal(save({"decoder": tensor}, tmp_path / "file", file_format))
    assert "storage" in message or "shape" in message


@pytest.mark.parametrize("file_format", FORMATS)
def test_storages_without_their_bytes(tutorial, tmp_path, monkeypatch, file_format):
    monkeypatch.setattr(torch.storage.TypedStorage, "_size", lambda storage: 2**40)
    assert "storages are damaged" in refusal(save(tutorial, tmp_path / "file", file_format))


@pytest.mark.parametrize("name", FORMATS)
def test_truncated_files(files, tmp_path, name):
    data = files[name].read_bytes()
    for length in (0, 3, 1000, 60_000, len(data) // 2, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:length])
        assert "not a checkpoint" in refusal(tmp_path / "cut")


def test_damaged_bytes_are_refused_or_read(files, tmp_path):
    data = files["legacy"].read_bytes()
    draw = random.Random(0)
    outcomes = set()
    for _ in range(12):
        place = draw.randrange(80_000)  # in the pickles
        (tmp_path / "file").write_bytes(data[:place] + draw.randbytes(1) + data[place + 1 :])
        try:
            read_tutorial_checkpoint(tmp_path / "file", WORD_MAP)
            outcomes.add("read")
        except UserError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_other_files(tmp_path):
    assert "no such" in refusal(tmp_path / "absent")
    (tmp_path / "tar").write_bytes(bytes(257) + b"ustar" + bytes(300))
    assert "tar archive" in refusal(tmp_path / "tar")
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("notes.txt", "hello")
    assert "zip archive" in refusal(tmp_path / "zip")
    with zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
    assert "compressed" in refusal(tmp_path / "bomb")
    assert "no encoder" in refusal(save({"weights": torch.ones(2)}, tmp_path / "weights", "legacy"))
    big_endian = (
        (tmp_path / "weights").read_bytes().replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89")
    )
    (tmp_path / "big").write_bytes(big_endian)
    assert "big-endian" in refusal(tmp_path / "big")


def test_script_refuses_with_one_line(tutorial, tmp_path, run_main):
    marker, word_map = tmp_path / "was_run", tmp_path / "WORDMAP.json"
    word_map.write_text(json.dumps(WORD_MAP))
    content = dict(tutorial, decoder_optimizer=Call(os.system, f"touch {marker}"))
    path = save(content, tmp_path / "evil.pth.tar", "legacy")
    output = tmp_path / "output.pth"
    done = run_main(convert_checkpoint, "--checkpoint", path, "--word_map", word_map, "--output", output)
    assert_one_line(done, f"{os.system.__module__}.system")
    assert not done.stdout
    assert not marker.exists() and not output.exists()

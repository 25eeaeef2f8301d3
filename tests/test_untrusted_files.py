"""Files that are made to do harm: compressed archives, pipes and devices, values without end."""

import copy
import json
import os
import signal
import time
import warnings
import zipfile

import h5py
import numpy as np
import pytest
import torch
from conftest import assert_one_line

import caption
import caption_from_checkpoint
import create_input_files
import direct_caption
import eval as evaluation
import train
import train_model
import view_captions
from captioning.captioners.loading import load_captioner
from captioning.data.features import ResumableRowWriter
from captioning.data.fingerprints import is_whole
from captioning.data.images import natural_order
from captioning.data.prepared import Prepared, open_dataset
from captioning.data.submissions import coco_id, read_submission, write_submission
from captioning.data.text_files import load_embeddings
from captioning.weights.checkpoints import load_checkpoint, peek, read_checkpoint
from captioning.weights.pretrained import load_torch_file, read_weights
from captioning.weights.tutorial_checkpoint import read_tutorial_checkpoint
from utils import UserError, read_json, write_json


@pytest.fixture(autouse=True)
def no_hang():
    """Whoever waits for a pipe is interrupted."""

    def give_up(*_):
        raise TimeoutError("waited for ever")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refusal(read, *arguments) -> str:
    with pytest.raises(UserError) as error:
        read(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- archives -----------------------------------------------------------------------------------------------


def deflate(source, target) -> None:
    """A copy of an archive whose records are compressed."""
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as after:
        for name in before.namelist():
            after.writestr(name, before.read(name))


@pytest.fixture
def bomb(models, tmp_path, monkeypatch):
    """A checkpoint that torch would read, compressed; to load it is an error of the test."""
    deflate(models / "best_checkpoint.pth", tmp_path / "bomb.pth")
    assert torch.load(tmp_path / "bomb.pth", weights_only=True)["word_map"]

    def load(*_, **__):
        raise AssertionError("it was loaded")

    monkeypatch.setattr(torch, "load", load)
    return tmp_path / "bomb.pth"


@pytest.mark.parametrize("read", [read_checkpoint, load_checkpoint, read_weights, load_torch_file])
def test_compressed_archives_are_refused_before_anything_is_loaded(read, bomb):
    assert "compressed" in refusal(read, bomb)


def test_a_compressed_archive_is_refused_in_every_script(bomb, prepared, blip_folder, tmp_path, run_main):
    assert peek(bomb) == {}
    assert "compressed" in refusal(read_tutorial_checkpoint, bomb, None)
    data = ("--data_folder", prepared)
    bomb.with_name("earlier").mkdir()
    for script, *arguments in (
        (caption, "--model", bomb, "--test_folder", prepared.parent / "demo" / "test" / "test"),
        (caption_from_checkpoint, "--checkpoint", bomb, "--test_folder", prepared.parent / "demo/test/test"),
        (evaluation, "--checkpoint", bomb, *data),
        (view_captions, "--checkpoint", bomb, *data, "--output_folder", tmp_path / "g"),
        (train, "--checkpoint", bomb, *data, "--output_folder", tmp_path / "o"),
        (train, "--encoder_weights", bomb, *data, "--output_folder", tmp_path / "o"),
    ):
        assert_one_line(run_main(script, *arguments), "bomb.pth", "compressed")


def test_a_compressed_archive_in_a_folder_of_blip(bomb, blip_folder):
    folder = bomb.parent / "blip"
    folder.mkdir()
    for file in blip_folder.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    bomb.rename(folder / "pytorch_model.bin")
    assert "compressed" in refusal(load_captioner, folder)


def test_records_that_overlap_are_refused(models, tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes((models / "best_checkpoint.pth").read_bytes())
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/last", b"")
        largest = max(archive.filelist, key=lambda record: record.file_size)
        for number in range(50):  # the same bytes once more
            again = copy.copy(largest)
            again.filename = f"archive/data/9{number}"
            archive.filelist.append(again)
    assert "larger than the file" in refusal(read_checkpoint, path)


# --- values -------------------------------------------------------------------------------------------------


def nested(depth: int, innermost: object = 1) -> object:
    for _ in range(depth):
        innermost = [innermost]
    return innermost


def strange_values() -> dict[str, object]:
    laughs = ["ha"]
    for _ in range(30):
        laughs = [laughs] * 10
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparse = torch.eye(3).to_sparse_csr()
    return {
        "nested": nested(60),
        "repeated": laughs,
        "expanded": torch.zeros(1).expand(10**12),
        "sparse": torch.eye(3).to_sparse(),
        "sparse rows": sparse,
        "meta": torch.zeros(3, device="meta"),
    }


@pytest.mark.parametrize("name", ["nested", "repeated", "expanded", "sparse", "sparse rows", "meta"])
def test_values_without_end_are_refused(name, models, tmp_path):
    checkpoint = torch.load(models / "best_checkpoint.pth", weights_only=True)
    value = strange_values()[name]
    for place in ("settings", "decoder"):
        changed = checkpoint | {place: checkpoint[place] | {"extra": value}}
        torch.save(changed, tmp_path / "a.pth")
        assert "as no checkpoint has" in refusal(load_checkpoint, tmp_path / "a.pth")
        torch.save({"weight": value}, tmp_path / "w.pth")
        assert "as no checkpoint has" in refusal(read_weights, tmp_path / "w.pth")


def test_settings_nested_deeper_than_python_saves(models, tmp_path):
    """Written without recursion, as by hand: torch reads it, and could not write it again."""
    path = tmp_path / "deep.pth"
    depth = 3000
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        content = b"\x80\x02}X\x08\0\0\0settings" + b"]" * depth + b"a" * (depth - 1) + b"s."
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
    assert "nested more than" in refusal(load_checkpoint, path)


def test_numbers_with_thousands_of_digits(tmp_path):
    digits = "9" * 5000
    for text in (digits, f'[{{"image_id": {digits}, "caption": "a"}}]', "[" * 100_000, '{"a":' * 100_000):
        for name in ("a.json", "a.jsonl"):
            (tmp_path / name).write_text(text)
            refusal(read_submission, tmp_path / name)
        refusal(read_json, tmp_path / "a.json")
    (tmp_path / "a.csv").write_text(f"image_id,caption\n{digits},a dog\n")
    assert read_submission(tmp_path / "a.csv") == [(digits, "a dog")]
    write_submission(tmp_path / "b.json", [(digits, "a dog")])
    assert coco_id(digits) == digits and coco_id("COCO_val2014_000000391895.jpg") == 391895
    assert sorted(["a10", f"a{digits}", "a9"], key=natural_order) == ["a9", "a10", f"a{digits}"]


def test_half_characters(tmp_path):
    for name, content in {
        "a.json": '[{"image_id": "a", "caption": "\\ud800"}]',
        "b.json": '[{"image_id": "\\ud8ff", "caption": "a"}]',
        "a.jsonl": '{"image_id": "a", "caption": "a \\udfff dog"}',
    }.items():
        (tmp_path / name).write_text(content)
        assert "half a character" in refusal(read_submission, tmp_path / name)
    odd = {"path": os.fsdecode(b"caf\xe9.png"), "text": "grün"}
    write_json(tmp_path / "c.json", odd)  # a name that is not UTF-8 comes back as it was
    assert read_json(tmp_path / "c.json") == odd


def test_checksums_that_are_no_dataset_of_numbers(tmp_path):
    def write(make) -> None:
        with h5py.File(tmp_path / "a", "w") as file:
            file["rows"] = np.zeros((4, 6), np.uint8)
            make(file)

    makers = (
        lambda file: file.create_group("checksums"),
        lambda file: file.create_dataset("checksums", data=np.zeros(4, "float32")),
        lambda file: file.create_dataset("checksums", data=["a"] * 4),
        lambda file: file.create_dataset("checksums", (4,), "uint32", compression="gzip"),
        lambda file: file.create_dataset("checksums", (4,), "uint32", external=[("/etc/passwd", 0, 16)]),
        lambda file: file.__setitem__("checksums", np.dtype("uint32")),
    )
    for make in makers:
        write(make)
        with pytest.raises(ValueError, match="checksums are damaged"):
            open_dataset(tmp_path / "a", "rows", np.uint8)


def test_a_cache_is_the_same_file_at_any_time(tmp_path):
    """HDF5 notes the second at which a dataset was made, unless it is told not to."""
    values = np.arange(24, dtype=np.float16).reshape(4, 6)
    for name in ("a", "b"):
        with ResumableRowWriter(tmp_path / name, "features", 4, {"weights": "w"}, "") as writer:
            writer.append(values)
        time.sleep(1.1)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# --- pipes and devices --------------------------------------------------------------------------------------


@pytest.fixture(params=["pipe", "/dev/zero", "/dev/full"])
def no_file(request, tmp_path):
    if request.param != "pipe":
        return request.param
    os.mkfifo(tmp_path / "pipe")
    return str(tmp_path / "pipe")


def test_readers_refuse_pipes_and_devices(no_file):
    for read in (
        read_json, read_submission, read_checkpoint, load_checkpoint, read_weights, load_torch_file,
        lambda path: load_embeddings(path, {"a": 0}), lambda path: load_checkpoint(path, word_map_path=path),
    ):  # fmt: skip
        assert no_file in refusal(read, no_file)
    with pytest.raises(ValueError):
        open_dataset(no_file, "images", np.uint8)


def test_scripts_refuse_pipes_and_devices(no_file, prepared, models, demo, tmp_path, run_main):
    model, images = models / "best_checkpoint.pth", demo / "test" / "test"
    captions, data = demo / "test_captions.csv", ("--data_folder", prepared)
    output = ("--output_folder", tmp_path / "o")
    for script, *arguments in (
        (caption, "--model", model, "--word_map", no_file, "--test_folder", images),
        (caption, "--model", no_file, "--test_folder", images),
        (caption, "--model", model, "--img", no_file),
        (caption, "--model", model, "--test_folder", images, "--test_csv", no_file),
        (caption_from_checkpoint, "--checkpoint", no_file, "--test_folder", images),
        (direct_caption, "--model_path", no_file, "--test_folder", images),
        (evaluation, "--submission", no_file, "--references", captions),
        (evaluation, "--submission", captions, "--references", no_file),
        (evaluation, "--compare", no_file, captions),
        (evaluation, "--checkpoint", model, *data, "--boxes", no_file),
        (create_input_files, "--annotations", no_file, "--image_folder", images, *output),
        (train, *data, *output, "--checkpoint", no_file),
        (train, *data, *output, "--encoder_weights", no_file),
        (train, *data, *output, "--embeddings", no_file, "--encoder_name", "efficientnet_lite0"),
        (train_model, "--annotations", no_file, "--image_folder", images, "--base_model", "tiny", *output),
        (view_captions, "--checkpoint", model, "--img", no_file, *output),
        (view_captions, "--submission", no_file, "--references", captions, *output),
    ):  # fmt: skip
        result = run_main(script, *arguments)
        assert result.returncode == 2 and "Traceback" not in result.stderr, (script, result.stderr)
        assert no_file in result.stderr.splitlines()[-1], (script, result.stderr)


def test_pipes_among_prepared_data(prepared, tmp_path):
    for name in ("word_map.json", "train_images.hdf5", "prepared.json", "train_references.json"):
        folder = tmp_path / name
        folder.mkdir()
        for file in prepared.glob("*.*"):
            if file.name != name and "features" not in file.name:
                (folder / file.name).write_bytes(file.read_bytes())
        os.mkfifo(folder / name)

        def read(folder=folder):
            data = Prepared(folder)
            assert not is_whole(data)
            data.word_map()
            data.records("train")
            data.images("train")

        assert name in refusal(read) or name == "prepared.json"


def test_a_pipe_in_a_folder_of_blip(blip_folder, tmp_path):
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        folder = tmp_path / name
        folder.mkdir()
        for file in blip_folder.iterdir():
            if file.name != name:
                (folder / file.name).write_bytes(file.read_bytes())
        os.mkfifo(folder / name)
        refusal(load_captioner, folder)


def test_odd_bytes_of_a_json_file(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"a": 1}))
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert "no such file" in refusal(read_json, tmp_path / "none.json")
    assert "no such file" in refusal(read_json, tmp_path / "a.json" / "b.json")
    assert "a folder" in refusal(read_json, tmp_path)

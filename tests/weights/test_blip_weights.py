"""BLIP folders with missing, damaged or other weights: refused, never completed with random ones."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from captioning.captioners.blip import tiny_captioner
from captioning.captioners.loading import load_captioner
from utils import UserError


@pytest.fixture(scope="module")
def folder(demo_captions, tmp_path_factory):
    output = tmp_path_factory.mktemp("blip")
    tiny_captioner(caption for captions in demo_captions for caption in captions).save(output)
    return output


def refused(folder, tensors, *parts):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    save_file(tensors, file, metadata={"format": "pt"})
    try:
        with pytest.raises(UserError) as error:
            load_captioner(folder)
    finally:
        file.write_bytes(content)
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts), error.value


def test_one_missing_tensor_is_refused(folder):
    load_captioner(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors)[::12]:
        refused(folder, {other: tensor for other, tensor in tensors.items() if other != name}, "is missing")
    load_captioner(folder)


def test_weights_that_are_no_numbers_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("query.weight"))
    for value in (float("nan"), float("inf")):
        damaged = tensors[name].clone()
        damaged[0, 0] = value
        refused(folder, tensors | {name: damaged}, name, "not finite")
    refused(folder, tensors | {name: torch.zeros(3)}, str(folder))

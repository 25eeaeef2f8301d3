"""Folders that are no captioning model, or say that they are, or bring code: one line, and nothing is run."""

import json
import shutil

import pytest
import torch
import transformers
from conftest import assert_one_line
from PIL import Image
from tiny_families import save_tiny, tiny_tokenizer

import direct_caption


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, folder / family) for family in ("llava", "qwen2_5_vl", "git")}


class Bomb:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


def change_json(file, **values):
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | values))


CODE = "open({trace!r}, 'w')\nclass Thing:\n    pass\n"


def pickled_weights(folder, trace):
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb(trace)}, folder / "pytorch_model.bin")


def code_for_an_unknown_type(folder, trace):
    (folder / "thing.py").write_text(CODE.format(trace=str(trace)))
    map_ = {"AutoConfig": "thing.Thing", "AutoModelForImageTextToText": "thing.Thing"}
    change_json(folder / "config.json", model_type="thing", auto_map=map_)


def code_for_the_processor(folder, trace):
    (folder / "thing.py").write_text(CODE.format(trace=str(trace)))
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        map_ = {"AutoProcessor": "thing.Thing", "AutoTokenizer": ["thing.Thing", "thing.Thing"]}
        map_["AutoImageProcessor"] = "thing.Thing"
        change_json(folder / name, processor_class="Thing", tokenizer_class="Thing", auto_map=map_)


def damaged_tokenizer(folder, trace):
    file = folder / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:300])


def length_that_is_a_list(folder, trace):
    change_json(folder / "tokenizer_config.json", model_max_length=[1])


def larger_tokenizer(folder, trace):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"more{number}" for number in range(50)])
    tokenizer.add_tokens(["Write", " caption"])  # so that the prompt has tokens that the model lacks
    tokenizer.save_pretrained(folder)


def other_tokenizer(folder, trace):
    tiny_tokenizer().save_pretrained(folder)


def wrong_architecture(folder, trace):
    change_json(folder / "config.json", architectures=["LlavaForSomethingElse"])


def weights_of_another_family(folder, trace):
    shutil.copy(folder.parent.parent / "git.safetensors", folder / "model.safetensors")


def no_processor(folder, trace):
    for file in folder.glob("*processor_config.json"):
        file.unlink()


def no_tokenizer(folder, trace):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def unknown_family(folder, trace):
    transformers.FuyuConfig().save_pretrained(folder)


def other_model(folder, trace):
    transformers.BertConfig().save_pretrained(folder)


def template_that_looks_around(folder, trace):
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")


def template_without_end(folder, trace):
    (folder / "chat_template.jinja").write_text("{% for i in range(10 ** 12) %}x{% endfor %}")


def processor_of_another_size(folder, trace):
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            content = (folder / name).read_text()
            (folder / name).write_text(content.replace('"patch_size": 14', '"patch_size": 7'))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(
    "damage",
    [
        pickled_weights, code_for_an_unknown_type, code_for_the_processor, damaged_tokenizer,
        length_that_is_a_list, larger_tokenizer, other_tokenizer, wrong_architecture,
        weights_of_another_family, no_processor,
        no_tokenizer, unknown_family, other_model, template_that_looks_around, template_without_end,
        processor_of_another_size,
    ],
)  # fmt: skip
def test_hostile_folders(sound, family, damage, run_main, tmp_path):
    trace, folder = tmp_path / "trace", tmp_path / "models" / "model"
    shutil.copytree(sound[family], folder)
    shutil.copy(sound["git"] / "model.safetensors", tmp_path / "git.safetensors")
    damage(folder, trace)
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (60, 40), "red").save(images / "a.png")
    output = tmp_path / "out.csv"
    result = run_main(
        direct_caption, "--model_path", folder, "--test_folder", images, "--output_csv", output,
        "--max_new_tokens", 3,
    )  # fmt: skip
    result.stderr = "\n".join(line for line in result.stderr.splitlines() if "captioning: " not in line)
    part = {"pickled_weights": "safetensors", "code_for_an_unknown_type": "code of its own"}
    assert_one_line(result, folder, part.get(damage.__name__, ""))
    assert not trace.exists() and not output.exists()

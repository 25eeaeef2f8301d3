"""Each family of captioners, as a tiny random model that is saved and loaded by the public path: the inputs
are those of its own processor, padding changes nothing, prompts are cut, what cannot be gets one line."""

import inspect
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from conftest import assert_one_line
from PIL import Image
from tiny_families import BUILDERS, save_tiny

import direct_caption
from captioning import Captioner
from captioning.captioners import model_inputs
from captioning.captioners.loading import load_captioner
from captioning.captioners.model_inputs import FAMILIES, fit_image, join_inputs
from captioning.data.images import read_image
from captioning.decoding.options import DecodingOptions
from utils import UserError

SIZES = {"a": (60, 40), "long name": (30, 100), "b c d": (64, 64), "e": (90, 28), "f g h i": (31, 33),
         "j": (120, 80), "k 1 2 3 4": (20, 20)}  # fmt: skip
CHAT = [family for family, known in FAMILIES.items() if known.form == "chat"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """The folder of each family's model, made when it is first asked for."""
    place = tmp_path_factory.mktemp("families")

    def folder(family: str):
        path = place / family.replace(" ", "_")
        return path if path.is_dir() else save_tiny(family, path)

    return folder


@pytest.fixture(scope="session")
def load(folders):
    """A captioner of a family, of its own for whoever asks, with captions of at most 8 tokens."""

    def loaded(family: str):
        captioner = load_captioner(folders(family))
        captioner.max_new_tokens = 8
        return captioner

    return loaded


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Images of unequal sizes, whose names are of unequal lengths."""
    folder = tmp_path_factory.mktemp("images")
    torch.manual_seed(1)
    for name, (width, height) in SIZES.items():
        pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return [folder / f"{name}.png" for name in SIZES]


def takes_names(captioner) -> bool:
    """Give each image a prompt of its own length, where the family takes one."""
    if captioner.family.form == "pixels" or captioner.family.tasks:
        return False
    captioner.set_prompt("Write a caption for {name}")
    return True


def texts(captioner, images, size: int, beams: int = 1, **options) -> list[str]:
    found = []
    for start in range(0, len(images), size):
        part = images[start : start + size]
        prepared = [captioner.prepare(path) for path in part]
        decoding = DecodingOptions(beams, **options)
        found += captioner.decode_prepared(prepared, decoding, [path.stem for path in part])
    return [one.text for own in found for one in own]


# --- captions -----------------------------------------------------------------------------------------------


def test_every_family_has_a_tiny_model():
    assert {family.split()[0] for family in BUILDERS} == set(FAMILIES) and len(FAMILIES) >= 12


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", BUILDERS)
def test_a_caption_does_not_depend_on_the_images_beside_it(load, images, family, beams):
    captioner = load(family)
    takes_names(captioner)
    alone = texts(captioner, images, 1, beams)
    assert len(set(alone)) > 1
    assert texts(captioner, images, 3, beams) == alone
    assert texts(captioner, images, 7, beams) == alone
    drawn = {"temperature": 1.5, "num_captions": 2}
    assert texts(captioner, images, 7, **drawn) == texts(captioner, images, 1, **drawn)


@pytest.mark.parametrize(
    "family", ["llava", "qwen2_5_vl", "smolvlm", "internvl", "llava_onevision", "paligemma"]
)
def test_padding_on_the_right_would_be_seen(load, images, family, monkeypatch):
    """The tokenizers of all tiny models pad on the right by themselves."""
    captioner = load(family)
    assert takes_names(captioner) and captioner.tokenizer.padding_side == "right"
    alone = texts(captioner, images, 1)
    batch = join_inputs
    monkeypatch.setattr(model_inputs, "join_inputs", lambda images, pad, side: batch(images, pad, "right"))
    assert texts(captioner, images, 7) != alone


@pytest.mark.parametrize("family", [*CHAT, "blip-2 with T5", "paligemma", "florence2"])
def test_a_batch_is_what_the_processor_makes_of_all_images(load, images, family):
    captioner = load(family)
    takes_names(captioner)
    photos = [fit_image(Image.fromarray(read_image(path).transpose(1, 2, 0))) for path in images]
    prompts = [captioner._prompt_of(path) for path in images]
    side = "right" if captioner.is_encoder_decoder else "left"
    captioner.tokenizer.padding_side = side
    if captioner.family.form == "chat":
        conversations = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": photo}, {"type": "text", "text": prompt}],
                }
            ]
            for photo, prompt in zip(photos, prompts)
        ]
        apply = captioner.processor.apply_chat_template
        padding = {"padding": True}
        if "processor_kwargs" in inspect.signature(apply).parameters:  # newer than transformers 5.0
            padding = {"processor_kwargs": padding}
        expected = apply(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            **padding,
        )  # fmt: skip
    else:
        expected = captioner.processor(photos, prompts, return_tensors="pt", padding=True)
    captioner.tokenizer.padding_side = "right"
    batch = captioner.batch([captioner.prepare(path) for path in images])
    assert batch.keys() == expected.keys() - {"labels"}
    for name, value in batch.items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("family", BUILDERS)
def test_captions_are_those_of_the_plain_loop(load, images, family):
    """transformers' classes by themselves, an image at a time."""
    captioner = load(family)
    asked = takes_names(captioner)
    for path in images[:3]:
        photo = Image.open(path)
        prompt = captioner.prompt.replace("{name}", path.stem)
        if captioner.family.form == "pixels":
            inputs = captioner.image_processor(photo, return_tensors="pt")
        elif captioner.family.form == "text":
            inputs = captioner.processor(photo, prompt, return_tensors="pt")
            inputs.pop("labels", None)
        else:
            content = [{"type": "image", "image": photo}, {"type": "text", "text": prompt}]
            inputs = captioner.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True,
                return_dict=True, return_tensors="pt",
            )  # fmt: skip
        found = captioner.model.generate(**inputs, num_beams=2, max_new_tokens=8, do_sample=False)[0]
        decoder_only = captioner.family.form == "chat" or family in ("blip-2", "paligemma")
        found = found[inputs["input_ids"].shape[1] :] if decoder_only else found
        plain = captioner.tokenizer.decode(found, skip_special_tokens=True)
        assert texts(captioner, [path], 1, 2) == [" ".join(plain.split())]
        assert not (asked and path.stem in plain and "caption for" in plain)


@pytest.mark.parametrize("family", ["llava", "gemma3", "idefics3", "blip-2", "paligemma"])
def test_a_text_starts_once(load, images, family):
    """The tokenizers of these add a start token to what has one already."""
    captioner = load(family)
    ids = captioner.prepare(images[0])["input_ids"][0].tolist()
    assert ids.count(captioner.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("family", ["blip-2", "llava", "blip-2 with T5", "florence2", "git"])
def test_the_limit_is_of_the_caption_alone(load, images, family):
    captioner = load(family)
    for limit in (3, 8):
        captioner.max_new_tokens = limit
        inputs = captioner.batch([captioner.prepare(path) for path in images])
        found = captioner.generate(inputs, DecodingOptions(1), ["x"] * len(images), 1)
        assert found.sequences.shape[1] - captioner.prompt_length(inputs) == limit
        rows = captioner._decode([captioner.prepare(images[0])], DecodingOptions(1), ["x"], False)
        assert rows[0][0][1] is False  # no end


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "blip-2", "vision-encoder-decoder"])
@torch.no_grad()
def test_log_probabilities_are_those_of_the_whole_model(load, images, family):
    captioner = load(family)
    for path in images[:3]:
        prepared = captioner.prepare(path)
        (own,) = captioner.decode_prepared([prepared], DecodingOptions(3, num_captions=2), with_scores=True)
        assert 1 <= len(own) == len({one.text for one in own}) <= 2
        inputs = captioner.batch([prepared])
        output = captioner.generate(inputs, DecodingOptions(3), ["x"], 1, True)
        start = captioner.prompt_length(inputs)
        given = dict(inputs)
        if captioner.is_encoder_decoder:
            logits = captioner.model(**given, decoder_input_ids=output.sequences).logits
        else:
            more = output.sequences.shape[1] - start
            for name in given.keys() & {"attention_mask", "mm_token_type_ids"}:
                value = 1 if name == "attention_mask" else 0
                given[name] = torch.nn.functional.pad(given[name], (0, more), value=value)
            logits = captioner.model(**given | {"input_ids": output.sequences}).logits
        log_probs = logits[0, start - 1 : -1].log_softmax(dim=1)
        expected = log_probs.gather(1, output.sequences[0, start:, None]).sum().item()
        assert own[0].log_prob == pytest.approx(expected, abs=1e-3)
        assert sum(log_prob for _, log_prob in own[0].words) >= own[0].log_prob - 1e-3
        assert " ".join(word for word, _ in own[0].words) == own[0].text


def test_a_tokenizer_without_padding(folders, images, tmp_path):
    folder = save_tiny("llava", tmp_path / "llava")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    captioner = load_captioner(folder)
    captioner.max_new_tokens = 8
    assert takes_names(captioner) and captioner.tokenizer.pad_token_id is None
    assert texts(captioner, images, 7) == texts(captioner, images, 1)


def test_threads_prepare_what_one_does(load, images):
    captioner = load("qwen2_5_vl")
    takes_names(captioner)
    alone = [captioner.prepare(path) for path in images]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(captioner.prepare, images * 20))
    for number, inputs in enumerate(together):
        expected = alone[number % len(images)]
        assert all(torch.equal(value, expected[name]) for name, value in inputs.items())


def test_from_python(folders, images):
    captioner = Captioner.load(folders("smolvlm"))
    captioner.max_new_tokens = 4
    assert len(captioner.caption(images[:2], beam_size=1)) == 2
    with pytest.raises(UserError, match="where it looked"):
        captioner.caption(images[0], details=True)


# --- prompts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, asked, part",
    [
        ("git", {"prompt": "a photo"}, "takes no prompt"),
        ("vision-encoder-decoder", {"prompt": "a photo"}, "takes no prompt"),
        ("blip-2", {"system_prompt": "Be brief"}, "takes no system prompt"),
        ("blip", {"system_prompt": "Be brief"}, "takes no system prompt"),
        ("blip", {"prompt": "a photo in {folder}"}, "{folder}"),
        ("llava", {"prompt": "What is in <image>?"}, "has <image> in it"),
        ("qwen2_5_vl", {"prompt": "<|image_pad|>"}, "has <|image_pad|> in it"),
        ("gemma3", {"prompt": "see <start_of_image>"}, "has <start_of_image> in it"),
        ("llava", {"prompt": "Hello", "system_prompt": "</s> obey"}, "--system_prompt: has </s>"),
        ("paligemma", {"prompt": "<image>caption en"}, "has <image> in it"),
        ("florence2", {"prompt": "<CAPTION> of the cat"}, "give one alone"),
        ("florence2", {"prompt": "describe"}, "knows <CAPTION>, <DETAILED_CAPTION>"),
        ("llava", {"prompt": "Hello", "keep_prompt": True}, "does not repeat its prompt"),
    ],
)
def test_a_prompt_that_a_model_does_not_take(load, family, asked, part):
    with pytest.raises(UserError) as error:
        load(family).set_prompt(**asked)
    assert part in str(error.value) and "\n" not in str(error.value)


def test_placeholders(load, images, tmp_path):
    captioner = load("llava")
    captioner.set_prompt("{name} in {folder}: {caption}")
    path = tmp_path / "photo.png"
    path.write_bytes(images[0].read_bytes())
    assert captioner._prompt_of(path) == f"photo in {tmp_path.name}: "
    path.with_suffix(".txt").write_text("a cat\n")
    assert captioner._prompt_of(path).endswith(": a cat")
    assert captioner._prompt_of(None) == " in : "
    path.with_suffix(".txt").write_text("a cat <image> </s>")
    with pytest.raises(UserError, match=r"photo.png: its caption: has <"):
        captioner.prepare(path)


def test_a_prompt_that_is_too_long_is_named_with_its_image(load, images):
    captioner = load("llava")
    captioner.set_prompt("one two three " * 100)
    with pytest.raises(
        UserError, match=r"a.png: \d+ tokens with its prompt and 8 for the caption .* \(400\)"
    ):
        captioner.prepare(images[0])


TEMPLATES = {  # as of older processors: content is a string, and the image's place is the template's or ours
    "string": "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: "
    "{% if m['role'] == 'user' %}<image>{% endif %}{{ m['content'] | trim }}\n{% endfor %}assistant:",
    "token": "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}",
}


@pytest.mark.parametrize("style", TEMPLATES)
def test_templates_of_strings(load, images, style):
    captioner = load("llava")
    captioner.processor.chat_template = TEMPLATES[style]
    captioner.set_prompt("Describe it.", "Be brief.")
    assert captioner.style == style
    ids = captioner.prepare(images[0])["input_ids"][0].tolist()
    assert (
        ids.count(captioner.tokenizer.image_token_id) == 4
        and ids.count(captioner.tokenizer.bos_token_id) == 1
    )
    text = captioner.tokenizer.decode(ids, skip_special_tokens=True)
    assert "Describe it." in text and "Be brief." in text and "type" not in text


@pytest.mark.parametrize(
    "template, part",
    [
        (None, "has no chat template"),
        ("{{ messages[0]['role'] }}", "places no image"),
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{% for", "cannot be used"),
    ],
)
def test_templates_that_cannot_be_used(load, template, part):
    captioner = load("qwen2_5_vl")
    captioner.processor.chat_template = captioner.tokenizer.chat_template = template
    with pytest.raises(UserError, match=part) as error:
        captioner.set_prompt("Describe it.", "Be brief.")
    assert "\n" not in str(error.value)


# --- images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (30000, 40), (40, 30000), (5000, 1), (3, 2), (300, 200)])
def test_images_are_fitted(size):
    image = fit_image(Image.new("RGB", size, "red"))
    assert max(image.size) <= 100 * min(image.size) and min(image.size) >= 16
    assert (255, 0, 0) in {colour for _, colour in image.getcolors()}
    smaller = fit_image(image, 10_000)
    assert smaller.width * smaller.height <= 10_300 and min(smaller.size) >= 10


def test_max_pixels_gives_the_model_less(load, images):
    captioner = load("qwen2_5_vl")
    full = captioner.prepare(images[5])["input_ids"].shape[1]
    captioner.max_pixels = 1000
    assert captioner.prepare(images[5])["input_ids"].shape[1] < full


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision", "git", "florence2", "smolvlm"])
def test_odd_images_do_not_end_a_folder(folders, images, run_main, tmp_path, family):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (30000, 40), "red").save(folder / "1_strip.png")
    Image.new("RGB", (1, 1), "red").save(folder / "2_dot.png")
    (folder / "3_cut.png").write_bytes(images[0].read_bytes()[:900])
    (folder / "4_whole.png").write_bytes(images[0].read_bytes())
    command = ["--model_path", folders(family), "--test_folder", folder, "--output_csv", tmp_path / "out.csv"]
    result = run_main(direct_caption, *command, "--num_beams", 1, "--max_new_tokens", 4, "--checks", "none")
    assert result.returncode == 1, result.stderr
    assert result.stderr.count("no caption: ") == 1 and "3_cut.png: not a readable image" in result.stderr
    assert "3 images captioned, 1 without a caption" in result.stdout


# --- loading ------------------------------------------------------------------------------------------------


def test_precision(folders, monkeypatch):
    assert load_captioner(folders("llava"), "bf16").model.dtype == torch.bfloat16
    model = transformers.AutoModelForImageTextToText.from_pretrained(folders("git"), dtype=torch.float16)
    half = folders("git").with_name("git in half precision")
    model.save_pretrained(half)
    for name in (
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        if (folders("git") / name).is_file():
            (half / name).write_bytes((folders("git") / name).read_bytes())
    assert load_captioner(half).model.dtype == torch.float32  # on the CPU


def test_memory_settings_that_cannot_be(folders, images, run_main, monkeypatch):
    command = [direct_caption, images[0], "--model_path", folders("llava")]
    assert_one_line(run_main(*command, "--load_in_4bit", "--load_in_8bit"), "give one of them")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_one_line(run_main(*command, "--load_in_4bit"), "pip install -r requirements-captioners.txt")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert_one_line(run_main(*command, "--load_in_8bit"), "is for CUDA")


def test_a_missing_package_is_named(folders, images, run_main, monkeypatch):
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)
    result = run_main(direct_caption, images[0], "--model_path", folders("smolvlm"))
    assert_one_line(result, "num2words")

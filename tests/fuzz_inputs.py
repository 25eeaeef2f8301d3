"""What tests/fuzz.py tries: sound files, and cases in which one of them is damaged, odd or hostile."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from fuzz_damage import damage_checkpoint, damage_json, mutate, mutate_text, odd_image, put_something_else


@dataclass
class Samples:
    """Sound files to begin with: made once.

    demo: a demonstration set. prepared: the same, prepared. models, blip: of train.py and of BLIP's format.
    """

    demo: Path
    prepared: Path
    models: Path
    blip: Path
    images: list[Path] = field(default_factory=list)

    def __post_init__(self):
        self.images = sorted((self.demo / "train" / "train").glob("*.jpg"))

    @classmethod
    def make(cls, folder: Path) -> Samples:
        import create_input_files
        import make_demo_data
        import train
        from captioning.captioners.blip import tiny_captioner
        from captioning.data.annotations import read_annotations

        torch.manual_seed(0)
        demo, prepared, models = folder / "demo", folder / "data_output", folder / "output_models"
        make_demo_data.make_demo_data(make_demo_data.Settings(str(demo), 16, 10))
        annotations, images = str(demo / "train.csv"), str(demo / "train" / "train")
        settings = create_input_files.Settings(annotations, images, output_folder=str(prepared))
        settings.min_word_freq, settings.image_size, settings.val_fraction = 1, 32, 0.25
        create_input_files.create_input_files(settings)
        sizes = {"emb_dim": 8, "attention_dim": 8, "decoder_dim": 8}
        train.train(
            train.Settings(str(prepared), str(models), "efficientnet_lite0", epochs=1, workers=0, **sizes)
        )
        captions = [text for record in read_annotations(annotations) for text in record.captions]
        tiny_captioner(captions).save(folder / "blip")
        return cls(demo, prepared, models, folder / "blip")


@dataclass
class Case:
    """A script to run in a folder, and what must be so when it says that all is well.

    check: a folder and the exit status -> what is wrong, "" where nothing is.
    """

    script: str
    arguments: list
    check: Callable[[Path, int], str] = lambda folder, status: ""


def copy_files(source: Path, target: Path, left_out: str = "") -> Path:
    """Copy the files of a folder, without caches."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and "_features_" not in file.name and (not left_out or left_out not in file.name):
            shutil.copy(file, target)
    return target


def has_rows(name: str, count: int) -> Callable[[Path, int], str]:
    """A check that a CSV of captions has so many rows."""

    def check(folder: Path, status: int) -> str:
        if status == 2:
            return ""
        if not (folder / name).is_file():
            return f"no {name}"
        with (folder / name).open(newline="", encoding="utf-8") as stream:
            rows = len(list(csv.reader(stream))) - 1
        return "" if rows == count else f"{rows} rows in {name}, not {count}"

    return check


# --- kinds of cases -----------------------------------------------------------------------------------------


def image_folder(samples: Samples, folder: Path, rng: random.Random) -> Path:
    """Three images, of which one is odd or no image at all."""
    images = folder / "images"
    images.mkdir()
    for number, source in enumerate(rng.sample(samples.images, 2)):
        shutil.copy(source, images / f"good{number}.jpg")
    odd = images / f"odd.{rng.choice(['jpg', 'png', 'webp', 'heic', 'tif', 'avif'])}"
    odd_image(odd, rng)
    if rng.random() < 0.15:
        put_something_else(odd, rng)
    return images


def captioners(samples: Samples) -> dict[str, list]:
    """How each captioning script is told its model."""
    checkpoint = samples.models / "best_checkpoint.pth"
    return {
        "caption.py": ["--model", checkpoint],
        "caption_from_checkpoint.py": ["--checkpoint", checkpoint],
        "direct_caption.py": ["--model_path", samples.blip, "--max_new_tokens", 8],
    }


def images_case(samples: Samples, folder: Path, rng: random.Random) -> Case:
    images = image_folder(samples, folder, rng)
    there = [path for path in images.iterdir() if path.is_symlink() or not path.is_dir()]
    kind, scripts = rng.randrange(8), captioners(samples)
    odd = next((path for path in images.iterdir() if path.stem == "odd"), images / "odd.jpg")
    if kind < 3:
        script, model = rng.choice(list(scripts.items()))
        arguments = [*model, "--test_folder", images, "--output_csv", "s.csv", "--workers", 1]
        return Case(script, arguments, has_rows("s.csv", len(there)))
    if kind == 3:
        script = rng.choice(["caption.py", "direct_caption.py"])
        return Case(script, [odd, *scripts[script]])
    if kind == 4:
        checkpoint = samples.models / "best_checkpoint.pth"
        return Case("view_captions.py", ["--checkpoint", checkpoint, "--img", odd, "--figures", "f"])
    with (folder / "a.csv").open("w") as stream:
        stream.write("image_id,caption\n")
        for path in (*there, odd):
            stream.write(f"{path.stem},a red circle above a small square\n{path.stem},a circle\n")
    data = ["--annotations", "a.csv", "--image_folder", images, "--val_fraction", 0.4, "--workers", 1]
    if kind == 5:
        return Case("train_model.py", [*data, "--base_model", "tiny", "--epochs", 1])
    if kind == 6:
        rows = ["--submission", "a.csv", "--references", "a.csv", "--partial"]
        return Case("eval.py", [*rows, "--image_folder", images, "--worst", 3])
    return Case("create_input_files.py", [*data, "--min_word_freq", 1, "--image_size", 32])


def texts_case(samples: Samples, folder: Path, rng: random.Random) -> Case:
    """Annotations, references and files of captions."""
    name = rng.choice(["a.csv", "a.json", "a.jsonl", "a.txt"])
    rows = [
        (path.stem, f'a "red" circle, {number} squares on grün') for number, path in enumerate(samples.images)
    ]
    if name == "a.json":
        kind = rng.randrange(3)
        entries = [{"image_id": image_id, "caption": text} for image_id, text in rows]
        if kind == 1:
            files = [{"id": i, "file_name": f"{image_id}.jpg"} for i, (image_id, _) in enumerate(rows)]
            captions = [{"image_id": i, "caption": text} for i, (_, text) in enumerate(rows)]
            entries = {"images": files, "annotations": captions}
        elif kind == 2:
            entries = {"images": [
                {"filename": f"{image_id}.jpg", "split": rng.choice(["train", "val", "test"]),
                 "sentences": [{"raw": text, "tokens": text.split()}]} for image_id, text in rows
            ]}  # fmt: skip
        (folder / name).write_text(json.dumps(entries))
        damage_json(folder / name, rng)
    else:
        stream = io.StringIO()
        if name == "a.jsonl":
            lines = [json.dumps({"image_id": image_id, "caption": text}) for image_id, text in rows]
            stream.write("\n".join(lines))
        else:
            header = rng.choice([("image_id", "caption"), ("image", "caption"), ("a", "b")])
            csv.writer(stream, delimiter=rng.choice(",,;\t|")).writerows([header, *rows])
        encoding = rng.choice(["utf-8", "utf-8", "cp1252", "utf-16", "utf-8-sig"])
        text = stream.getvalue() if rng.random() < 0.4 else mutate_text(stream.getvalue(), rng)
        content = text.encode(encoding, "replace")
        (folder / name).write_bytes(mutate(content, rng) if rng.random() < 0.3 else content)
    if rng.random() < 0.05:
        put_something_else(folder / name, rng)
    images = samples.demo / "train" / "train"
    data, kind = ["--annotations", name, "--image_folder", images], rng.randrange(6)
    if kind == 0:
        return Case(
            "create_input_files.py", [*data, "--min_word_freq", 1, "--image_size", 32, "--workers", 1]
        )
    if kind == 1:
        return Case("train_model.py", [*data, "--base_model", "tiny", "--epochs", 1, "--workers", 1])
    good = folder / "good.csv"
    good.write_text("image_id,caption\n" + "".join(f"{path.stem},a red circle\n" for path in samples.images))
    if kind == 2:
        given = ["--submission", name, "--references", good, "--partial", "--output_json", "o.json"]
        return Case("eval.py", [*given, "--output_captions", "o.csv", "--per_image_csv", "p.csv"])
    if kind == 3:
        return Case("eval.py", ["--submission", good, "--references", name, "--partial"])
    if kind == 4:
        return Case("view_captions.py", ["--submission", name, "--references", good])
    script, model = rng.choice(list(captioners(samples).items()))
    given = ["--test_folder", samples.demo / "test" / "test", "--test_csv", name, "--output_csv", "s.csv"]
    return Case(script, [*model, *given])


BLANK = b"\xff\xfe\xef\xbb\xbf \r\n\t\0"  # byte order marks and white space: what says nothing


def sidecars_case(samples: Samples, folder: Path, rng: random.Random) -> Case:
    images, texts = folder / "images", {}
    images.mkdir()
    for number, source in enumerate(rng.sample(samples.images, 3)):
        shutil.copy(source, images / f"i{number}.jpg")
        if rng.random() < 0.8:
            text = rng.choice(["a dog", "ein Hund – schön", "犬", "", " \r\n", "sks, \x1b[2J dog\n"])
            content = text.encode(rng.choice(["utf-8", "utf-16", "utf-8-sig", "cp1252"]), "replace")
            texts[f"i{number}.txt"] = mutate(content, rng) if rng.random() < 0.4 else content
            (images / f"i{number}.txt").write_bytes(texts[f"i{number}.txt"])
    if texts and rng.random() < 0.2:
        name = rng.choice(list(texts))
        del texts[name]
        put_something_else(images / name, rng)
    texts = {name: content for name, content in texts.items() if content.strip(BLANK)}
    existing = rng.choice(["skip", "overwrite", "append", "prepend"])

    def check(folder: Path, status: int) -> str:
        """What a sidecar said is in it still, or in its copy, byte for byte where it was left alone."""
        for name, content in texts.items():
            now = images / name
            copies = [file.read_bytes() for file in (images / ".sidecar_backup").rglob("*") if file.is_file()]
            if not now.is_file() or (now.read_bytes() != content and content not in copies):
                return f"the text of {name} is lost"
            if existing == "skip" and now.read_bytes() != content:
                return f"{name} was changed"
        return ""

    script, model = rng.choice(list(captioners(samples).items()))
    given = ["--test_folder", images, "--sidecars", "--existing", existing, "--workers", 1]
    given += rng.choice([[], ["--prefix", "sks"], ["--suffix", "{name}"], ["--output_csv", "s.csv"]])
    return Case(script, [*model, *given], check)


def prepared_case(samples: Samples, folder: Path, rng: random.Random) -> Case:
    data = copy_files(samples.prepared, folder / "data")
    file = rng.choice(sorted(data.iterdir()))
    if rng.random() < 0.1:
        put_something_else(file, rng)
    elif file.suffix == ".json":
        damage_json(file, rng)
    else:
        file.write_bytes(mutate(file.read_bytes(), rng))
    if rng.random() < 0.5 and (data / "prepared.json").is_file():  # as before there were digests of files
        try:
            record = json.loads((data / "prepared.json").read_text())
            record.pop("files", None)
            (data / "prepared.json").write_text(json.dumps(record))
        except (ValueError, AttributeError, RecursionError):
            pass
    given, checkpoint = ["--data_folder", data], samples.models / "best_checkpoint.pth"
    kind = rng.randrange(4)
    if kind == 0:
        return Case("eval.py", [*given, "--checkpoint", checkpoint, "--beam_sizes", 1, "--split", "val"])
    if kind == 1:
        return Case("view_captions.py", [*given, "--checkpoint", checkpoint, "--split", "val", "--limit", 2])
    return Case("train.py", [*given, *SMALL, *rng.choice([[], ["--fine_tune_encoder"]])])


SMALL = ["--encoder_name", "efficientnet_lite0", "--epochs", 1, "--workers", 1]
SMALL += ["--emb_dim", 8, "--attention_dim", 8, "--decoder_dim", 8]


def checkpoint_case(samples: Samples, folder: Path, rng: random.Random) -> Case:
    models = folder / "output_models"
    copy_files(samples.models, models)
    names = sorted(file.name for file in models.glob("*.pth"))
    file = models / rng.choice(names)
    if rng.random() < 0.05:
        put_something_else(file, rng)
    elif rng.random() < 0.4:
        file.write_bytes(mutate(file.read_bytes(), rng))
    else:
        damage_checkpoint(file, rng)
    images = samples.demo / "test" / "test"
    data, kind = ["--data_folder", samples.prepared], rng.randrange(6)
    if kind == 0:
        return Case("caption.py", ["--img", samples.images[0], "--model", file])
    if kind == 1:
        return Case(
            "caption.py",
            ["--test_folder", images, "--output_csv", "s.csv"],
            has_rows("s.csv", len(list(images.iterdir()))),
        )
    if kind == 2:
        return Case("eval.py", [*data, "--checkpoint", file, "--beam_sizes", 1, "--split", "val"])
    if kind == 3:
        return Case("caption_from_checkpoint.py", ["--checkpoint", file, "--test_folder", images])
    if kind == 4:
        return Case("convert_checkpoint.py", ["--checkpoint", file])
    given = copy_files(samples.prepared, folder / "data")
    how = rng.choice([["--resume"], ["--checkpoint", file], ["--encoder_weights", file]])
    return Case(
        "train.py", ["--data_folder", given, "--output_folder", models, *how, "--epochs", 2, "--workers", 0]
    )


def blip_case(samples: Samples, folder: Path, rng: random.Random) -> Case:
    blip = copy_files(samples.blip, folder / "blip")
    file = rng.choice(sorted(blip.iterdir()))
    if rng.random() < 0.08:
        put_something_else(file, rng)
    elif file.suffix == ".json":
        damage_json(file, rng)
    else:
        file.write_bytes(mutate(file.read_bytes(), rng))
    kind, images = rng.randrange(5), samples.demo / "test" / "test"
    given = ["--model_path", blip]
    if kind == 0:
        return Case("direct_caption.py", [samples.images[0], *given, "--max_new_tokens", 8])
    if kind == 1:
        more = rng.choice([[], ["--prompt", "a photo of"], ["--with_scores"], ["--top_p", 0.9]])
        folder_of_images = ["--test_folder", images, "--output_csv", "s.csv", "--max_new_tokens", 8]
        return Case(
            "direct_caption.py",
            [*given, *folder_of_images, *more],
            has_rows("s.csv", len(list(images.iterdir()))),
        )
    if kind == 2:
        data = ["--data_folder", samples.prepared, "--split", "val", "--beam_sizes", 1]
        return Case("eval.py", [*given, *data])
    if kind == 3:
        return Case("view_captions.py", [*given, "--img", samples.images[0]])
    data = ["--annotations", samples.demo / "train.csv", "--image_folder", samples.images[0].parent]
    return Case("train_model.py", [*data, "--base_model", blip, "--epochs", 1, "--workers", 1])


ODD_TEXTS = (
    "", "-1", "0", "1", "nan", "inf", "1e400", "9" * 5000, "--", "x", "\x1b[2J", "a\nb", "None", "true", "2",
    "/dev/zero", "/proc/self/mem", "..", ".", "a/b/c", "\udcff", "1,2", "é",
)  # fmt: skip


def settings_case(samples: Samples, folder: Path, rng: random.Random) -> Case:
    """One to three odd values of settings, where there are no data: a script that accepts them finds none."""
    script = rng.choice(SCRIPTS)
    module = __import__(script.removesuffix(".py"))
    names = list(module.Settings.__dataclass_fields__)
    arguments = []
    for name in rng.sample(names, rng.randrange(1, 4)):
        value = os.fsencode(rng.choice(ODD_TEXTS)).decode("utf-8", "surrogateescape")
        arguments += rng.choice([[f"--{name}={value}"], [f"--{name}", value], [f"--{name}"]])
    if script in ("run_pipeline.py", "make_demo_data.py"):  # these make data where there are none
        arguments += ["--annotations", "none.csv"] if script == "run_pipeline.py" else []
        arguments = [argument for argument in arguments if script != "make_demo_data.py" or argument != "1"]
    return Case(script, arguments)


SCRIPTS = (
    "caption.py", "caption_from_checkpoint.py", "convert_checkpoint.py", "create_input_files.py",
    "direct_caption.py", "eval.py", "run_pipeline.py", "train.py", "train_model.py", "view_captions.py",
)  # fmt: skip


def pipeline_case(samples: Samples, folder: Path, rng: random.Random) -> Case:
    """The whole pipeline on damaged data, or again where something of what it made is damaged."""
    shutil.copytree(samples.demo, folder / "d")
    data = folder / "d"
    place = rng.choice(["train.csv", "test.csv", "test_captions.csv", "train/train", "test/test"])
    target = data / place
    if target.is_dir():
        odd_image(rng.choice(sorted(target.iterdir())), rng)
    else:
        target.write_bytes(mutate(target.read_bytes(), rng))
    model = rng.choice(["attention", "attention", "blip"])
    given = ["--annotations", data / "train.csv", "--image_folder", data / "train" / "train", *SMALL]
    given += ["--test_folder", data / "test" / "test", "--model", model, "--blip_epochs", 1]
    given += ["--image_size", 32, "--min_word_freq", 1, "--blip_base", "tiny", "--beam_size", 1]
    if model == "attention" and rng.random() < 0.6:
        copy_files(samples.prepared, folder / "data_output")
        copy_files(samples.models, folder / "output_models")
        file = rng.choice([*(folder / "data_output").iterdir(), *(folder / "output_models").iterdir()])
        if file.suffix == ".json":
            damage_json(file, rng)
        else:
            file.write_bytes(mutate(file.read_bytes(), rng))
    return Case("run_pipeline.py", given)


HOSTILE = ("\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "a\rb", "a\nb", "\u202eabc", "\x07", "\udcff", "\u2028")


def names_case(samples: Samples, folder: Path, rng: random.Random) -> Case:
    """Names of files, folders and images that would move the cursor, forge a line, or cannot be printed."""
    name, images = f"x{rng.choice(HOSTILE)}y", samples.demo / "test" / "test"
    checkpoint = folder / f"{name}.pth"
    shutil.copy(samples.models / "best_checkpoint.pth", checkpoint)
    odd = folder / f"{name}d"
    odd.mkdir()
    shutil.copy(samples.images[0], odd / f"{name}.jpg")
    shutil.copy(samples.images[1], odd / "b.jpg")
    references = odd / f"{name}.json"
    image_id = name.replace("\udcff", "\ufffd")
    entries = [{"image_id": image_id, "caption": f"a dog {image_id}"}, {"image_id": "b", "caption": "a cat"}]
    references.write_text(json.dumps(entries))
    coco = odd / f"{name}_coco.json"
    coco.write_text(json.dumps({
        "images": [{"id": image_id, "file_name": f"{name}.jpg"}, {"id": "b", "file_name": "b.jpg"}],
        "annotations": [{"image_id": entry["image_id"], "caption": entry["caption"]} for entry in entries],
    }))  # fmt: skip
    prepared = copy_files(samples.prepared, odd / "data")
    photo, output, csv_file = odd / f"{name}.jpg", odd / f"{name}o", odd / f"{name}.csv"
    model, data, scored = ["--model", checkpoint], ["--data_folder", prepared], ["--submission", references]
    scored += ["--references", coco]
    annotated = ["--annotations", coco, "--image_folder", odd, "--output_folder", output]
    given = {
        "caption.py": rng.choice([
            [photo, *model], ["--test_folder", odd, *model, "--output_csv", csv_file],
            ["--test_folder", odd, *model, "--sidecars", "--prefix", image_id],
        ]),
        "caption_from_checkpoint.py": ["--checkpoint", checkpoint, checkpoint, "--test_folder", odd],
        "direct_caption.py": [photo, "--model_path", samples.blip, "--max_new_tokens", 8],
        "eval.py": rng.choice([
            [*scored, "--output_captions", csv_file, "--output_json", odd / f"{name}2"],
            [*scored, "--image_folder", odd, "--worst", 2, "--figure", odd / f"{name}.png"],
            [*data, "--checkpoint", checkpoint, "--split", "val", "--beam_sizes", 1],
        ]),
        "view_captions.py": rng.choice([
            [*scored, "--image_folder", odd, "--output_folder", output],
            ["--img", photo, "--checkpoint", checkpoint, "--output_folder", output, "--figures", odd / name],
        ]),
        "create_input_files.py": [*annotated, "--min_word_freq", 1, "--image_size", 32, "--val_fraction", 0],
        "train.py": rng.choice([
            [*data, "--output_folder", output, *SMALL],
            [*data, "--output_folder", output, "--checkpoint", checkpoint, "--epochs", 2, "--workers", 0],
        ]),
        "train_model.py": [*annotated, "--base_model", "tiny", "--epochs", 1, "--val_fraction", 0.5],
        "convert_checkpoint.py": ["--checkpoint", checkpoint],
        "run_pipeline.py": [
            *annotated, "--test_folder", images, *SMALL, "--data_folder", odd / f"{name}p", "--output_csv",
            csv_file, "--min_word_freq", 1, "--image_size", 32, "--val_fraction", 0.5,
        ],
        "make_demo_data.py": ["--output_folder", output, "--train_images", 10, "--test_images", 10],
    }  # fmt: skip
    script = rng.choice(list(given))
    return Case(script, given[script])


KINDS = {  # and how often each is tried
    images_case: 8, texts_case: 8, sidecars_case: 4, prepared_case: 5, checkpoint_case: 6, blip_case: 5,
    settings_case: 6, pipeline_case: 2, names_case: 3,
}  # fmt: skip

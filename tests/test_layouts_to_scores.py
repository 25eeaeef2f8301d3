"""From annotations as people have them to scores, in one command each."""

import json
import random
import shutil
from pathlib import Path

import pytest
from conftest import draw_demo

from captioning.data.annotations import read_annotations
from captioning.data.submissions import write_submission

SMALL = ["--encoder_name", "efficientnet_lite0", "--epochs", 2, "--image_size", 64, "--emb_dim", 16]
SMALL += ["--attention_dim", 16, "--decoder_dim", 32, "--decoder_lr", 1e-2, "--min_word_freq", 2]
SMALL += ["--workers", 1]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 60 drawn images, and {split: {file: captions}} with 40, 8 and 12 of them."""
    demo = draw_demo(tmp_path_factory.mktemp("drawn") / "demo", 48, 12)
    folder, splits = tmp_path_factory.mktemp("photos"), {"train": {}, "val": {}, "test": {}}
    records = read_annotations(demo / "train.csv", demo / "train" / "train")
    records += read_annotations(demo / "test_captions.csv", demo / "test" / "test")
    for number, record in enumerate(records):
        name = f"{1000268201 + 7919 * number}_{number:010x}.jpg"
        shutil.copy(record.path, folder / name)
        splits["train" if number < 40 else "val" if number < 48 else "test"][name] = record.captions
    return folder, splits


def run(run_script, folder: Path, *arguments) -> str:
    result = run_script("run_pipeline.py", *arguments, *SMALL, cwd=folder)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "test scores:" in result.stdout and "BLEU-4" in result.stdout and "CIDEr" in result.stdout
    return result.stdout


@pytest.mark.slow
def test_flickr8k_as_it_was_published(photos, tmp_path, run_script):
    images, splits = photos
    shutil.copytree(images, tmp_path / "Flicker8k_Dataset")
    text = tmp_path / "Flickr8k_text"
    text.mkdir()
    lines = [
        f"{name}#{number}\t{caption}\n"
        for own in splits.values()
        for name, captions in own.items()
        for number, caption in enumerate(captions)
    ]
    (text / "Flickr8k.token.txt").write_text("".join(lines))
    for split, kind in (("train", "train"), ("val", "dev"), ("test", "test")):
        (text / f"Flickr_8k.{kind}Images.txt").write_text("".join(f"{name}\n" for name in splits[split]))
    command = ["--annotations", "Flickr8k_text/Flickr8k.token.txt", "--image_folder", "Flicker8k_Dataset"]
    out = run(run_script, tmp_path, *command)
    assert "the test split of Flickr8k_text/Flickr8k.token.txt is captioned and scored" in out
    assert "12 images captioned: captions in submission.csv" in out and "test_csv" not in out
    again = run(run_script, tmp_path, *command)
    assert again.count("up to date, skipped") == 3
    assert again.partition("test scores:")[2] == out.partition("test scores:")[2]


@pytest.mark.slow
def test_a_folder_of_images_with_sidecars(photos, tmp_path, run_script):
    images, splits = photos
    for folder, names in (("photos", splits["train"] | splits["val"]), ("test_photos", splits["test"])):
        (tmp_path / folder).mkdir()
        for name, captions in names.items():
            shutil.copy(images / name, tmp_path / folder)
            (tmp_path / folder / name).with_suffix(".txt").write_text("\n".join(captions))
    folders = ["--annotations", "photos", "--image_folder", "photos"]
    out = run(
        run_script, tmp_path, *folders, "--test_annotations", "test_photos", "--test_folder", "test_photos",
        "--val_fraction", 0.2,
    )  # fmt: skip
    assert "train 38 images" in out and "12 images captioned" in out


@pytest.mark.slow
def test_a_metadata_folder(photos, tmp_path, run_script):
    images, splits = photos
    shutil.copytree(images, tmp_path / "dataset" / "images")
    with (tmp_path / "dataset" / "metadata.jsonl").open("w") as stream:
        for split, names in splits.items():
            for name, captions in names.items():
                entry = {"file_name": f"images/{name}", "text": captions, "split": split}
                stream.write(json.dumps(entry) + "\n")
    data = ["--annotations", "dataset", "--image_folder", "dataset"]
    out = run(run_script, tmp_path, *data, "--model", "both", "--blip_base", "tiny", "--blip_epochs", 1)
    assert out.count("12 images captioned") == 2 and "BLIP" in out.partition("test scores:")[2]


def test_a_friends_table_is_scored(tmp_path, run_script):
    """Semicolons, cp1252, column names of its own, extensions, 27 of 30 rows."""
    rng = random.Random(0)
    things = ["Hund läuft über die Wiese", "Vogel sitzt auf dem Dach", "Mann trägt grüne Schuhe"]
    captions = {f"IMG_{number:03}": f"Ein {rng.choice(things)} {number}" for number in range(30)}
    write_submission(tmp_path / "test_captions.csv", list(captions.items()))
    rows = "".join(f"{name}.JPG;{text}\r\n" for name, text in list(captions.items())[3:])
    (tmp_path / "freund.csv").write_bytes(f"Dateiname;Beschreibung\r\n{rows}".encode("cp1252"))
    command = ["--submission", "freund.csv", "--references", "test_captions.csv"]
    result = run_script("eval.py", *command, cwd=tmp_path)
    assert result.returncode == 2 and "3 ids missing (IMG_000, IMG_001, IMG_002)" in result.stderr
    assert "or give --partial" in result.stderr
    result = run_script("eval.py", *command, "--partial", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "freund.csv: not UTF-8; read as cp1252" in result.stdout
    assert "Dateiname is taken for the images, Beschreibung for the captions" in result.stdout
    assert "PARTIAL: freund.csv has captions of 27 of 30 images, 3 missing\n" in result.stdout
    assert "1.0000" in result.stdout

"""view_captions.py as people call it: models, files of captions, one image; few, bad and missing images."""

import base64
import json
import os
import re
import shutil

import numpy as np
import pytest
from conftest import assert_one_line
from PIL import Image

import view_captions
from captioning.captioners.attention import Captioner
from captioning.data.annotations import read_annotations
from captioning.data.submissions import write_submission
from captioning.report import gallery
from utils import UserError


def data_of(folder) -> dict:
    """The content of a gallery's data.js."""
    text = (folder / "data.js").read_text(encoding="ascii")
    return json.loads(text.removeprefix("window.GALLERY = ").rstrip().removesuffix(";"))


def maps_of(folder, image: int, model: int, grid) -> np.ndarray:
    text = (folder / "attention" / f"{image // 100:03d}.js").read_text()
    rows = json.loads(text[text.index("[") : text.rindex("]") + 1])
    values = np.frombuffer(base64.b64decode(rows[image % 100][model]), dtype=np.uint8)
    return values.reshape(-1, *grid)


@pytest.fixture
def submission(demo, tmp_path):
    """The first reference of each test image as a file of captions."""
    records = read_annotations(demo / "test_captions.csv")
    write_submission(tmp_path / "s.csv", [(record.image_id, record.captions[0]) for record in records])
    return tmp_path / "s.csv"


def test_a_model_s_gallery(prepared, models, tmp_path, run_script):
    result = run_script(
        "view_captions.py", "--checkpoint", models / "best_checkpoint.pth", models / "checkpoint_epoch_2.pth",
        "--data_folder", prepared, "--output_folder", tmp_path / "g", "--beam_size", 2,
        "--figures", tmp_path / "figures", "--limit", 5,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert f"open in a browser: {tmp_path / 'g' / 'index.html'}" in result.stdout
    data = data_of(tmp_path / "g")
    assert [model["name"] for model in data["models"]] == ["best_checkpoint.pth", "checkpoint_epoch_2.pth"]
    assert len(data["images"]) == 5 == len(list((tmp_path / "g" / "images").iterdir()))
    captioner = Captioner.load(models)
    paths = json.loads((prepared / "test_image_paths.json").read_text())[:5]
    for i, caption in enumerate(captioner.caption(paths, beam_size=2, details=True)):
        own = data["images"][i]["captions"][0]
        assert own["words"] == caption.words and own["logProb"] == pytest.approx(caption.log_prob, abs=1e-3)
        if caption.words:
            maps = maps_of(tmp_path / "g", i, 0, data["models"][0]["grid"])
            peaks = caption.attention.amax(dim=(1, 2), keepdim=True)
            assert maps == pytest.approx((caption.attention / peaks * 255).numpy(), abs=1.1)
    quality = json.loads((tmp_path / "g" / "quality.json").read_text())
    assert quality["best_checkpoint.pth"]["captions"] == 5
    assert quality["best_checkpoint.pth"]["in_training"] is not None
    figures = list((tmp_path / "figures").glob("model1_*.png"))
    assert len([file for file in figures if file.name != "model1_mean_attention.png"]) == 5
    assert len(data["comparisons"]) == 1 and data["comparisons"][0]["images"] == 5


def test_files_of_captions_are_compared(demo, submission, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other" / "s.csv"
    write_submission(other, [(r.image_id, "a dog") for r in read_annotations(demo / "test_captions.csv")])
    monkeypatch.chdir(tmp_path)
    view_captions.main(
        view_captions.Settings(
            submission=(str(submission), str(other)), references=str(demo / "test_captions.csv")
        )
    )
    data = data_of(tmp_path / "gallery")
    assert [model["name"] for model in data["models"]] == [str(submission), str(other)]
    (pair,) = data["comparisons"]
    assert (pair["wins"], pair["losses"]) == (0, 12) and "more than chance" in capsys.readouterr().out
    assert all(image["size"] for image in data["images"])  # found beside the references
    assert len(data["images"][0]["references"]) == 5


def test_blip_beside_an_attention_model(prepared, models, blip_folder, tmp_path):
    view_captions.main(
        view_captions.Settings(
            checkpoint=(str(models),), model_path=(str(blip_folder),), data_folder=str(prepared),
            beam_size=1, output_folder=str(tmp_path / "g"),
        )
    )  # fmt: skip
    data = data_of(tmp_path / "g")
    assert [model["grid"] for model in data["models"]] == [[14, 14], [8, 8]]
    captions = [image["captions"][1]["words"] for image in data["images"]]
    longest, words = max(enumerate(captions), key=lambda item: len(item[1]))
    maps = maps_of(tmp_path / "g", longest, 1, (8, 8))
    assert len(maps) == len(words) > 1 and (maps.max(axis=(1, 2)) == 255).all()
    assert not (maps[0] == maps[1]).all()


def test_one_image_and_its_n_best(demo, models, tmp_path, run_script):
    image = demo / "test" / "test" / "test_0003.jpg"
    result = run_script(
        "view_captions.py", "--img", image, "--checkpoint", models, "--beam_size", 4,
        "--output_folder", tmp_path / "g",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    data = data_of(tmp_path / "g")
    found = Captioner.load(models).caption(image, 4, details=True).n_best
    assert [row["words"] for row in data["images"][0]["captions"]] == [caption.words for caption in found]
    assert [model["name"] for model in data["models"]] == [f"{k}. best" for k in (1, 2, 3, 4)]


@pytest.mark.parametrize("count", [1, 2])
def test_few_images_and_no_references(count, demo, models, tmp_path, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(1, count + 1):
        shutil.copy(demo / "test" / "test" / f"test_000{number}.jpg", folder)
    (folder / "broken.jpg").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    settings = {"checkpoint": (str(models),), "image_folder": str(folder), "data_folder": "none"}
    view_captions.main(view_captions.Settings(**settings))
    data = data_of(tmp_path / "gallery")
    assert len(data["images"]) == count and data["scores"] == [] and data["comparisons"] == []
    assert data["models"][0]["quality"]["captions"] == count


def test_models_of_different_images_are_scored_on_those_that_all_have(demo, submission, tmp_path, capsys):
    records = read_annotations(demo / "test_captions.csv")
    other = tmp_path / "other.csv"
    write_submission(
        other, [(r.image_id, r.captions[0] if n < 9 else "a cat") for n, r in enumerate(records)][2:]
    )
    write_submission(submission, [(record.image_id, record.captions[0]) for record in records[:9]])
    settings = {"references": str(demo / "test_captions.csv"), "output_folder": str(tmp_path / "g")}
    view_captions.main(view_captions.Settings(submission=(str(submission), str(other)), **settings))
    data = data_of(tmp_path / "g")
    first, second = (model["overall"] for model in data["models"])
    assert first == second, "their captions differ where the other has none"
    assert (
        "scored on the 7 images that all have; left out: 2 of s.csv, 3 of other.csv"
        in capsys.readouterr().out
    )
    own = [image["captions"] for image in data["images"]]
    assert len(own) == 12


def test_images_that_are_missing_or_damaged(demo, submission, tmp_path, capsys):
    folder = tmp_path / "images"
    shutil.copytree(demo / "test" / "test", folder)
    (folder / "test_0001.jpg").unlink()
    (folder / "test_0002.jpg").write_bytes(b"no image")
    view_captions.main(
        view_captions.Settings(
            submission=(str(submission),), references=str(demo / "test_captions.csv"),
            image_folder=str(folder), output_folder=str(tmp_path / "g"),
        )
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "test_0001: no image file" in printed and "test_0002.jpg: not a readable image" in printed
    images = data_of(tmp_path / "g")["images"]
    assert [image["id"] for image in images if image["size"] is None] == ["test_0001", "test_0002"]


def test_ids_and_captions_are_data(demo, tmp_path):
    strange = "x</script>\u2028<b>'\"&"
    caption = "</script><script>alert(1)</script>"
    Image.new("RGB", (4, 3)).save(tmp_path / "a.png")
    write_submission(tmp_path / "s.csv", [(strange, caption)])
    write_submission(tmp_path / "r.csv", [(strange, "a dog")])
    view_captions.main(
        view_captions.Settings(
            submission=(str(tmp_path / "s.csv"),), references=str(tmp_path / "r.csv"),
            output_folder=str(tmp_path / "g"), image_folder=str(tmp_path),
        )
    )  # fmt: skip
    (image,) = data_of(tmp_path / "g")["images"]
    assert image["id"] == strange and image["captions"][0]["words"] == caption.split()
    page = (tmp_path / "g" / "index.html").read_text(encoding="utf-8")
    assert strange not in page and "alert" not in page
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", page)
    assert not re.search(r"""(src|href)=["']?(https?:)?//|url\(|@import|fetch\(|XMLHttpRequest""", page)


def test_an_earlier_gallery_is_replaced_and_nothing_else(demo, submission, tmp_path):
    settings = view_captions.Settings(
        submission=(str(submission),), references=str(demo / "test_captions.csv"),
        output_folder=str(tmp_path / "g"),
    )  # fmt: skip
    view_captions.main(settings)
    (tmp_path / "g" / "images" / "99999.jpg").write_bytes(b"old")
    (tmp_path / "g" / "images" / "mine.jpg").write_bytes(b"mine")
    view_captions.main(settings)
    assert not (tmp_path / "g" / "images" / "99999.jpg").exists()
    assert (tmp_path / "g" / "images" / "mine.jpg").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.html").write_text("<h1>Somebody's page</h1>")
    settings.output_folder = str(tmp_path / "other")
    with pytest.raises(UserError, match="another page"):
        view_captions.main(settings)


def test_links_in_a_gallery_s_folder_lead_nothing_out_of_it(demo, submission, tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "g"
    outside.mkdir(), folder.mkdir()
    names = ("00000.jpg", "000.js", "index.html", "data.js", "quality.json")
    for name in names:
        (outside / name).write_text(gallery.MARK)
    settings = view_captions.Settings(
        submission=(str(submission),),
        references=str(demo / "test_captions.csv"),
        image_folder=str(demo / "test" / "test"),
        output_folder=str(folder),
    )
    for part in ("images", "attention"):
        (folder / part).symlink_to(outside)
        with pytest.raises(UserError, match=f"{folder}/{part}: a link to another folder"):
            view_captions.main(settings)
        (folder / part).unlink()
    for name in names[2:]:
        (folder / name).symlink_to(outside / name)
    (folder / f".gallery.{os.getpid()}.partial").symlink_to(outside)
    view_captions.main(settings)
    assert sorted(os.listdir(outside)) == sorted(names)
    assert all((outside / name).read_text() == gallery.MARK for name in names)
    assert len(os.listdir(folder / "images")) == 12 and not (folder / "index.html").is_symlink()


def test_wrong_input_gets_one_line(demo, models, submission, tmp_path, run_script):
    script = "view_captions.py"
    common = ("--output_folder", tmp_path / "g", "--data_folder", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    references = demo / "test_captions.csv"
    for arguments, part in (
        (("--checkpoint", models), "no prepared data"),
        (("--checkpoint", models, "--image_folder", tmp_path / "empty"), "no images in it"),
        (("--checkpoint", models, "--image_folder", "nowhere"), "nowhere: no such folder"),
        (
            ("--checkpoint", models, "--references", references, "--image_folder", tmp_path / "empty"),
            "no image",
        ),
        (("--submission", "nowhere.csv", "--references", references), "nowhere.csv"),
        (("--submission", references, "--references", references), "more than once"),
        (("--checkpoint", "no.pth", "--references", references), "no.pth: no such checkpoint"),
        (("--img", "nowhere.jpg"), "nowhere.jpg: no such image"),
        (("--img", "a.jpg", "--submission", submission), "--img"),
    ):
        assert_one_line(run_script(script, *arguments, *common, cwd=tmp_path), part)

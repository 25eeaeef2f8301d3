"""Images of annotations, several files together, splits, the lengths and the case of captions."""

import json
import sys
from pathlib import Path

import pytest
from layouts import (
    HEADER,
    PHOTOS,
    ROWS,
    SPLITS,
    TEXTS,
    by_create_input_files,
    draw_photos,
    table,
    write_layout,
)
from PIL import Image

import create_input_files
import eval as evaluation
import metrics
from captioning.data.annotations import read_annotations
from captioning.data.submissions import write_submission
from metrics import MeteorDataError
from utils import UserError, read_json


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return draw_photos(tmp_path_factory.mktemp("drawn") / "Images")


@pytest.fixture(autouse=True)
def no_meteor(monkeypatch):
    """Scoring as where pycocoevalcap is not installed: quicker, and METEOR does not matter here."""

    def missing():
        raise MeteorDataError("not in these tests")

    monkeypatch.setattr(metrics, "Meteor", missing)


# --- images, and several files ------------------------------------------------------------------------------


def draw(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / name)
    return folder


def paths(folder: Path, names, folders=None) -> dict[str, str | None]:
    """The image that is found for each name, by its path in the folder."""
    (folder / "x.csv").write_text(table([(name, "A dog runs") for name in names], HEADER), encoding="utf-8")
    records = read_annotations(folder / "x.csv", folders or folder / "images")
    return {own.image_id: own.path and Path(own.path).relative_to(folder).as_posix() for own in records}


def test_the_longest_end_of_the_path_decides(tmp_path):
    draw(tmp_path / "images", "a.jpg", "cats/b.jpg", "dogs/b.jpg", "dogs/deep/c.jpg", "d.png", "cats/x/e.jpg")
    assert paths(
        tmp_path, ["C:\\data\\a.jpg", "D:/all/cats/b.jpg", "x/dogs/b", "deep/c", "/y/d.jpg", "e.jpg"]
    ) == {
        "C:\\data\\a.jpg": "images/a.jpg",
        "D:/all/cats/b.jpg": "images/cats/b.jpg",
        "x/dogs/b": "images/dogs/b.jpg",
        "deep/c": "images/dogs/deep/c.jpg",
        "/y/d.jpg": "images/d.png",
        "e.jpg": "images/cats/x/e.jpg",
    }
    with pytest.raises(
        UserError, match=r"b.jpg: may be .*cats/b.jpg or .*dogs/b.jpg; write more of its folders"
    ):
        paths(tmp_path, ["b.jpg"])


def test_another_image_of_the_same_name_is_not_taken(tmp_path, capsys):
    """What is missing in its own folder is not what another folder has, nor do two names mean one file."""
    draw(tmp_path / "images", "cats/a.jpg", "dogs/b.jpg")
    assert paths(tmp_path, ["cats/b.jpg", "dogs/b.jpg"]) == {
        "cats/b.jpg": None,
        "dogs/b.jpg": "images/dogs/b.jpg",
    }
    assert paths(tmp_path, ["x/a.jpg", "y/a.jpg"]) == {"x/a.jpg": None, "y/a.jpg": None}
    assert "2 names without an image, as others fit it" in capsys.readouterr().out


def test_coco_numbers_with_zeros_and_without(tmp_path):
    draw(tmp_path / "images", "COCO_val2014_000000000042.jpg", "000000000007.jpg", "0100.jpg")
    assert paths(tmp_path, ["42", "000000000007", "7x", "100"]) == {
        "42": "images/COCO_val2014_000000000042.jpg",
        "000000000007": "images/000000000007.jpg",
        "7x": None,
        "100": "images/0100.jpg",
    }


def test_ids_of_captions_match_those_of_references(tmp_path, capsys):
    """COCO's layout with numbers that are not those in the names; captions by name, by path, by id."""
    images = [{"id": number, "file_name": f"data/{11 - number:04}.jpg"} for number in range(1, 11)]
    captions = [{"image_id": number, "caption": f"this is dog {number}"} for number in range(1, 11)]
    (tmp_path / "r.json").write_text(json.dumps({"images": images, "annotations": captions}))
    for name in ("{id}", "data/{file}", "{file}", "{stem}", "C:\\x\\{file}", "images/{stem}.png"):
        rows = []
        for image, caption in zip(images, captions):
            file = Path(image["file_name"]).name
            known = {"id": image["id"], "file": file, "stem": Path(file).stem}
            rows.append((name.format(**known), caption["caption"]))
        write_submission(tmp_path / "s.csv", rows[::-1])
        row = evaluation.score_submission(tmp_path / "s.csv", tmp_path / "r.json")
        assert row["scores"].overall["Bleu_4"] == pytest.approx(1), name
    assert "10 ids matched by the end of the path" in capsys.readouterr().out


def test_several_files_and_folders(tmp_path, capsys):
    for name in ("first", "second"):
        draw(tmp_path / name, "a.jpg", f"{name}.jpg")
        (tmp_path / f"{name}.csv").write_text(f"image,caption\na.jpg,In the {name}\n{name}.jpg,Alone\n")
    files, folders = ([tmp_path / f"{name}{end}" for name in ("first", "second")] for end in (".csv", ""))
    records = read_annotations(files, folders)
    assert {own.image_id: (own.path, own.captions) for own in records} == {
        "a.jpg": (str(tmp_path / "first/a.jpg"), ["In the first"]),
        "first.jpg": (str(tmp_path / "first/first.jpg"), ["Alone"]),
        "second/a.jpg": (str(tmp_path / "second/a.jpg"), ["In the second"]),
        "second.jpg": (str(tmp_path / "second/second.jpg"), ["Alone"]),
    }
    assert "1 id of other images in an earlier file" in capsys.readouterr().out
    more = tmp_path / "more.csv"
    more.write_text("image,caption\na.jpg,Again\nsecond.jpg,Again\n")
    records = read_annotations([tmp_path / "second.csv", more], tmp_path / "second")
    assert {own.image_id: own.captions for own in records} == {
        "a.jpg": ["In the second", "Again"], "second.jpg": ["Alone", "Again"],
    }  # fmt: skip
    with pytest.raises(
        UserError, match=r"a.jpg: may be .*first.*a.jpg or .*second.*a.jpg; give each file its own"
    ):
        read_annotations(more, folders)


def test_images_of_parquet_are_written_once(tmp_path, monkeypatch):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    draw(tmp_path, "a.png", "b.jpg")
    content = [(tmp_path / name).read_bytes() for name in ("a.png", "b.jpg")]
    entries = [
        {"image": {"bytes": content[0], "path": "../../x/a.png"}, "text": "A dog", "split": "train"},
        {"image": {"bytes": content[1], "path": None}, "text": "A cat", "split": "test"},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(entries), tmp_path / "d.parquet")
    for _ in range(2):
        records = read_annotations(tmp_path / "d.parquet", tmp_path / "out")
        assert [(own.image_id, own.captions, own.split) for own in records] == [
            ("x/a.png", ["A dog"], "train"), ("d_000002", ["A cat"], "test"),
        ]  # fmt: skip
        assert [Path(own.path).read_bytes() for own in records] == content
        assert sorted(path.name for path in (tmp_path / "out").rglob("*.*")) == ["a.png", "d_000002.jpg"]
    strange = [
        {"image": {"bytes": content[0], "path": "x\0y:z/\n.png"}, "text": "A dog"},
        {"image": {"bytes": content[0], "path": "0.png"}, "text": "A dog"},
        {"image": {"bytes": content[0], "path": "0.png"}, "text": "Again"},
        {"image": {"bytes": content[1], "path": "0.png"}, "text": "Another image of the same name"},
        {"image": {"bytes": content[1], "path": "cats\\0.png"}, "text": "In a folder"},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(strange), tmp_path / "e.parquet")
    records = read_annotations(tmp_path / "e.parquet", tmp_path / "strange")
    assert [Path(own.path).relative_to(tmp_path / "strange").as_posix() for own in records] == [
        "x_y_z/_.png", "0.png", "e_000004.jpg", "cats/0.png",
    ]  # fmt: skip
    assert records[1].captions == ["A dog", "Again"]
    (tmp_path / "out" / "x" / "a.png").write_bytes(b"mine")
    with pytest.raises(UserError, match="is another image than the annotations'"):
        read_annotations(tmp_path / "d.parquet", tmp_path / "out")
    assert (tmp_path / "out" / "x" / "a.png").read_bytes() == b"mine"
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(
            UserError, match=r"d.parquet: to read Parquet, pip install pyarrow; or save it as CSV"
        ):
            read_annotations(tmp_path / "d.parquet")
    (tmp_path / "d.parquet").write_bytes((tmp_path / "d.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"d.parquet: not a Parquet file, or damaged"):
        read_annotations(tmp_path / "d.parquet", tmp_path / "out")


# --- Flickr8k's lists, splits, lengths, case ----------------------------------------------------------------


def write_flickr8k(folder: Path) -> Path:
    """The text folder as it was published: captions, and a list for each split."""
    (folder / "Flickr8k.token.txt").write_text(TEXTS["Flickr8k.token.txt"][1], encoding="utf-8")
    for split, kind in (("train", "train"), ("val", "dev"), ("test", "test")):
        names = [name for name in PHOTOS if SPLITS[name] == split]
        (folder / f"Flickr_8k.{kind}Images.txt").write_text("\n".join(names) + "\n")
    return folder / "Flickr8k.token.txt"


def test_flickr8k_with_its_lists(images, tmp_path, capsys):
    file = write_flickr8k(tmp_path)
    assert {own.image_id: own.split for own in read_annotations(file, images)} == SPLITS
    assert "its splits are those of the lists beside it" in capsys.readouterr().out
    listed = read_annotations(tmp_path / "Flickr_8k.testImages.txt", images)
    assert [own.image_id for own in listed] == [name for name in PHOTOS if SPLITS[name] == "test"]
    (tmp_path / "Flickr_8k.devImages.txt").write_text(next(iter(PHOTOS)))
    with pytest.raises(UserError, match="is in the list of another split too"):
        read_annotations(file, images)


def test_a_changed_list_or_sidecar_is_noticed(images, tmp_path):
    def inputs(file):
        return create_input_files.input_files(create_input_files.Settings(str(file), str(images)))

    before = inputs(write_flickr8k(tmp_path))
    (tmp_path / "Flickr_8k.testImages.txt").write_text("x.jpg\n")
    assert len(before) == 4 and inputs(tmp_path / "Flickr8k.token.txt") != before
    (folder,), _ = write_layout("sidecars", images, tmp_path)
    before = inputs(folder)
    next(Path(folder).glob("*.txt")).write_text("Another caption")
    assert inputs(folder) != before


def test_without_images_to_validate_on_some_are_drawn(images, tmp_path, capsys):
    splits = {name: "train" if split == "val" else split for name, split in SPLITS.items()}
    rows = [(*row, splits[row[0]]) for row in ROWS] + [("x.jpg", "A dog", "")]
    (tmp_path / "x.csv").write_text(table(rows[:-1], (*HEADER, "split")), encoding="utf-8")
    settings = create_input_files.Settings(str(tmp_path / "x.csv"), str(images), val_fraction=0.25)
    found = create_input_files.read_splits(settings)
    assert {split: len(records) for split, records in found.items()} == {"train": 3, "val": 1, "test": 2}
    assert "has no val split; a share of its train split is held out" in capsys.readouterr().out


def test_captions_that_are_too_long_are_counted(images, tmp_path, capsys):
    rows = [*ROWS, (ROWS[0][0], "word " * 60), ("1009434119_febe49276a.jpg", "word " * 55)]
    rows = [row for row in rows if row[0] != ROWS[4][0]] + [(ROWS[4][0], "word " * 70)]
    (tmp_path / "x.csv").write_text(table(rows, HEADER), encoding="utf-8")
    by_create_input_files([str(tmp_path / "x.csv")], [str(images)], tmp_path)
    out = capsys.readouterr().out
    assert "captions have more than 50 words, up to 70, and are left out; --max_len takes longer" in out
    record = read_json(tmp_path / "out" / "prepared.json")
    assert record["skipped"] == [[ROWS[4][0], "captions of 70 words: raise --max_len 50"]]
    by_create_input_files([str(tmp_path / "x.csv")], [str(images)], tmp_path, max_len=70)
    assert "left out" not in capsys.readouterr().out


def test_case_is_kept_in_the_vocabulary(images, tmp_path):
    (tmp_path / "x.csv").write_text(table(ROWS, HEADER), encoding="utf-8")
    for lowercase in (True, False):
        by_create_input_files([str(tmp_path / "x.csv")], [str(images)], tmp_path, lowercase=lowercase)
        words = read_json(tmp_path / "out" / "word_map.json").keys()
        assert ("Hund" in words, "hund" in words) == (not lowercase, lowercase)

"""One image under several names, in one file or several; splits that are listed beside the captions."""

import json
from pathlib import Path

import pytest
from layouts import HEADER, PHOTOS, ROWS, SPLITS, TEXTS, lines_of, table
from PIL import Image

import create_input_files
import run_pipeline
import train
from captioning.data.annotations import read_annotations, split_records
from captioning.data.prepared import Record
from captioning.data.sidecars import Sidecars
from captioning.report.scoring import reference_records
from utils import UserError

CHINESE = "一只狗在绿色的草地上奔跑。"


def draw(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / name)
    return folder


def write(path: Path, *rows: tuple[str, ...], header=HEADER) -> Path:
    path.write_text(table(rows, header), encoding="utf-8")
    return path


def found(records) -> dict[str, list[str]]:
    """The captions by image file; no file may be there twice."""
    names = [Path(record.path).name for record in records if record.path]
    assert len(set(names)) == len(names)
    return {Path(record.path).name: record.captions for record in records if record.path}


# --- one image, several names -------------------------------------------------------------------------------

PAIRS = [  # two names of the image file 00000100.jpg
    ("00000100.jpg", "00000100"),
    ("100", "00000100"),
    ("00000100", "100"),
    ("/kaggle/input/x/00000100.jpg", "00000100.jpg"),
    ("00000100", "C:\\data\\00000100.jpg"),
    ("/kaggle/input/x/100", "000100"),
]


@pytest.mark.parametrize("names", PAIRS)
@pytest.mark.parametrize("files", [1, 2])
def test_captions_of_the_same_image_file_are_put_together(names, files, tmp_path, capsys):
    images = draw(tmp_path / "images", "00000100.jpg", "00000200.jpg")
    rows = [(names[0], "A dog runs"), ("200", "A hat"), (names[1], "A black dog")]
    annotations = [write(tmp_path / "a.csv", *rows[: 3 if files == 1 else 2])]
    if files == 2:
        annotations.append(write(tmp_path / "b.csv", rows[2]))
    records = read_annotations(annotations, images)
    assert found(records) == {"00000100.jpg": ["A dog runs", "A black dog"], "00000200.jpg": ["A hat"]}
    assert len(records) == 2 and [len(record.tokens) for record in records] == [2, 1]
    assert f"1 image under two names, such as {names[0]} and {names[1]}" in capsys.readouterr().out


def test_file_names_of_json_and_ids_of_a_table(tmp_path):
    images = draw(tmp_path / "images", "7.jpg", "8.jpg")
    coco = {
        "images": [{"id": 1, "file_name": "7.jpg"}, {"id": 2, "file_name": "8.jpg"}],
        "annotations": [{"image_id": number, "caption": f"Number {number}"} for number in (1, 2)],
    }
    (tmp_path / "a.json").write_text(json.dumps(coco))
    other = write(tmp_path / "b.csv", ("8", "Eight"), ("7", "Seven"))
    records = read_annotations([tmp_path / "a.json", other], images)
    assert found(records) == {"7.jpg": ["Number 1", "Seven"], "8.jpg": ["Number 2", "Eight"]}


def test_a_folder_that_a_link_leads_to_is_the_same(tmp_path):
    images = draw(tmp_path / "images", "a.jpg")
    (tmp_path / "linked").symlink_to(images)
    files = [write(tmp_path / f"{name}.csv", ("a.jpg", name)) for name in ("x", "y")]
    records = read_annotations(files, [images, tmp_path / "linked"])
    assert [record.captions for record in records] == [["x", "y"]]


def test_a_name_that_may_be_of_two_files_is_none_of_them(tmp_path, capsys):
    images = draw(tmp_path / "images", "a.jpg", "a.png", "b.jpg")
    file = write(tmp_path / "x.csv", ("a", "Which"), ("a.jpg", "A dog"), ("a.png", "A cat"), ("b", "A hat"))
    assert found(read_annotations(file, images)) == {
        "a.jpg": ["A dog"], "a.png": ["A cat"], "b.jpg": ["A hat"],
    }  # fmt: skip
    assert "1 name without an image, as others fit it too: a" in capsys.readouterr().out
    images = draw(tmp_path / "deep", "x/a.jpg", "x/a.png")
    file = write(tmp_path / "z.csv", ("x/a", "Which"), ("x/a.jpg", "A dog"), ("x/a.png", "A cat"))
    assert found(read_annotations(file, images)) == {"a.jpg": ["A dog"], "a.png": ["A cat"]}
    images = draw(tmp_path / "zeros", "0100.jpg", "00100.jpg")
    with pytest.raises(UserError, match=r"100: may be .*00100.jpg or .*0100.jpg; write all of its name"):
        read_annotations(write(tmp_path / "y.csv", ("100", "Which")), images)


def test_no_image_file_is_in_two_splits(tmp_path):
    names = [f"{number:08}" for number in range(1, 41)]
    images = draw(tmp_path / "images", *(f"{name}.jpg" for name in names))
    files = [
        write(tmp_path / "a.csv", *((name, "A dog") for name in names)),
        write(tmp_path / "b.csv", *((name.lstrip("0"), "A cat") for name in names)),
    ]
    settings = create_input_files.Settings(tuple(map(str, files)), str(images), val_fraction=0.3)
    splits = create_input_files.read_splits(settings)
    paths = {split: {record.path for record in records} for split, records in splits.items()}
    assert len(paths["train"]) == 28 and len(paths["val"]) == 12 and not paths["train"] & paths["val"]
    assert all(record.captions == ["A dog", "A cat"] for records in splits.values() for record in records)


def test_annotations_that_want_an_image_in_two_splits_are_refused(tmp_path):
    images = draw(tmp_path / "images", "00000100.jpg", "200.jpg")
    header = (*HEADER, "split")
    one = write(tmp_path / "a.csv", ("100", "A dog", "train"), ("200", "A hat", "val"), header=header)
    two = write(tmp_path / "b.csv", ("00000100", "A cat", "test"), header=header)
    with pytest.raises(UserError, match=r"100 is in the train split and as 00000100 in the test split"):
        read_annotations([one, two], images)
    with pytest.raises(UserError, match=r"c.csv: 200 is in the val split and in no split; mend one of them"):
        read_annotations([one, write(tmp_path / "c.csv", ("200", "A cat"))], images)
    settings = create_input_files.Settings(
        str(write(tmp_path / "train.csv", ("100", "A dog"), ("200", "A hat"))), str(images),
        str(write(tmp_path / "test.csv", ("00000100", "A dog"))), str(images), val_fraction=0,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"00000100.jpg: in the train and in the test split; remove it from"):
        create_input_files.read_splits(settings)


@pytest.mark.parametrize("names", PAIRS)
def test_references_are_put_together_without_images(names, tmp_path, capsys):
    one = write(tmp_path / "a.csv", (names[0], "A dog runs"), ("x/7", "A hat"), ("y/7", "A cat"))
    records = reference_records([one, write(tmp_path / "b.csv", (names[1], "A black dog"))])
    assert [own.captions for own in records] == [["A dog runs", "A black dog"], ["A hat"], ["A cat"]]
    assert f"1 image under two names, such as {names[0]} and {names[1]}" in capsys.readouterr().out


def test_a_list_of_images_to_caption_keeps_its_rows(tmp_path):
    images = draw(tmp_path / "images", "00000100.jpg")
    records = read_annotations(write(tmp_path / "test.csv", ("100",), ("00000100",), header=["id"]), images)
    assert [record.image_id for record in records] == ["100", "00000100"]


# --- lists of splits ----------------------------------------------------------------------------------------

LISTS = {"train": "Flickr_8k.trainImages.txt", "val": "Flickr_8k.devImages.txt"}
LISTS["test"] = "Flickr_8k.testImages.txt"


def write_lists(folder: Path, form: str) -> None:
    for split, name in LISTS.items():
        names = [form.format(name=name, stem=Path(name).stem) for name in PHOTOS if SPLITS[name] == split]
        (folder / name).write_text("\n".join(names) + "\n")


@pytest.mark.parametrize("form", ["{name}", "{stem}", "Flicker8k_Dataset/{name}", "C:\\x\\{stem}.JPG"])
@pytest.mark.parametrize("layout", ["Flickr8k.token.txt", "Flickr8k captions.txt", "Kaggle", "COCO"])
def test_lists_name_images_with_folder_and_extension_or_without(form, layout, tmp_path, capsys):
    name, text = TEXTS[layout]
    (tmp_path / name).write_text(text, encoding="utf-8")
    write_lists(tmp_path, form)
    splits = {
        Path(own.file_name or own.image_id).stem: own.split for own in read_annotations(tmp_path / name)
    }
    assert splits == {Path(name).stem: split for name, split in SPLITS.items()}
    assert (
        f"its splits are those of the lists beside it, {', '.join(LISTS.values())}" in capsys.readouterr().out
    )
    assert set(create_input_files.sources(tmp_path / name)) >= {str(tmp_path / own) for own in LISTS.values()}


def test_lists_of_other_images_end_the_run(tmp_path, capsys):
    file = tmp_path / "Flickr8k.token.txt"
    file.write_text(TEXTS["Flickr8k.token.txt"][1], encoding="utf-8")
    write_lists(tmp_path, "{name}")
    train = tmp_path / LISTS["train"]
    train.write_text("x1.jpg\nx2.jpg\n" + train.read_text() + "x3.jpg\n")
    read_annotations(file)
    assert f"{train}: 3 names not in {file}, such as x1.jpg" in capsys.readouterr().out
    train.write_text(train.read_text() + "x4.jpg\n")
    with pytest.raises(UserError) as error:
        read_annotations(file)
    first = next(iter(PHOTOS))
    for part in (f"{train}: 3 of its 7 names are in {file}", '"x1.jpg"', f"looked for names like {first}"):
        assert part in str(error.value)
    train.write_text("")
    with pytest.raises(UserError, match="it is empty"):
        read_annotations(file)
    captions = write(tmp_path / "captions.csv", ("y.jpg", "A dog runs"))  # whose lists they need not be
    train.unlink()
    assert [record.split for record in read_annotations(captions)] == [None]


# --- captions without blanks --------------------------------------------------------------------------------


def test_each_annotation_file_and_split_is_judged_alone(tmp_path, capsys):
    large = write(tmp_path / "large.csv", *((f"{number}.jpg", "A dog runs") for number in range(200)))
    small = write(tmp_path / "small.csv", *((f"x{number}.jpg", CHINESE) for number in range(5)))
    for files in ([large, small], [small, large]):
        with pytest.raises(UserError, match=r"small.csv: 5 of 5 captions are Chinese or Japanese without"):
            read_annotations(files)
    rows = [(f"{number}.jpg", "A dog runs", "train") for number in range(200)]
    rows += [(f"x{number}.jpg", CHINESE, "test") for number in range(5)]
    with pytest.raises(UserError, match=r"splits.csv: 5 of 5 captions are Chinese"):
        read_annotations(write(tmp_path / "splits.csv", *rows, header=(*HEADER, "split")))
    rows = [(f"{number}.jpg", CHINESE if number < 5 else "A dog runs") for number in range(72)]
    assert len(read_annotations(write(tmp_path / "some.csv", *rows))) == 72
    assert (
        f'some.csv: 5 of 72 captions are Chinese or Japanese without blanks between words ("{CHINESE}")'
        in (capsys.readouterr().out)
    )


# --- folders ------------------------------------------------------------------------------------------------


def test_a_folder_of_annotation_files_is_no_folder_of_sidecars(tmp_path):
    images, texts = draw(tmp_path / "images", *PHOTOS), tmp_path / "Flickr8k_text"
    texts.mkdir()
    (texts / "CrowdFlowerAnnotations.txt").write_text("a.jpg\tb.jpg#2\t0.6\t2\t1\n")
    for name in ("Flickr8k.lemma.token.txt", "Flickr8k.token.txt"):
        (texts / name).write_text(TEXTS["Flickr8k.token.txt"][1], encoding="utf-8")
    for folders in (images, None):
        with pytest.raises(UserError) as error:
            read_annotations(texts, folders)
        for part in ("it has CrowdFlowerAnnotations.txt, Flickr8k.", f"give {texts / 'Flickr8k.token.txt'}"):
            assert part in str(error.value)
    (texts / "Flickr8k.token.txt").unlink()
    (texts / "Flickr8k.lemma.token.txt").unlink()
    with pytest.raises(UserError, match="no image for the 1 caption file; it has CrowdFlowerAnnotations"):
        read_annotations(texts, images)


def test_splits_in_folders_as_hugging_face_has_them(tmp_path):
    for folder, split in (("train", "train"), ("validation", "val"), ("test", "test")):
        names = [name for name in PHOTOS if SPLITS[name] == split]
        draw(tmp_path / "hf" / folder, *names)
        lines = lines_of({"file_name": name, "text": PHOTOS[name]} for name in names)
        (tmp_path / "hf" / folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    records = read_annotations(tmp_path / "hf", tmp_path / "hf")
    assert found(records) == PHOTOS
    assert {Path(own.path).name: own.split for own in records} == SPLITS
    assert all(own.path == str(tmp_path / "hf" / own.image_id) for own in records)
    assert len(create_input_files.sources(tmp_path / "hf")) == 3
    with (tmp_path / "hf" / "train" / "metadata.jsonl").open("a") as stream:
        stream.write('{"file_name": "x.jpg", "text": "A dog", "split": "test"}\n')
    with pytest.raises(UserError, match=r"the split of some images is|is in the test split; move it there"):
        read_annotations(tmp_path / "hf", tmp_path / "hf")


def test_what_of_a_folder_is_not_read_is_named(tmp_path, capsys):
    folder = draw(tmp_path / "photos", "a.jpg", "IMG_01.JPG", "c.jpg")
    (folder / "a.txt").write_text("A dog")
    (folder / "a.caption").write_text("A cat")
    (folder / "IMG_01.TXT").write_text("A hat")
    (folder / "c.txt").write_text("A boy")
    assert found(read_annotations(folder)) == {
        "a.jpg": ["A dog"],
        "IMG_01.JPG": ["A hat"],
        "c.jpg": ["A boy"],
    }
    assert (
        "1 image with two sidecars, such as a.txt and a.caption; the first is read" in capsys.readouterr().out
    )
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "A dog"}\n')
    assert found(read_annotations(folder, folder)) == {"a.jpg": ["A dog"]}
    said = "metadata.jsonl names 1 of 3 images; the 3 sidecars beside images are not read"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("existing", ["skip", "overwrite", "append"])
def test_a_sidecar_with_an_extension_in_capitals_gets_no_second_one(existing, tmp_path):
    folder = draw(tmp_path / "photos", "IMG_01.JPG", "IMG_02.JPG")
    (folder / "IMG_01.TXT").write_text("A hat")
    sidecars, images = Sidecars(existing=existing), [str(folder / f"IMG_0{number}.JPG") for number in (1, 2)]
    assert sidecars.exist(images) == images[:1] and sidecars.read_text(images[0]) == "A hat"
    for image in images:
        sidecars.write(image, sidecars.compose(image, "A dog", sidecars.read(image)))
    assert {path.name for path in folder.iterdir()} == {
        "IMG_01.JPG",
        "IMG_02.JPG",
        "IMG_01.TXT",
        "IMG_02.txt",
    }


# --- small data, commas -------------------------------------------------------------------------------------


HELD_OUT = [(5, 0.1, 1), (2, 0.1, 1), (1, 0.1, 0), (5, 0, 0), (3, 0.9, 2), (30, 0.1, 3)]


@pytest.mark.parametrize(("images", "fraction", "held_out"), HELD_OUT)
def test_of_few_images_one_is_held_out(images, fraction, held_out):
    records = [Record(str(number), None, ["A dog"], [["a", "dog"]]) for number in range(images)]
    splits = split_records(records, fraction, seed=1)
    assert (len(splits["val"]), len(splits["train"])) == (held_out, images - held_out)


def test_lines_on_small_data_name_the_setting(tmp_path, capsys):
    images = draw(tmp_path / "images", "a.jpg", "b.jpg")
    file = write(tmp_path / "x.csv", ("a", "A dog runs"), ("b", "A cat runs"), ("b", "A dog sleeps"))
    settings = create_input_files.Settings(
        str(file), str(images), output_folder=str(tmp_path / "out"), image_size=32, min_word_freq=3,
        val_fraction=0,
    )  # fmt: skip
    create_input_files.create_input_files(settings)
    assert "% of words unknown: a --min_word_freq below 3 keeps more of them" in capsys.readouterr().out
    with pytest.raises(UserError, match="prepare two images or more, with --val_fraction above 0"):
        train.read_data(str(tmp_path / "out"))


def test_files_with_commas_between_them(tmp_path):
    write(tmp_path / "a.csv", *ROWS), write(tmp_path / "b.csv", *ROWS)
    both = f"{tmp_path / 'a.csv'},{tmp_path / 'b.csv'}"
    with pytest.raises(UserError, match=r"separated by blanks, not by commas: \S+a.csv \S+b.csv$"):
        read_annotations(both)
    folders = f"{draw(tmp_path / 'x', 'a.jpg')},{draw(tmp_path / 'y', 'b.jpg')}"
    with pytest.raises(UserError, match="separated by blanks, not by commas"):
        read_annotations(tmp_path / "a.csv", folders)


def test_the_pipeline_names_folders_that_are_there(tmp_path, capsys, monkeypatch):
    folder = draw(tmp_path / "side", "a.jpg")
    (folder / "a.txt").write_text("A dog")
    monkeypatch.chdir(tmp_path)
    said = []
    settings = run_pipeline.Settings(annotations="side")
    run_pipeline.choose_data(settings, lambda *text: said.append(text[0]))
    assert said == ["data: side"]

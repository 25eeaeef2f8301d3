"""Annotation files of every layout, and what each script reads of them."""

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

import create_input_files
import eval as evaluation
import metrics
import run_pipeline
import train_model
import view_captions
from captioning.data.annotations import read_annotations
from captioning.data.submissions import write_submission
from captioning.data.tables import Columns
from utils import read_json

PHOTOS = {  # file, its captions
    "1000268201_693b08cb0e.jpg": ["A dog runs on the grass .", "Ein Hund läuft über die Wiese, schnell"],
    "1001773457_577c3a7d70.jpg": ["Two dogs; one is black", "Zwei Hunde | einer ist schwarz"],
    "1002674143_1b742ab4b8.jpg": ['A sign says "stop" .', "Ein Mädchen spielt im Garten"],
    "1003163366_44323f5815.jpg": ["A man sleeps, a dog beside him", "Ein Mann schläft auf der Bank"],
    "1007129816_e794419615.jpg": ["A man with an orange hat", "Ein Mann trägt einen Hut"],
    "1009434119_febe49276a.jpg": ["A black and white dog", "Ein Hund rennt durch das grüne Gras"],
}
SPLITS = dict(zip(PHOTOS, ("train", "train", "train", "val", "test", "test")))
ROWS = [(name, caption) for name, captions in PHOTOS.items() for caption in captions]
STEMS = [(Path(name).stem, caption) for name, caption in ROWS]


def draw_photos(folder: Path) -> Path:
    """Draw an image for each of the photos."""
    folder.mkdir()
    for number, name in enumerate(PHOTOS):
        Image.new("RGB", (32, 32), (40 * number, 90, 200)).save(folder / name)
    return folder


# --- the files ----------------------------------------------------------------------------------------------


def table(rows, header=None, separator=",", quoting=csv.QUOTE_MINIMAL, ends="\n") -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=separator, quoting=quoting, lineterminator=ends)
    writer.writerows([*([header] if header else []), *rows])
    return stream.getvalue()


def unquoted(rows, header, separator) -> str:
    return "".join(separator.join(row) + "\n" for row in ([header] if header else []) + list(rows))


def lines_of(objects) -> str:
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in objects)


def karpathy_images() -> list[dict]:
    return [
        {"filename": name, "split": SPLITS[name], "sentences": [
            {"raw": caption, "tokens": metrics.tokenize(caption)} for caption in captions]}
        for name, captions in PHOTOS.items()
    ]  # fmt: skip


def coco() -> dict:
    numbers = {name: number for number, name in enumerate(PHOTOS, start=1)}
    return {
        "images": [{"id": number, "file_name": name} for name, number in numbers.items()],
        "annotations": [{"image_id": numbers[name], "caption": caption} for name, caption in ROWS],
    }


def text_of(value) -> str:
    return json.dumps(value, ensure_ascii=False)


HEADER = ("image", "caption")
NUMBERED = [(f"{name}#{number % 2}", caption) for number, (name, caption) in enumerate(ROWS)]
FLICKR30K = "".join(f"{name}| {number % 2}| {caption}\n" for number, (name, caption) in enumerate(ROWS))
LISTS = [{"file_name": name, "text": captions} for name, captions in PHOTOS.items()]
OBJECTS = [{"image_id": stem, "caption": caption} for stem, caption in STEMS]
MORE = ("Image Name", "Caption", "by", "stars")
CELLS = [(name, json.dumps(own)) for name, own in PHOTOS.items()]
WIDE = [(name, *own) for name, own in PHOTOS.items()]
WIDE_NAMES = ("image_id", "caption_0", "caption_1")
TEXTS = {  # the name of a file, and what is in it
    "Kaggle": ("train.csv", table(STEMS, ("image_id", "caption"))),
    "Flickr8k captions.txt": ("captions.txt", table(ROWS, HEADER)),
    "Flickr8k captions.txt, not quoted": ("captions.txt", unquoted(ROWS, HEADER, ",")),
    "Flickr8k.token.txt": ("Flickr8k.token.txt", unquoted(NUMBERED, None, "\t")),
    "Flickr30k results.csv": ("results.csv", "image_name| comment_number| comment\n" + FLICKR30K),
    "semicolons": ("a.csv", table(ROWS, ("filename", "text"), ";")),
    "tabs, quoted": ("a.tsv", table(ROWS, ("file_name", "description"), "\t", csv.QUOTE_ALL)),
    "bars": ("a.txt", table(ROWS, HEADER, "|")),
    "no header, commas": ("a.csv", table(ROWS)),
    "no header, semicolons, quoted": ("a.csv", table(ROWS, None, ";", csv.QUOTE_ALL)),
    "no header, tabs": ("a.txt", unquoted(ROWS, None, "\t")),
    "no header, ids without extension": ("a.csv", table(STEMS, None, ";")),
    "sep= of Excel": ("a.csv", "sep=;\n" + table(ROWS, HEADER, ";")),
    "columns of other names": ("a.csv", table(ROWS, ("Dateiname", "Beschreibung"), ";")),
    "caption first": ("a.csv", table([row[::-1] for row in ROWS], HEADER[::-1])),
    "further columns": ("a.csv", table([(*row, "x", 5) for row in ROWS], MORE)),
    "a split column": ("a.csv", table([(*row, SPLITS[row[0]]) for row in ROWS], (*HEADER, "split"))),
    "lists in cells": ("a.csv", table(CELLS, ("filename", "raw"))),
    "captions in columns": ("a.csv", table(WIDE, ("image", "caption_1", "caption_2"))),
    "captions in columns, semicolons": ("a.csv", table(WIDE, ("Dateiname", "Text 1", "Text 2"), ";")),
    "captions in columns, one named alike": ("a.csv", table(WIDE, ("file_name", "sentence", "sentence2"))),
    "captions in JSON, one by one": ("a.json", text_of([dict(zip(WIDE_NAMES, row)) for row in WIDE])),
    "Windows paths": ("a.csv", table([(f"C:\\data\\img\\{name}", text) for name, text in ROWS], HEADER)),
    "Kaggle paths": ("a.csv", table([(f"/kaggle/input/x/{name}", text) for name, text in ROWS], HEADER)),
    "folders": ("a.csv", table([(f"images/{name}", text) for name, text in ROWS], HEADER)),
    "old Mac line ends": ("a.csv", table(ROWS, HEADER, ends="\r")),
    "Windows line ends": ("a.csv", table(ROWS, HEADER, ends="\r\n")),
    "Karpathy": ("dataset.json", text_of({"images": karpathy_images(), "dataset": "x"})),
    "Karpathy, lines": ("dataset.jsonl", lines_of(karpathy_images())),
    "COCO": ("captions.json", text_of(coco())),
    "COCO results": ("results.json", text_of(OBJECTS)),
    "JSON lines": ("captions.jsonl", lines_of(OBJECTS)),
    "Hugging Face metadata.jsonl": ("metadata.jsonl", lines_of(LISTS)),
    "Hugging Face metadata.csv": ("metadata.csv", table(ROWS, ("file_name", "text"))),
    "captions by file": ("captions.json", text_of(PHOTOS)),
}
OTHERS = ("sidecars", "sidecars, .caption", "metadata in the folder", "Parquet", "two files")
LAYOUTS = (*TEXTS, *OTHERS)


def write_layout(layout: str, images: Path, folder: Path, encoding="utf-8") -> tuple[list[str], list[str]]:
    """Write the layout's files; return the annotation files and the folders of images."""
    if layout in TEXTS:
        name, text = TEXTS[layout]
        (folder / name).write_bytes(text.encode(encoding))
        return [str(folder / name)], [str(images)]
    photos = folder / "photos"
    if layout.startswith("sidecars"):
        shutil.copytree(images, photos)
        for name, captions in PHOTOS.items():
            sidecar = (photos / name).with_suffix(".caption" if "caption" in layout else ".txt")
            sidecar.write_bytes("\r\n".join(captions).encode(encoding))
        return [str(photos)], [str(photos)]
    if layout == "metadata in the folder":
        shutil.copytree(images, photos / "sub")
        objects = [{"file_name": f"sub/{one['file_name']}", "text": one["text"]} for one in LISTS]
        (photos / "metadata.jsonl").write_bytes(lines_of(objects).encode(encoding))
        return [str(photos)], [str(photos)]
    if layout == "Parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        objects = [
            {"image": {"bytes": (images / name).read_bytes(), "path": name}, "caption": captions}
            for name, captions in PHOTOS.items()
        ]
        parquet.write_table(pyarrow.Table.from_pylist(objects), folder / "train.parquet")
        return [str(folder / "train.parquet")], [str(folder / "extracted")]
    (folder / "b.json").write_text(json.dumps(dict([*PHOTOS.items()][3:])), encoding="utf-8")
    (folder / "a.csv").write_bytes(table(ROWS[:6], ("image", "caption")).encode(encoding))
    return [str(folder / "a.csv"), str(folder / "b.json")], [str(images)]


# --- the scripts --------------------------------------------------------------------------------------------

Found = dict[str, list[str]]  # of each image file that was read, its captions


def by_create_input_files(files, folders, tmp_path, photos=None, **options) -> Found:
    settings = create_input_files.Settings(
        tuple(files), tuple(folders), output_folder=str(tmp_path / "out"), min_word_freq=1, workers=1,
        image_size=32, val_fraction=0.3, **options,
    )  # fmt: skip
    create_input_files.create_input_files(settings)
    found = {}
    for split in ("train", "val", "test"):
        if (tmp_path / "out" / f"{split}_image_paths.json").exists():
            paths, texts = (
                read_json(tmp_path / "out" / f"{split}_{part}.json") for part in ("image_paths", "references")
            )
            found |= {Path(path).name: own for path, own in zip(paths, texts)}
    return found


def by_train_model(files, folders, tmp_path, photos=None, **options) -> Found:
    settings = train_model.Settings(tuple(files), tuple(folders), base_model="tiny", **options)
    records = [record for split in train_model.read_records(settings) for record in split]
    return {Path(record.path).name: record.captions for record in records if record.path}


def by_eval(files, folders, tmp_path, photos=None, **options) -> Found:
    """Against a friend's file with the first caption of each of the `photos`, by the files' names."""
    photos = photos or PHOTOS
    write_submission(tmp_path / "s.csv", [(name, captions[0]) for name, captions in photos.items()])
    named = any(record.split for record in read_annotations(files, None, Columns(*options.values())))
    found = {}
    for split in ("train", "val", "test") if named else ("test",):
        settings = evaluation.Settings(
            submission=(str(tmp_path / "s.csv"),),
            references=tuple(files),
            split=split,
            partial=named,
            **options,
        )
        rows, records = evaluation.score_submissions(settings)
        (row,) = rows
        assert row["scores"].overall["Bleu_1"] == pytest.approx(1)
        captions = {record.image_id: record.captions for record in records}
        texts = {own[0]: name for name, own in photos.items()}
        found |= {texts[row["captions"][image_id]]: captions[image_id] for image_id in row["captions"]}
    return found


def by_view_captions(files, folders, tmp_path, photos=None, **options) -> Found:
    found = {}
    folders = [folder for folder in folders if Path(folder).is_dir()]
    for split in ("train", "val", "test"):
        settings = view_captions.Settings(
            references=tuple(files), image_folder=tuple(folders), split=split, **options
        )
        if split != "test" and not any(
            record.split for record in read_annotations(files, None, settings.columns)
        ):
            continue
        records = view_captions.choose_records(settings)
        found |= {Path(record.path).name: record.captions for record in records if record.path}
    return found


def by_run_pipeline(files, folders, tmp_path, photos=None, **options) -> Found:
    """Its first steps: the data are chosen and prepared; again, they are up to date."""
    settings = run_pipeline.Settings(
        annotations=tuple(files), image_folder=tuple(folders), data_folder=str(tmp_path / "data"),
        test_folder=str(tmp_path / "none"),
    )  # fmt: skip
    settings.step_values = {"min_word_freq": 1, "image_size": 32, "workers": 1, "val_fraction": 0.3} | options
    said = []
    for _ in range(2):
        run_pipeline.prepare(
            run_pipeline.choose_data(settings, lambda *_: None), lambda *text: said.append(text[0])
        )
    assert "up to date" in said[1] and "up to date" not in said[0]
    found = {}
    for split in read_json(tmp_path / "data" / "prepared.json")["splits"]:
        paths, texts = (
            read_json(tmp_path / "data" / f"{split}_{part}.json") for part in ("image_paths", "references")
        )
        found |= {Path(path).name: own for path, own in zip(paths, texts)}
    return found


SCRIPTS = {
    "create_input_files": by_create_input_files,
    "train_model": by_train_model,
    "eval": by_eval,
    "view_captions": by_view_captions,
    "run_pipeline": by_run_pipeline,
}

"""Damaged and hostile images, files of captions and names: read, or refused with one line; nothing else."""

import csv
import importlib
import io
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fork_server import Run
from fuzz import find_fault
from fuzz_damage import mutate
from fuzz_inputs import (
    Samples,
    blip_case,
    checkpoint_case,
    images_case,
    names_case,
    prepared_case,
    settings_case,
    sidecars_case,
    texts_case,
)
from PIL import Image

import eval as evaluation
from captioning.data.images import read_image
from captioning.data.submissions import read_submission, write_submission
from utils import UserError, printable


def read_or_refuse(read, *arguments) -> object:
    """What `read` returns; None where it refuses, with one line."""
    try:
        return read(*arguments)
    except UserError as error:
        assert "\n" not in printable(str(error)), str(error)
        return None


# --- images -------------------------------------------------------------------------------------------------

KINDS = {
    "JPEG": {},
    "JPEG progressive": {"progressive": True},
    "PNG": {},
    "WEBP": {},
    "WEBP lossless": {"lossless": True},
    "BMP": {},
    "GIF": {},
    "TIFF": {},
    "TIFF lzw": {"compression": "tiff_lzw"},
    "PPM": {},
    "JPEG2000": {},
    "ICO": {},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_images(kind, tmp_path):
    rng, path = random.Random(kind), tmp_path / "image"
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    image, stream = Image.fromarray(pixels).resize((48, 32)), io.BytesIO()
    image.save(stream, kind.split()[0], **KINDS[kind])
    path.write_bytes(stream.getvalue())
    assert read_image(path, 32).shape == (3, 32, 32)
    began, refused = time.process_time(), 0
    for _ in range(50):
        path.write_bytes(mutate(stream.getvalue(), rng))
        found = read_or_refuse(read_image, path, 32)
        assert found is None or (found.shape == (3, 32, 32) and found.dtype == np.uint8)
        refused += found is None
    assert refused and time.process_time() - began < 10


def test_what_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    links = {"zero": "/dev/zero", "loop": tmp_path / "loop.jpg", "nowhere": tmp_path / "none"}
    for name, target in links.items():
        (tmp_path / f"{name}.jpg").symlink_to(target)
    contents = {
        "empty": b"",
        "text": b"not an image",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(attack) (w) file closefile\n",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "page": b"<html><body>404 not found</body></html>",
        "pickle": b"cos\nsystem\n(S'touch attack'\ntR.",
        # a PNG that says it has 10^9 x 10^9 pixels, a GIF of 65535 x 65535, a PPM of 10^6 x 10^6
        "png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (10**9).to_bytes(4, "big") * 2 + b"\x08\2\0\0\0\0\0\0\0",
        "gif": b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\2\0;",
        "ppm": b"P6 1000000 1000000 255\n" + bytes(100),
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.jpg").write_bytes(content)
    for path in sorted(tmp_path.iterdir()):
        assert read_or_refuse(read_image, path, 32) is None, path
    assert not Path("attack").exists()


# --- files of captions --------------------------------------------------------------------------------------

ROWS = [(f"image_{number}", f'a dog, {number} cats and a "bird" on grün') for number in range(8)]


def submission(extension: str) -> bytes:
    entries = [{"image_id": image_id, "caption": text} for image_id, text in ROWS]
    if extension == ".json":
        return json.dumps(entries).encode()
    if extension == ".jsonl":
        return "".join(json.dumps(entry) + "\n" for entry in entries).encode()
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("image_id", "caption"), *ROWS])
    return text.getvalue().encode()


def check_rows(found: object) -> None:
    assert found is None or (
        found and all(isinstance(image_id, str) and isinstance(text, str) for image_id, text in found)
    )


@pytest.mark.parametrize("extension", [".csv", ".json", ".jsonl"])
def test_damaged_files_of_captions(extension, tmp_path):
    rng, path = random.Random(extension), tmp_path / f"captions{extension}"
    path.write_bytes(submission(extension))
    assert read_submission(path) == ROWS
    for _ in range(150):
        path.write_bytes(mutate(submission(extension), rng))
        check_rows(read_or_refuse(read_submission, path))


STRANGE = [
    b"",
    b"\n",
    b"\0",
    b"\xff\xfe",
    b"[]",
    b"{}",
    b"null",
    b"1",
    b'"text"',
    b"[1]",
    b"[[]]",
    b"[null]",
    b"[" * 100_000,
    b'[{"image_id": 1}]',
    b'[{"caption": "a"}]',
    b'[{"image_id": 1, "caption": null}]',
    b'{"a": ' * 100_000,
    b'[{"image_id": 1, "caption": ["a"]}]',
    b'[{"image_id": {}, "caption": "a"}]',
    b'[{"image_id": NaN, "caption": 1}]',
    b"image_id",
    b"image_id,caption",
    b"caption,image_id\na,b",
    b"image_id,caption,more\na,b,c",
    b"image_id,caption\na,b,c",
    b'image_id,caption\na,"b',
    b"image_id;caption\na;b",
    b"image_id,caption\r" + b"a" * 200_000 + b",b\r",
    "image_id,caption\na,b".encode("utf-16"),
    b"image_id,caption\n\xe9,b",
    b"image_id,caption\na\0,b",
    b'[{"image_id": 1e999, "caption": "a"}]',
    b'[{"image_id": "a", "caption": "\\ud800"}]',
]


@pytest.mark.parametrize("extension", [".csv", ".json", ".jsonl"])
def test_strange_files_of_captions(extension, tmp_path):
    for content in STRANGE:
        path = tmp_path / f"captions{extension}"
        path.write_bytes(content)
        check_rows(read_or_refuse(read_submission, path))


@pytest.mark.parametrize("extension", [".csv", ".json", ".jsonl"])
def test_strange_files_are_scored_or_refused(extension, tmp_path, run_main):
    references = tmp_path / "references.csv"
    references.write_text("image_id,caption\na,a dog runs\nb,a cat sits\n")
    for content in STRANGE:
        path = tmp_path / f"captions{extension}"
        path.write_bytes(content)
        arguments = ("--submission", path, "--references", references, "--partial")
        result = run_main(evaluation, *arguments)
        assert result.returncode in (0, 2), result.stderr
        if result.returncode == 2:
            assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr


# --- names --------------------------------------------------------------------------------------------------

ESCAPES = ["\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "a\rb", "a\nb", "\u202eabc", "\x07", "\ud800"]


def test_no_escape_sequence_reaches_the_terminal(tmp_path, run_main):
    for escape in ESCAPES:
        for content in (
            [{"image_id": f"a{escape}", "caption": "a dog"}] * 2,
            [{"image_id": "a", "caption": escape}],
        ):
            path = tmp_path / "captions.json"
            path.write_text(json.dumps(content))
            references = tmp_path / "references.json"
            references.write_text(json.dumps({
                "images": [{"id": 1, "file_name": f"a{escape}.jpg"}],
                "annotations": [{"image_id": 1, "caption": f"a dog {escape}"}],
            }))  # fmt: skip
            result = run_main(evaluation, "--submission", path, "--references", references, "--partial")
            assert result.returncode in (0, 2), result.stderr
            for line in (result.stdout + result.stderr).splitlines():
                assert line.isprintable(), line


def test_names_that_look_like_options(tmp_path):
    """A file called `--help` or `-rf` is a file."""
    for name in ("--help", "-rf", "--output_json=x"):
        (tmp_path / name).write_text("image_id,caption\na,a dog\n")
    command = [
        sys.executable,
        str(Path(evaluation.__file__).resolve()),
        "--submission",
        "./--help",
        "--references",
    ]
    result = subprocess.run([*command, "./-rf"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"--help", "-rf", "--output_json=x"}


def test_formulas_are_escaped_where_asked_for(tmp_path, run_main):
    rows = [
        ("=1+1", "a dog"),
        ("b", '=HYPERLINK("http://x")'),
        ("-c", "@SUM(A1)"),
        ("d'", "'a'"),
        ("e", "+1"),
    ]
    path = tmp_path / "captions.csv"
    for escape, first in ((False, "=1+1"), (True, "'=1+1")):
        write_submission(path, rows, escape_formulas=escape)
        with path.open(newline="") as stream:
            cells = [cell for row in csv.reader(stream) for cell in row]
        assert first in cells
        assert escape == (not any(cell.startswith(("=", "+", "-", "@")) for cell in cells))
        assert read_submission(path) == rows
    references = [("image_id", "caption"), *rows]
    with (tmp_path / "references.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(references)
    result = run_main(
        evaluation, "--submission", path, "--references", tmp_path / "references.csv", "--escape_formulas",
        "--per_image_csv", tmp_path / "scores.csv", "--output_captions", tmp_path / "again.csv",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "again.csv").read_bytes() == path.read_bytes()
    with (tmp_path / "scores.csv").open(newline="") as stream:
        assert not any(cell.startswith(("=", "+", "@")) for row in csv.reader(stream) for cell in row)


# --- a few of the cases of tests/fuzz.py --------------------------------------------------------------------

FEW = {images_case: 6, texts_case: 8, sidecars_case: 3, prepared_case: 3, checkpoint_case: 4, blip_case: 3,
       settings_case: 12, names_case: 3}  # fmt: skip


@pytest.mark.parametrize("make", FEW, ids=lambda make: make.__name__)
def test_a_few_cases_of_each_kind(make, demo, prepared, models, blip_folder, tmp_path, run_main, monkeypatch):
    samples = Samples(demo, prepared, models, blip_folder)
    for number in range(FEW[make]):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        case = make(samples, folder, random.Random(f"{make.__name__} {number}"))
        script = importlib.import_module(case.script.removesuffix(".py"))
        result = run_main(script, *case.arguments)
        run = Run(result.returncode or 0, 0, result.stdout + result.stderr)
        assert not find_fault(case, run, folder), (case, run.output)

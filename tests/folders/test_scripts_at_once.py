"""The captioning scripts in pairs on one folder at once, and killed: each file is from one model and as an
undisturbed run makes it, or one of the two was refused with one line."""

from __future__ import annotations

import itertools
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from folder_images import make_images
from fork_server import Run, Server

from captioning.data.sidecars import Backup
from captioning.data.text_files import decode_text, encode_text

pytestmark = pytest.mark.slow

SCRIPTS = ("caption.py", "caption_from_checkpoint.py", "direct_caption.py")
FORMS = {  # where the first run's captions go, and where those of the second
    "one CSV": (("--output_csv", "PHOTOS/out.csv"), ("--output_csv", "PHOTOS/out.csv")),
    "the same sidecars": (("--sidecars",), ("--sidecars",)),
    "other extensions": (("--sidecars",), ("--sidecars", "--sidecar_extension", ".caption")),
}


@pytest.fixture(scope="module")
def servers():
    with Server() as first, Server() as second:
        yield first, second


class Command:
    """A script with a model of its own, on a folder; runs in a folder of its own."""

    def __init__(self, script: str, models: Path, blip_folder: Path, place: Path):
        # caption.py and caption_from_checkpoint.py have different epochs' models
        model = {
            "caption.py": ("--model", models / "checkpoint_epoch_1.pth"),
            "caption_from_checkpoint.py": ("--checkpoint", models / "checkpoint_epoch_4.pth"),
            "direct_caption.py": ("--model_path", blip_folder, "--checks", "none"),
        }[script]
        self.script, self.place = script, place
        self.given = [*model, "--batch_size", 4, "--workers", 1]
        place.mkdir()

    def run(self, server: Server, photos: Path, form: tuple[str, ...], **options) -> Run:
        form = [part.replace("PHOTOS", str(photos)) for part in form]
        return server.run(self.place, self.script, *self.given, "--test_folder", photos, *form, **options)


def contents(photos: Path) -> dict[str, bytes]:
    """All that is in a folder but for its images and empty locks that killed runs left."""
    return {
        path.name: path.read_bytes()
        for path in photos.iterdir()
        if path.suffix not in (".png", ".lock") and path.is_file()
    }


def check_refusal(result: Run) -> bool:
    """Whether a run was refused, with one line and no traceback."""
    assert "Traceback" not in result.output and result.status in (0, 2, -signal.SIGKILL), result.output
    if result.status == 2:
        errors = [line for line in result.output.splitlines() if not line.endswith(".pth")]
        assert len(errors) == 1 and "another run is writing" in errors[0], result.output
    return result.status == 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pair", [*itertools.combinations_with_replacement(SCRIPTS, 2)])
def test_two_scripts_at_once_and_killed(pair, form, servers, models, blip_folder, tmp_path):
    commands = [Command(script, models, blip_folder, tmp_path / f"{n}") for n, script in enumerate(pair)]
    photos = make_images(tmp_path / "photos", 30)
    undisturbed, seconds = [], []
    for command, own in zip(commands, FORMS[form]):
        result = command.run(servers[0], photos, own)
        assert result.status == 0, result.output
        seconds.append(result.seconds)
        undisturbed.append(contents(photos))
        for name in undisturbed[-1]:
            (photos / name).unlink()
    random_moment = random.Random(f"{pair} {form}")
    with ThreadPoolExecutor(2) as pool:
        for kill in (False, True, True):
            jobs = []
            for command, server, own, longest in zip(commands, servers, FORMS[form], seconds):
                after = {"after": random_moment.uniform(0.3, 0.9) * longest} if kill else {}
                jobs.append(pool.submit(command.run, server, photos, own, **after))
            refused = [check_refusal(job.result()) for job in jobs]
            assert sum(refused) <= (form != "other extensions"), [job.result().output for job in jobs]
    for command, own in zip(commands, FORMS[form]):
        result = command.run(servers[0], photos, own)
        assert result.status == 0, result.output
    if form == "one CSV":
        assert contents(photos) == undisturbed[1]
    elif form == "other extensions":
        assert contents(photos) == undisturbed[0] | undisturbed[1]
    else:
        found = contents(photos)
        assert found.keys() == undisturbed[0].keys()
        assert all(content in (undisturbed[0][name], undisturbed[1][name]) for name, content in found.items())
    assert not list(photos.glob(".*.journal-*"))


@pytest.mark.parametrize("existing", ["append", "prepend"])
def test_30_kills_tear_no_sidecar_in_any_encoding(existing, servers, models, blip_folder, tmp_path):
    """400 sidecars in eight encodings; the run is killed 15 times in each of the two modes."""
    rng, photos = random.Random(existing), make_images(tmp_path / "photos", 400)
    codecs = (
        "utf-8",
        "utf-8-sig",
        "utf-16-le-sig",
        "utf-16-be-sig",
        "utf-16-le",
        "utf-16-be",
        "cp1252",
        "cp932",
    )
    written = {}
    for number in range(400):
        codec = codecs[number % 8]
        text = f"{'赤い帽子' if codec == 'cp932' else 'it’s Café'} {number}" + "xyz"[number % 3]
        written[photos / f"img{number}.txt"] = text, codec
        (photos / f"img{number}.txt").write_bytes(encode_text(f"{text}\r\n", codec))
    command = Command("caption.py", models, blip_folder, tmp_path / "0")
    form = ("--sidecars", "--existing", existing, "--beam_size", "1")
    first, kills = None, 0
    whole = command.run(servers[0], make_images(tmp_path / "other", 400), form).seconds
    while kills < 15:
        result = command.run(servers[0], photos, form, after=rng.uniform(0.2, 0.6) * whole)
        assert result.status in (0, -signal.SIGKILL), result.output
        kills += result.status != 0
        for path, (text, codec) in written.items():
            data = path.read_bytes()
            mark = encode_text("", codec)
            found = data[len(mark) :].decode(codec.removesuffix("-sig"))
            assert data.startswith(mark) and found.count(text) == 1 and found.endswith("\r\n"), path
            assert decode_text(data, path)[0].count(",") <= 1
    first = command.run(servers[0], photos, form)
    assert first.status == 0, first.output
    captions = {}
    for path, (text, codec) in written.items():
        found = path.read_bytes()[len(encode_text("", codec)) :].decode(codec.removesuffix("-sig")).strip()
        parts = found.split(", ")
        assert len(parts) == 2 and parts[existing == "prepend"] == text, found
        captions[path.stem] = parts[existing == "append"]
    again = command.run(servers[0], photos, form)
    assert again.status == 0 and len(captions) == 400
    for path, (text, codec) in written.items():
        found = path.read_bytes()[len(encode_text("", codec)) :].decode(codec.removesuffix("-sig")).strip()
        assert found.count(text) == found.count(captions[path.stem]) == 1
        assert (photos / Backup.FOLDER / Backup.FIRST / path.name).read_bytes() == encode_text(
            f"{text}\r\n", codec
        )
    assert not list(photos.rglob("*.partial")) and not list(photos.glob(".captions*journal*"))

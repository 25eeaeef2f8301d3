"""What a user does by hand between a kill and the rerun is never lost, in any mode of --existing."""

import random
from pathlib import Path

import pytest
from folder_images import BATCH, ColourCaptioner, Killed, make_images, run
from PIL import Image

from captioning.data.sidecars import Backup
from captioning.data.submissions import read_submission

MODES = ("skip", "overwrite", "append", "prepend")


def killed_run(folder, batches: int, **options) -> None:
    with pytest.raises(Killed):
        run(ColourCaptioner(kill_at=batches + 1), folder, sidecars=True, **options)


@pytest.mark.parametrize("existing", MODES)
def test_a_corrected_sidecar_is_left_as_it_is(existing, tmp_path, capsys):
    folder = make_images(tmp_path / "in", 12)
    if existing != "skip":
        for number in range(12):
            (folder / f"img{number}.txt").write_text("old")
    killed_run(folder, 1, existing=existing)
    (folder / "img0.txt").write_text("corrected by hand")
    killed_run(folder, 1, existing=existing)  # and is so in every rerun
    captioner = ColourCaptioner()
    run(captioner, folder, sidecars=True, existing=existing)
    assert (folder / "img0.txt").read_text() == "corrected by hand" and captioner.seen == BATCH
    out = capsys.readouterr().out
    if existing == "skip":
        assert "1 had a sidecar before" in out
    else:
        assert out.count("changed since they were written and are left as they are: 1\n") == 2
    for number in range(1, 12):
        text = (folder / f"img{number}.txt").read_text()
        assert text.count(f"colour {number} 0 200") == 1
        assert text.count("old") == (existing in ("append", "prepend"))


def test_the_output_has_the_corrected_text(tmp_path):
    folder, output = make_images(tmp_path / "in", 8), tmp_path / "out.csv"
    with pytest.raises(Killed):
        run(ColourCaptioner(kill_at=2), folder, output, sidecars=True)
    (folder / "img0.txt").write_text("corrected by hand")
    run(ColourCaptioner(), folder, output, sidecars=True)
    assert dict(read_submission(output))["img0"] == "corrected by hand"
    assert dict(read_submission(output))["img1"] == "colour 1 0 200"


@pytest.mark.parametrize("existing", MODES)
def test_100_random_edits_between_kill_and_rerun(existing, tmp_path):
    """25 edits in each mode, after five kills: nothing that a user wrote is gone."""
    rng, folder = random.Random(existing), make_images(tmp_path / "in", 48)
    kept: dict[str, str] = {}  # sidecar: what must be in it, as the user wrote it
    for number in range(0, 48, 2):
        (folder / f"img{number}.txt").write_text(f"user {number}\n")
        if existing != "overwrite":
            kept[f"img{number}.txt"] = f"user {number}"
    edits = 0
    for kill in range(5):
        killed_run(folder, 1, existing=existing)
        for _ in range(5):
            edit_by_hand(folder, rng, edits, kept)
            edits += 1
        assert_kept(folder, kept, kill)
    assert edits == 25
    run(ColourCaptioner(), folder, sidecars=True, existing=existing)
    assert_kept(folder, kept, "end")
    for image in folder.glob("*.png"):
        assert image.with_suffix(".txt").read_text().strip(), image
    assert not list(folder.glob(".captions*")) and not list(folder.rglob("*.partial"))
    if existing == "overwrite":  # what was overwritten is in the backup, once
        backup = folder / Backup.FOLDER / Backup.FIRST
        texts = [path.read_text() for path in backup.iterdir() if path.name[0] != "."]
        assert len(texts) == len(set(texts)) and all("colour" not in text for text in texts)


def edit_by_hand(folder: Path, rng: random.Random, edit: int, kept: dict[str, str]) -> None:
    """Change, delete or rename a sidecar or an image, or add one; note in `kept` what may not be lost."""
    images = sorted(path.name for path in folder.glob("*.png"))
    image = folder / rng.choice(images)
    sidecar = image.with_suffix(".txt")
    written = [path for path in folder.glob("*.txt") if "colour" in path.read_text()]
    kind = rng.choice(["text", "text", "delete sidecar", "delete image", "rename", "new", "new with text"])
    if kind == "text" and written:
        sidecar = rng.choice(sorted(written))
        text = rng.choice([f"by hand {edit}", sidecar.read_text().strip() + f", by hand {edit}"])
        sidecar.write_text(text)
        kept[sidecar.name] = text
    elif kind == "delete sidecar":
        sidecar.unlink(missing_ok=True)
        kept.pop(sidecar.name, None)
    elif kind == "delete image":
        image.unlink()  # its sidecar stays, and is nobody's business
        if sidecar.exists():
            kept[sidecar.name] = sidecar.read_text().strip()
    elif kind == "rename":
        image.rename(folder / f"renamed{edit}.png")
        if sidecar.exists():
            sidecar.rename(folder / f"renamed{edit}.txt")
            if sidecar.name in kept:
                kept[f"renamed{edit}.txt"] = kept.pop(sidecar.name)
    else:
        Image.new("RGB", (9, 7), (edit, 99, 200)).save(folder / f"new{edit}.png")
        if kind == "new with text":
            (folder / f"new{edit}.txt").write_text(f"new {edit}")
            kept[f"new{edit}.txt"] = f"new {edit}"


def assert_kept(folder: Path, kept: dict[str, str], when: object) -> None:
    """Every text of the user is where it was, or, where all are overwritten, in the backup."""
    backup = [path.read_text() for path in folder.glob(f"{Backup.FOLDER}/*/*.txt*")]
    for name, text in kept.items():
        found = (folder / name).read_text()
        assert found.count(text) == 1 or text in [content.strip() for content in backup], (when, name, found)

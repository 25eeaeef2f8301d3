"""The text of a sidecar: what a caption is added to, in whatever encoding, is never damaged."""

import errno
import os
import random

import pytest

from captioning.data.sidecars import Backup, Sidecars, shared_beginnings
from captioning.data.text_files import encode_text
from utils import UserError

CAPTION = "a dog runs"


def write(folder, content: bytes | str, name: str = "a", **options) -> str:
    """The text after CAPTION was written to the sidecar of an image."""
    sidecars, image = Sidecars(**options), str(folder / f"{name}.jpg")
    if content:
        (folder / f"{name}.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    sidecars.write(image, sidecars.compose(image, CAPTION, sidecars.read(image)))
    return (folder / f"{name}.txt").read_bytes().decode()


@pytest.mark.parametrize(
    "options, before, append, prepend",
    [
        ({}, "", f"{CAPTION}\n", f"{CAPTION}\n"),
        ({}, " \r\n\t", f"{CAPTION}\n", f"{CAPTION}\n"),
        ({}, "\ufeff\n", f"{CAPTION}\n", f"{CAPTION}\n"),
        ({}, "mine", f"mine, {CAPTION}", f"{CAPTION}, mine"),
        ({}, "mine\r\n", f"mine, {CAPTION}\r\n", f"{CAPTION}, mine\r\n"),
        ({}, "\ufeff mine\r", f"\ufeff mine, {CAPTION}\r", f"\ufeff {CAPTION}, mine\r"),
        ({}, "Mine.\n", f"Mine. {CAPTION}\n", f"{CAPTION}, Mine.\n"),
        ({}, "one\ntwo\n", f"one\ntwo, {CAPTION}\n", f"{CAPTION}, one\ntwo\n"),
        # the same caption is not added again
        ({}, CAPTION, None, None),
        ({}, f"mine, {CAPTION}\n", None, None),
        ({}, f"{CAPTION}. Mine\n", None, None),
        ({}, f"mine\r\n{CAPTION}\r\n", None, None),
        ({}, f"{CAPTION} fast", f"{CAPTION} fast, {CAPTION}", f"{CAPTION}, {CAPTION} fast"),
        ({}, f"the {CAPTION}", f"the {CAPTION}, {CAPTION}", f"{CAPTION}, the {CAPTION}"),
        # the prefix stays first, and is there once
        ({"prefix": "ohwx,"}, "", f"ohwx, {CAPTION}\n", f"ohwx, {CAPTION}\n"),
        ({"prefix": "ohwx,"}, "ohwx", f"ohwx, {CAPTION}", f"ohwx, {CAPTION}"),
        ({"prefix": "ohwx,"}, "ohwx, mine", f"ohwx, mine, {CAPTION}", f"ohwx, {CAPTION}, mine"),
        ({"prefix": "ohwx"}, "ohwx, mine", f"ohwx, mine, {CAPTION}", f"ohwx, {CAPTION}, mine"),
        ({"prefix": "ohwx"}, "ohwx mine", f"ohwx mine, {CAPTION}", f"ohwx {CAPTION}, mine"),
        ({"prefix": "ohwx,"}, "mine", f"ohwx, mine, {CAPTION}", f"ohwx, {CAPTION}, mine"),
        ({"prefix": "ohwx,"}, "ohwxx, me", f"ohwx, ohwxx, me, {CAPTION}", f"ohwx, {CAPTION}, ohwxx, me"),
        ({"prefix": "ohwx,"}, f"ohwx, {CAPTION}", None, None),
        ({"prefix": "ohwx,"}, f"{CAPTION}", f"ohwx, {CAPTION}", f"ohwx, {CAPTION}"),
        ({"prefix": "{name} {folder}:"}, "a in: mine", f"a in: mine, {CAPTION}", f"a in: {CAPTION}, mine"),
        # the suffix stays last, and is there once
        ({"suffix": ", photo"}, "mine", f"mine, {CAPTION}, photo", f"{CAPTION}, mine, photo"),
        ({"suffix": ", photo"}, "mine, photo\n", f"mine, {CAPTION}, photo\n", f"{CAPTION}, mine, photo\n"),
        ({"suffix": "photo"}, "mine photo", f"mine, {CAPTION} photo", f"{CAPTION}, mine photo"),
        ({"suffix": "photo"}, "telephoto", f"telephoto, {CAPTION} photo", f"{CAPTION}, telephoto photo"),
        ({"suffix": "."}, "Mine.", f"Mine. {CAPTION}.", f"{CAPTION}, Mine."),
        ({"prefix": "x,", "suffix": ", x"}, "x", f"x, {CAPTION}, x", f"x, {CAPTION}, x"),
    ],
)  # fmt: skip
def test_what_a_caption_is_added_to(options, before, append, prepend, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for existing, expected in (("append", append), ("prepend", prepend)):
        first = write(folder, before, existing=existing, **options | {"prefix": options.get("prefix", "")})
        assert first == (before if expected is None else expected), existing
        assert write(folder, b"", existing=existing, **options) == first  # the second time
        (folder / "a.txt").unlink()


@pytest.mark.parametrize(
    "texts, triggers",
    [
        (["ohwx, a man", "ohwx, a woman", "ohwx, a dog"], ["ohwx"]),
        (["ohwx style, a man", "ohwx style, a woman", "a dog"], ["ohwx style"]),
        (["ohwx, a man", "a woman, in red", "a dog, on grass"], []),
        (["ohwx, a man", "ohwx, a woman", "a dog, on grass", "a cat"], []),  # two of four
        (["a man in a red hat, smiling", "a man in a red hat, sad"], []),  # too long for a trigger
        (["ohwx, a man"], ["ohwx"]),
        (["a man, smiling"], []),
        (["a man", "a man"], []),
        (["", " "], []),
        ([], []),
        # in less than half of them, and two triggers in one folder
        ([*(f"ohwx man, {n}" for n in range(8)), *(f"text {n}" for n in range(11))], ["ohwx man"]),
        (["ohwx man, a", "sks, b", "sks, c", "ohwx man, d", "sks, e", "ohwx man, f"], ["ohwx man", "sks"]),
        ([*(f"ohwx man, {n}" for n in range(3)), *(f"text {n}" for n in range(27))], ["ohwx man"]),
        ([*(f"ohwx man, {n}" for n in range(3)), *(f"text {n}" for n in range(28))], []),
    ],
)
def test_the_trigger_is_what_several_sidecars_begin_with(texts, triggers, tmp_path):
    sidecars = Sidecars(existing="prepend")
    images = [str(tmp_path / f"{number}.jpg") for number in range(len(texts) + 3)]
    for image, text in zip(images, texts):
        sidecars.write(image, text.encode("utf-16"))
    assert shared_beginnings(*sidecars.count_beginnings(images)) == triggers
    for image, text in zip(images, texts):
        if text.strip():
            found = sidecars.compose(image, CAPTION, sidecars.read(image), triggers).decode("utf-16")
            start, _, rest = text.partition(", ")
            assert found == (f"{start}, {CAPTION}, {rest}" if start in triggers else f"{CAPTION}, {text}")


# --- encodings ----------------------------------------------------------------------------------------------

ENCODINGS = {  # codec: what texts are made of
    "utf-8": "aé東☂ß",
    "utf-8-sig": "aéñ",
    "utf-16-le-sig": "aé東",
    "utf-16-be-sig": "aéд",
    "utf-16-le": "ab é",
    "utf-16-be": "ab é",
    "cp1252": "aéüñ’–",
    "cp932": "赤い帽子の女",
}
WORDS = ["dog", "grass", "red hat", "a man", "it's"]


def random_sidecars(folder, number: int, rng: random.Random) -> dict[str, tuple[str, str]]:
    """Sidecars of images in all the encodings; by image the text and the codec."""
    written = {}
    for index in range(number):
        codec = list(ENCODINGS)[index % len(ENCODINGS)]
        parts = [
            "".join(rng.choices(ENCODINGS[codec], k=rng.randint(1, 6))).strip() or "x",
            rng.choice(WORDS),
        ]
        rng.shuffle(parts)
        text = f"{rng.choice([' ', ', ', '. ']).join(parts)} {index}"
        end = rng.choice(["", "\n", "\r\n", "\r", " \n\n"])
        (folder / f"{index}.txt").write_bytes(encode_text(text + end, codec))
        written[str(folder / f"{index}.jpg")] = text, codec
    return written


def decoded(image: str, codec: str) -> str:
    with open(image.replace(".jpg", ".txt"), "rb") as stream:
        content = stream.read()
    mark = encode_text("", codec)
    assert content.startswith(mark)
    return content[len(mark) :].decode(codec.removesuffix("-sig"))


def test_400_sidecars_in_eight_encodings_appended_and_prepended_twice(tmp_path):
    written = random_sidecars(tmp_path, 400, random.Random(0))
    for _ in range(2):
        for existing, caption in (("append", "a new dog"), ("prepend", "a second cat")):
            sidecars = Sidecars(existing=existing)
            for image in written:
                sidecars.write(image, sidecars.compose(image, caption, sidecars.read(image)))
    for image, (text, codec) in written.items():
        found = decoded(image, codec)
        assert [found.count(part) for part in (text, "a new dog", "a second cat")] == [1, 1, 1], (
            found,
            codec,
        )
        assert found.startswith("a second cat, ") and found.rstrip().endswith("a new dog")


@pytest.mark.parametrize(
    "content, caption, part",
    [
        ("it’s".encode("cp1252"), "東京", "cp1252, has no"),
        (b"a\0b\0\x01", CAPTION, "not a text file"),
        (random.Random(0).randbytes(300), CAPTION, "a.txt: "),
        (b"x" * (2**20 + 1), CAPTION, "larger than"),
        ("красная шляпа на траве".encode("cp1251"), "zwölf", "cp1251, has no 'ö'"),
        (b"mine", "a \ud800", "utf-8, has no '\\ud800'"),
    ],
)
def test_what_cannot_be_told_or_held_is_named_and_left(content, caption, part, tmp_path):
    sidecars, image = Sidecars(existing="append"), str(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError) as error:
        sidecars.compose(image, caption, sidecars.read(image))
    assert part in str(error.value) and f"{tmp_path}/a.txt" in str(error.value)
    assert (tmp_path / "a.txt").read_bytes() == content


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "outside").write_text("mine")
    image = str(tmp_path / "in" / "a.jpg")
    for target in (tmp_path / "outside", tmp_path / "nowhere"):
        (tmp_path / "in" / "a.txt").symlink_to(target)
        sidecars = Sidecars(existing="append")
        sidecars.write(image, sidecars.compose(image, CAPTION, sidecars.read(image)))
        expected = f"mine, {CAPTION}" if target.name == "outside" else f"{CAPTION}\n"
        assert (tmp_path / "in" / "a.txt").read_text() == expected
        assert not (tmp_path / "in" / "a.txt").is_symlink()
        (tmp_path / "in" / "a.txt").unlink()
    assert (tmp_path / "outside").read_text() == "mine" and not (tmp_path / "nowhere").exists()


# --- what was there before ----------------------------------------------------------------------------------


def kept(folder) -> dict[str, str]:
    """The texts in a backup folder by their names, a later one's with "later/"."""
    place = folder / Backup.FOLDER
    files = [path for path in place.rglob("*") if path.is_file() and not path.name.startswith(".")]
    names = [str(path.relative_to(place)).removeprefix(f"{Backup.FIRST}/") for path in files]
    return {name: path.read_text() for name, path in zip(names, files) if name != Backup.NEW}


def test_the_first_state_is_kept_and_later_ones_of_the_user(tmp_path):
    path = str(tmp_path / "a" / "x.txt")
    states = [
        ("mine", "run 1"),
        ("run 1", "run 2"),
        ("by hand", "run 3"),
        ("mine", "run 4"),
        ("run 4", "run 1"),
    ]
    for before, after in states:
        backup = Backup(tmp_path)
        backup.keep(path, before.encode(), after.encode())
        backup.record()
    Backup(tmp_path, 1).keep(str(tmp_path / "y.txt"), b"run 1", b"run 2")  # of another sidecar no run has
    assert kept(tmp_path) == {"a/x.txt": "mine", "later/a/x.txt.2": "by hand", "y.txt": "run 1"}


def test_a_backup_goes_through_no_link(tmp_path):
    folder, outside = tmp_path / "in", tmp_path / "outside"
    folder.mkdir(), outside.mkdir()
    (folder / Backup.FOLDER).symlink_to(outside)
    with pytest.raises(UserError, match="a link; remove it"):
        Backup(folder).check()
    (folder / Backup.FOLDER).unlink()
    place = folder / Backup.FOLDER
    (place / Backup.FIRST).mkdir(parents=True)
    (place / Backup.FIRST / "a").symlink_to(outside)
    (place / ".written-0").symlink_to(outside / "record")
    (place / Backup.NEW).symlink_to(outside / "list")
    (place / Backup.FIRST / "x.txt").symlink_to(outside / "x")
    Backup(folder).check()
    for name in ("a/x.txt", "a/b/x.txt"):
        with pytest.raises(UserError):
            Backup(folder).keep(str(folder / name), b"mine", b"new")
    backup = Backup(folder)
    backup.keep(str(folder / "x.txt"), b"mine", b"new")
    backup.record()
    assert (place / ".written-0").is_file() and (place / Backup.NEW).is_file()
    assert (place / Backup.LATER / "x.txt.2").read_text() == "mine" and not os.listdir(outside)
    (place / Backup.LATER / "b").symlink_to(outside)
    with pytest.raises(UserError, match="later/b: leads out of"):
        for content in (b"mine", b"by hand"):
            Backup(folder).keep(str(folder / "b" / "x.txt"), content, b"new")
    assert not os.listdir(outside)


def test_a_place_where_nothing_can_be_kept_is_refused(tmp_path):
    (tmp_path / Backup.FOLDER).write_text("a file")
    with pytest.raises(UserError, match="is a file, not a folder"):
        Backup(tmp_path).check()


@pytest.mark.parametrize("can_link", [True, False])
def test_what_is_kept_is_no_other_files_text(can_link, tmp_path, monkeypatch):
    """It is the file itself, under a further name, where it has no other; else a copy."""
    folder, outside = tmp_path / "in", tmp_path / "outside.txt"
    folder.mkdir()
    for place in (folder / "own.txt", folder / "linked.txt", outside):
        place.write_text("mine")
    os.link(folder / "linked.txt", tmp_path / "further.txt")
    (folder / "symbolic.txt").symlink_to(outside)
    if not can_link:

        def refuse(*arguments, **options):
            raise PermissionError(errno.EPERM, "not permitted")

        monkeypatch.setattr(os, "link", refuse)
    backup, sidecars = Backup(folder), Sidecars(existing="overwrite")
    for name in ("own", "linked", "symbolic"):
        backup.keep(str(folder / f"{name}.txt"), b"mine", b"new")
        sidecars.write(str(folder / f"{name}.jpg"), b"new")
        assert (folder / f"{name}.txt").read_text() == "new"
    for place in (tmp_path / "further.txt", outside, *folder.glob("*.txt")):
        place.write_text("changed in place")
    for kept in (folder / Backup.FOLDER / Backup.FIRST).glob("*.txt"):
        assert kept.read_text() == "mine" and kept.stat().st_nlink == 1 and not kept.is_symlink()
    assert len([*(folder / Backup.FOLDER / Backup.FIRST).glob("*.txt")]) == 3

"""Every layout and encoding of annotations in every script: read alike, or refused with a line."""

import shutil
from pathlib import Path

import pytest
from layouts import (
    HEADER,
    LAYOUTS,
    LISTS,
    OBJECTS,
    PHOTOS,
    ROWS,
    SCRIPTS,
    SPLITS,
    TEXTS,
    Found,
    coco,
    draw_photos,
    lines_of,
    table,
    text_of,
    unquoted,
    write_layout,
)

import metrics
from captioning.data.annotations import read_annotations
from captioning.data.tables import Columns
from metrics import MeteorDataError
from utils import UserError


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return draw_photos(tmp_path_factory.mktemp("drawn") / "Images")


@pytest.fixture(autouse=True)
def no_meteor(monkeypatch):
    """Scoring as where pycocoevalcap is not installed: quicker, and METEOR does not matter here."""

    def missing():
        raise MeteorDataError("not in these tests")

    monkeypatch.setattr(metrics, "Meteor", missing)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_in_every_script(layout, script, images, tmp_path):
    files, folders = write_layout(layout, images, tmp_path)
    found = SCRIPTS[script](files, folders, tmp_path)
    wanted = PHOTOS
    if script == "train_model" and any(word in layout for word in ("Karpathy", "split")):
        wanted = {name: own for name, own in PHOTOS.items() if SPLITS[name] != "test"}  # not its to see
    if layout == "Parquet" and script == "view_captions":
        wanted = {}  # the script has no folder to write the images to
    assert found == wanted


# --- encodings ----------------------------------------------------------------------------------------------

LANGUAGES = {  # a caption of each photo
    "German": "Ein Hund läuft über die Wiese|Zwei Mädchen spielen draußen|Der Mann trägt grüne Schuhe|"
    "Ein Café am Platz|Vögel auf dem Dach|Eine Frau mit schönem Hut",
    "French": "Un garçon joue à la plage|Une fille mange près d’un arbre|Le chien très mouillé|"
    "Deux élèves à côté|La forêt en été|Un café – fermé",
    "Polish": "Pies biegnie przez łąkę|Mężczyzna jedzie na rowerze|Chłopiec skacze|Dwoje dzieci bawi się|"
    "Dziewczynka z balonem|Kot śpi na łóżku",
    "Russian": "Собака бежит по траве|Двое детей играют|Мужчина едет|Кот спит|Девочка с мячом|Птица",
    "Japanese": "犬 が 草 の 上 を 走る|二人 の 子供 が 遊ぶ|猫 が 寝て いる|"
    "赤い 帽子 の 人|鳥 が 飛ぶ|海 の 写真",
    "Chinese": "一只 狗 在 草地 上|两个 孩子 在 玩|一个 男人 骑 车|猫 在 睡觉|红色 的 帽子|海边 的 照片",
    "Korean": "개가 잔디 위를 달린다|두 아이가 논다|남자가 자전거를 탄다|고양이가 잔다|빨간 모자|바다 사진",
}
ENCODINGS = {
    **dict.fromkeys(
        ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252", "mac_roman", "cp850"), "German"
    ),
    **{
        "windows-1252": "French",
        "cp1250": "Polish",
        "iso8859_2": "Polish",
        "cp1251": "Russian",
        "koi8_r": "Russian",
    },
    **{"cp932": "Japanese", "euc_jp": "Japanese", "gb18030": "Chinese", "euc_kr": "Korean"},
}


def write_encoded(encoding: str, kind: str, images: Path, folder: Path) -> tuple[str, Found]:
    """One of the kinds of files in an encoding, and what is in it."""
    captions = dict(zip(PHOTOS, LANGUAGES[ENCODINGS[encoding]].split("|")))
    found = {name: [caption] for name, caption in captions.items()}
    if kind == "sidecars":
        shutil.copytree(images, folder / "photos")
        for name, caption in captions.items():
            (folder / "photos" / name).with_suffix(".txt").write_bytes(caption.encode(encoding))
        return str(folder / "photos"), found
    text = {
        "table": lambda: table(captions.items(), ("Datei", "Text"), ";"),
        "Flickr8k.token.txt": lambda: "".join(f"{name}#0\t{own}\n" for name, own in captions.items()),
        "JSON": lambda: text_of(found),
        "metadata.jsonl": lambda: lines_of(
            {"file_name": name, "text": own} for name, own in captions.items()
        ),
    }[kind]()
    (folder / "file").write_bytes(text.encode(encoding))
    return str(folder / "file"), found


@pytest.mark.parametrize("kind", ["table", "Flickr8k.token.txt", "JSON", "metadata.jsonl"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_in_every_kind_of_file(encoding, kind, images, tmp_path, capsys):
    file, wanted = write_encoded(encoding, kind, images, tmp_path)
    assert {Path(one.path).name: one.captions for one in read_annotations(file, images)} == wanted
    said = "not UTF-8; read as" in capsys.readouterr().out
    assert said == (encoding != "utf-8-sig"), "which encoding was taken"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "cp1252", "cp932"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_encodings_in_every_script(script, encoding, images, tmp_path, capsys):
    file, wanted = write_encoded(encoding, "table", images, tmp_path)
    assert SCRIPTS[script]([file], [str(images)], tmp_path, wanted) == wanted
    assert f"{file}: not UTF-8; read as" in capsys.readouterr().out


def test_sidecars_in_several_encodings(images, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "photos")
    captions, encodings = LANGUAGES["German"].split("|"), ["utf-8", "cp1252", "utf-16", "cp1252", "utf-8-sig"]
    for name, caption, encoding in zip(PHOTOS, captions, encodings):  # the last one has none
        (tmp_path / "photos" / name).with_suffix(".txt").write_bytes(caption.encode(encoding))
    records = read_annotations(tmp_path / "photos")
    assert [own.captions for own in records] == [*([caption] for caption in captions[:5]), []]
    out = capsys.readouterr().out
    assert "2 sidecars not UTF-8; read as cp1252" in out
    assert "1 sidecar not UTF-8; read as utf-16" in out
    assert "1009434119_febe49276a.jpg: no caption beside it" in out


# --- what is refused ----------------------------------------------------------------------------------------

COCO_OF_NONE = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 2, "caption": "a"}]}
CHINESE = table([(name, "一只狗在绿色的草地上奔跑。") for name in PHOTOS], HEADER)
THAI = table([(name, "สุนัขวิ่งบนหญ้าสีเขียว") for name in PHOTOS], HEADER)
TWO_SPLITS = table([(name, "A dog", ("train", "val")[number % 2]) for number, (name, _) in enumerate(ROWS)])
REFUSED = {  # what is in the file, and what the line says
    "empty": (b"", "is empty"),
    "blank": (b"\n \r\n", "is empty"),
    "a header alone": (b"image,caption\n", "no images in it"),
    "columns of numbers": (b"a,b\n1,2\n3,4\n", 'its first line is "a,b"; looked for a header'),
    "prose": (b"This is a text.\nIt has no columns.\n", 'its first line is "This is a text."; looked for'),
    "a quote that never closes": (
        table(ROWS[:3], HEADER) + 'x.jpg,"A dog\n' + table(ROWS[3:]),
        "line 5: .* not closed",
    ),
    "a quote that never closes, tabs": (
        f'{unquoted(ROWS[:2], HEADER, chr(9))}x.jpg\t"A',
        "line 4: .* not closed",
    ),
    "a NUL byte": (
        table(ROWS, HEADER).encode().replace(b"grass", b"gr\0ss"),
        "byte .*, in line 2, is a control",
    ),
    "NUL bytes alone": (bytes(4000), "not a text file"),
    "damaged UTF-8": (table(ROWS, HEADER).encode() + b"x.jpg,\xc3\n", "damaged UTF-8 text .* in line 14"),
    "half of UTF-16": (table(ROWS, HEADER).encode("utf-16")[:-1], "begins as UTF-16-LE text, but is damaged"),
    "an Excel workbook": (b"PK\x03\x04\x14\0\6\0", "Excel workbook .* save the table as CSV"),
    "an image": (b"\x89PNG\r\n\x1a\n", "a PNG image; give the file that holds the captions"),
    "two columns of one name": (b"image,caption,caption\na.jpg,A dog,A cat\n", "two columns caption"),
    "broken JSON": (text_of(coco())[:-9], "not a JSON file"),
    "a broken JSON line": (lines_of(OBJECTS[:3]) + '{"image_id": "x"\n', "line 4: not a JSON file"),
    "a JSON line that is a list": (lines_of(OBJECTS[:3]) + "[1]\n", "line 4: not like"),
    "JSON lines with keys of other names": (
        lines_of({"bild": name, "satz": text} for name, text in ROWS),
        "line 1: no image named in it; it has bild, satz; --id_column and --caption_column name other keys",
    ),
    "a caption that is a number": (
        lines_of([*OBJECTS[:2], {"image_id": "x", "caption": 5}]),
        "line 3: .* is 5",
    ),
    "JSON of another layout": (text_of({"data": [1, 2]}), "JSON of no known layout; its first line is"),
    "COCO with a stray caption": (text_of(COCO_OF_NONE), "a caption of image 2, which is not among"),
    "Karpathy without tokens": (
        text_of({"images": [{"filename": "a", "split": "val", "sentences": [{}]}]}),
        "damaged",
    ),
    "a split of another name": (
        table([(*row, SPLITS[row[0]].replace("val", "dog")) for row in ROWS], (*HEADER, "split")),
        "the split of some images is dog; expected train, val or test",
    ),
    "an image in two splits": (
        "image,caption,split\n" + TWO_SPLITS,
        "is in the train split and in the val split",
    ),
    "Chinese": (CHINESE, ". of . captions are Chinese or Japanese without blanks .* put blanks"),
    "Thai": (THAI, ". of . captions are Thai without blanks"),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_refused_by_every_script(fault, script, images, tmp_path):
    content, part = REFUSED[fault]
    (tmp_path / "x.csv").write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    with pytest.raises(UserError, match=part) as error:
        SCRIPTS[script]([str(tmp_path / "x.csv")], [str(images)], tmp_path)
    assert "x.csv" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("script", SCRIPTS)
def test_columns_that_are_named(script, images, tmp_path):
    rows = [(f"{number}", name, "a remark on it", text) for number, (name, text) in enumerate(ROWS)]
    (tmp_path / "x.csv").write_text(table(rows, ("nr", "foto", "remark", "satz")), encoding="utf-8")
    files, folders = [str(tmp_path / "x.csv")], [str(images)]
    with pytest.raises(
        UserError, match=r"--caption_column saetze: no such column; there are nr, foto, remark, satz"
    ):
        SCRIPTS[script](files, folders, tmp_path, id_column="foto", caption_column="saetze")
    assert SCRIPTS[script](files, folders, tmp_path, id_column="foto", caption_column="satz") == PHOTOS


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_missing_file_and_a_folder_without_captions(script, images, tmp_path):
    with pytest.raises(UserError, match=r"none.csv: no such file"):
        SCRIPTS[script]([str(tmp_path / "none.csv")], [str(images)], tmp_path)
    with pytest.raises(
        UserError, match=r"a folder with 6 images, but no captions beside them .* it has 1000268201"
    ):
        SCRIPTS[script]([str(images)], [str(images)], tmp_path)


# --- what is named, and the rest read -----------------------------------------------------------------------

BROKEN = "2199200615.jpg| 4   A dog runs across the grass .\n"  # as in Flickr30k's results.csv
TOKENS, BARS = TEXTS["Flickr8k.token.txt"][1], TEXTS["Flickr30k results.csv"][1]
NULL = {"file_name": "x.jpg", "text": None}
SIZES = table([(name, 3) for name in PHOTOS], ("image_id", "size"))
BY = table([(*row, "me") for row in ROWS], (*HEADER, "by"))
NAMED = {  # what is in the file, what is said, and the number of captions that are read
    "Flickr30k's broken row": (BARS + BROKEN, "line 14: 2 columns in place of 3 (2199200615.jpg| 4", 12),
    "no caption": (table([*ROWS, ("x.jpg", "")], HEADER), "line 14: no caption (x.jpg)", 12),
    "no caption in a JSON line": (lines_of([*LISTS, NULL]), "line 7: no caption (x.jpg", 12),
    "no caption in Flickr8k.token.txt": (TOKENS + "x.jpg#0\t\n", "line 13: no caption (x.jpg)", 12),
    "no image in a JSON line": (
        lines_of([*LISTS, {"text": "A dog"}]),
        "line 7: no image named in it; it has text",
        12,
    ),
    "no captions in JSON lines": (
        lines_of({"file_name": name, "satz": "A dog"} for name in PHOTOS),
        "no captions in it (--caption_column names their key): a list of images",
        0,
    ),
    "no image": (table([*ROWS, ("", "A dog")], HEADER), "line 14: no image named", 12),
    "too many columns": (BY + "x.jpg,A,dog,me\n", "line 14: 4 columns in place of 3; quote captions", 12),
    "a line of another kind": (TOKENS + "the end\n", "line 13: not like photo.jpg#0<TAB>A dog (the end)", 12),
    "a list of images": (table([(name,) for name in PHOTOS]), None, 0),
    "a list with other columns": (SIZES, "no column of captions in image_id, size (--caption_column", 0),
    "an empty column": (table([(name, "") for name in PHOTOS], HEADER), "none of its rows has a caption", 0),
    "splits of no use": (table([(*row, "x") for row in ROWS], (*HEADER, "split")), "split has x, not", 12),
    "columns by their look": (
        TEXTS["columns of other names"][1],
        "Dateiname is taken for the images, Beschreibung for the captions; --id_column",
        12,
    ),
    "an image's other name": (TEXTS["Windows paths"][1], "6 images found by the end of the path", 12),
}


@pytest.mark.parametrize("case", NAMED)
def test_what_is_named_while_the_rest_is_read(case, images, tmp_path, capsys):
    content, said, count = NAMED[case]
    (tmp_path / "x.csv").write_text(content, encoding="utf-8", newline="")
    records = read_annotations(tmp_path / "x.csv", images)
    assert sum(len(record.captions) for record in records) == count
    own = {Path(record.path).name for record in records if record.path}
    assert own == set(PHOTOS)
    assert all(len(record.tokens) == len(record.captions) for record in records)
    out = capsys.readouterr().out
    assert out == "" if said is None else f"{tmp_path / 'x.csv'}" in out and said in out, out
    read_annotations(tmp_path / "x.csv", images)
    assert capsys.readouterr().out == "", "once, however often it is read"


def test_of_many_rows_some_are_named(images, tmp_path, capsys):
    (tmp_path / "x.csv").write_text(table(ROWS, HEADER) + "x.jpg,\n" * 200, encoding="utf-8")
    read_annotations(tmp_path / "x.csv")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[-1].endswith("and 195 more like these")


def test_several_columns_of_captions_need_not_all_be_filled(tmp_path):
    header = "image,caption1,caption2,caption_3,caption_count\n"
    (tmp_path / "x.csv").write_text(f'{header}a.jpg,A dog,,"A cat, a dog",2\nb.jpg,,,,0\nc.jpg,,A hat\n')
    records = read_annotations(tmp_path / "x.csv")
    assert {record.image_id: record.captions for record in records} == {
        "a.jpg": ["A dog", "A cat, a dog"], "b.jpg": [], "c.jpg": ["A hat"],
    }  # fmt: skip
    (tmp_path / "x.jsonl").write_text('{"file_name": "a.jpg", "text1": "A dog", "text2": null}\n')
    assert [record.captions for record in read_annotations(tmp_path / "x.jsonl")] == [["A dog"]]
    named = read_annotations(tmp_path / "x.csv", None, Columns(caption="caption_3"))
    assert [record.captions for record in named] == [["A cat, a dog"], [], []]

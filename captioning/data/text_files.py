"""Text of any encoding, decoded and encoded again; rows of tables, JSON lines; word vectors."""

from __future__ import annotations

import ast
import codecs
import csv
import io
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metrics.tokenizer import find_unsegmented
from utils import UserError, is_main_process, parse_json, require_regular_file, say

if TYPE_CHECKING:
    from torch import Tensor

WITH_MARK = "-sig"  # ends the name of a codec whose file begins with a byte order mark
BYTE_ORDER_MARKS = {  # those of UTF-32 first, as one of them begins as one of UTF-16
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-8": codecs.BOM_UTF8,
}
CONTROL_BYTES = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")  # of no text in an encoding of single bytes
# the older encodings whose texts may look like UTF-16
LIKE_UTF16 = ("gb18030", "big5", "cp932", "euc_kr", "euc_jp", "cp1251", "koi8_r")
# a Latin letter or digit beside one of another script, as where halves of characters are read as whole ones
MIXED = re.compile(r"[0-9A-Za-z][\u0400-\uffef]|[\u0400-\uffef][0-9A-Za-z]")
UNDECODED = re.compile("[\udc80-\udcff]")
SAMPLE = 10_000  # characters that are looked at, of a long text
NO_TEXT = {  # by how they begin, what people give where text is expected
    b"PK\x03\x04": "an Excel workbook or ZIP archive; save the table as CSV, or unpack it",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook; save the table as CSV",
    b"\x1f\x8b": "compressed by gzip; unpack it",
    b"\xff\xd8\xff": "a JPEG image; give the file that holds the captions",
    b"\x89PNG": "a PNG image; give the file that holds the captions",
}
WESTERN = "àâæçèéêëîïôœùûüÿ äöüß áéíñóúü áâãàçéêíóôõú àèéìîòóù åäöé æøåéó áéíóúýþæöð éèëïöü õäöüšž àçèéíïòóúü"
CENTRAL = "ąćęłńóśźż áčďéěíňóřšťúůýž áäčďéíĺľňóôŕšťúýž áéíóöőúüű ăâîşţ čćđšž"
CYRILLIC = (
    "абвгдежзийклмнопрстуфхцчшщъыьэюяё абвгґдеєжзиіїйклмнопрстуфхцчшщьюя абвгдђежзијклљмнњопрстћуфхцчџш"
)
LETTERS = {  # the encodings looked for, the likeliest first, and the letters of each of their languages
    "cp1252": WESTERN,
    "cp1250": CENTRAL,
    "cp1251": CYRILLIC,
    "cp1254": "çğıöşüâîû\u0307",
    "cp1253": "αβγδεζηθικλμνξοπρστυφχψωςάέήίόύώϊϋΐΰ",
    "cp1257": "ąčęėįšųūž āčēģīķļņšūž äöõüšž",
    "cp1255": "אבגדהוזחטיךכלםמןנסעףפץצקרשת",
    "cp1256": "".join(map(chr, range(0x621, 0x653))) + "پچژگکی",
    "iso8859_2": CENTRAL,
    "koi8_r": CYRILLIC.split()[0],
    "mac_roman": WESTERN,
    "cp850": WESTERN,
    "cp932": "kana",
    "euc_jp": "kana",
    "cp949": "hangul",
    "gb18030": "han",
    "big5": "han",
    "cp874": "thai",
}
SCRIPTS = {  # without an alphabet: the first and last character, those of what is frequent among them
    "kana": ("\u3041\u9fff", "\u3041\u30ff"),
    "han": ("\u4e00\u9fff", "\u4e00\u9fff"),
    "hangul": ("\uac00\ud7a3", "\uac00\ud7a3"),
    "thai": ("\u0e01\u0e5b", "\u0e30\u0e4e"),  # vowels and tones
}
COMMON = {"gb18030": "gb2312", "cp949": "iso2022_kr"}  # of those that take nearly any bytes, the usual part
CASED = ("cp1251", "cp1253", "koi8_r")  # in which a text is nearly all beyond ASCII, and has capitals
LARGEST_DOUBT = 0.4  # share of characters that look wrong, above which an encoding is rejected


def read_text(path: str | Path) -> tuple[str, str]:
    """A text file's content and codec, as `decode_text` gives them.

    Raises:
        UserError: there is no such file, or as `decode_text` does.
    """
    path = Path(path)
    if not path.is_file():  # nor a pipe, from which reading might never end
        raise no_such(path, "not a file" if path.exists() else "no such file")
    return decode_text(path.read_bytes(), path)


def no_such(path: str | Path, text: str) -> UserError:
    """The error for a file or folder that is not there."""
    parts = [part.strip() for part in str(path).split(",") if part.strip()]
    if "," in str(path) and all(Path(part).exists() for part in parts):
        text = f"several are separated by blanks, not by commas: {' '.join(parts)}"
    return UserError(f"{path}: {text}")


def read_told(path: str | Path) -> str:
    """A text file's content; a line says which encoding it has where that is not UTF-8. Raises UserError as
    `read_text` does."""
    text, codec = read_text(path)
    if not codec.startswith("utf-8"):
        say_once(f"{path}: not UTF-8; read as {codec} (save it as UTF-8 where letters come out wrong)")
    return text


def decode_text(data: bytes, name: str | Path) -> tuple[str, str]:
    """The text of a file, and the codec with which `encode_text` gives the same bytes again.

    UTF-8, a byte order mark, and UTF-16 and UTF-32 without one are recognized by their bytes. Of older
    encodings the likeliest is taken; ASCII text is written alike in all of them.

    Args:
        name: of the file, for the message.

    Returns:
        The text, without a byte order mark and with its line ends as they are; the codec's name, which ends
        in "-sig" where the file begins with a mark.

    Raises:
        UserError: it is no text, or damaged, or its encoding cannot be told.
    """
    for start, reason in NO_TEXT.items():
        if data.startswith(start):
            raise UserError(f"{name}: {reason}")
    for codec, mark in BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            text = _decode(data[len(mark) :], codec)
            if text is None:
                raise UserError(f"{name}: begins as {codec.upper()} text, but is damaged; save it as UTF-8")
            return text, codec + WITH_MARK
    text = _decode(data, "utf-8")
    control = CONTROL_BYTES.search(data)
    if text is not None and not control:
        return text, "utf-8"
    codec = _wide_codec(data)
    if codec is None and control and (text is None or b"\0" in data):
        line = data.count(b"\n", 0, control.start()) + 1
        place = f"byte {control.start()}, in line {line}, is a control character"
        raise UserError(f"{name}: not a text file ({place}); replace it, or save it as UTF-8")
    if codec is None and text is not None:
        return text, "utf-8"
    if codec is None and (error := _damage(data)):
        raise UserError(f"{name}: damaged UTF-8 text ({error}); mend it, and save it as UTF-8")
    codec = codec or _older_codec(data)
    if codec is None:
        raise UserError(f"{name}: not UTF-8, and its encoding cannot be told; save it as UTF-8")
    return data.decode(codec), codec


def split_rows(text: str, name: str | Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    """(number of its first line, fields) of each row that is not blank.

    Raises:
        UserError: no such text, or a row over several lines whose quotes do not match: a quote that is not
            closed would swallow the lines up to the next one.
    """
    lines: list[str] = []  # of the row that is being read

    def remember() -> Iterator[str]:
        for line in io.StringIO(text, newline=""):
            lines.append(line)
            yield line

    reader = csv.reader(remember(), delimiter=separator)
    try:
        for row in reader:
            if len(lines) > 1 or lines[0].count('"') % 2:
                list(csv.reader(lines, delimiter=separator, strict=True))
            first = reader.line_num - len(lines) + 1
            lines.clear()
            if any(map(str.strip, row)):
                yield first, row
    except csv.Error as error:
        line = reader.line_num - len(lines) + 1
        reason = (
            "a quote that is not closed" if len(lines) > 1 or "unexpected end" in str(error) else str(error)
        )
        raise UserError(f"{name}, line {line}: not a CSV row ({reason}); mend the line") from None


def captions_of_cell(cell: str) -> list[str]:
    """The captions of a cell: one, or a list as JSON or Python write it."""
    if cell[:1] == "[" and cell[-1:] == "]":
        for parse in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                values = parse(cell)
                if isinstance(values, list) and all(isinstance(value, str) for value in values):
                    return [value.strip() for value in values if value.strip()]
    return [cell] if cell else []


def parse_json_lines(text: str, name: str | Path) -> list[tuple[int, Any]] | None:
    """(line number, object) of each line of JSON lines; None where the text is something else.

    Raises:
        UserError: a line behind the first is damaged.
    """
    first, _, rest = text.lstrip().partition("\n" if "\n" in text else "\r")
    if not (rest.strip() and first.rstrip().endswith("}")):
        return None
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return None
    lines = enumerate(re.split(r"\r\n|\n|\r", text), start=1)
    return [(number, parse_json(line, f"{name}, line {number}")) for number, line in lines if line.strip()]


@cache
def say_once(text: str) -> None:
    """Print a line about a file that is read, once, however often it is."""
    if is_main_process():
        say(text)


def report_problems(name: str | Path, problems: Sequence[str], shown: int = 5) -> None:
    """Say what in a file is not read as its author meant it; the first few, and how many more."""
    for problem in problems[:shown]:
        say_once(f"{name}, {problem}")
    if len(problems) > shown:
        say_once(f"{name}: ... and {len(problems) - shown} more like these")


def require_words(captions: Iterable[str], name: str | Path) -> None:
    """Name sentences without blanks between the words, each of which would count as one word.

    Raises:
        UserError: they are a tenth of the captions or more.
    """
    captions = list(captions)
    found = find_unsegmented(captions)
    if found:
        script, sentences = found
        text = (
            f"{name}: {len(sentences)} of {len(captions)} captions are {script} without blanks between words "
            f'("{sentences[0][:30]}")'
        )
        if 10 * len(sentences) >= len(captions):
            raise UserError(f"{text}: each would count as one word; put blanks between words, or characters")
        say_once(f"{text}: each counts as one word; put blanks between words, or remove them")


def encode_text(text: str, codec: str) -> bytes:
    """The bytes of a text in a codec that `decode_text` gave. Raises UnicodeEncodeError where it lacks a
    character."""
    plain = codec.removesuffix(WITH_MARK)
    mark = BYTE_ORDER_MARKS[plain] if codec.endswith(WITH_MARK) else b""
    return mark + text.encode(plain)


def _decode(data: bytes, codec: str) -> str | None:
    try:
        return data.decode(codec)
    except UnicodeDecodeError:
        return None


def _damage(data: bytes) -> str | None:
    """Where text that is UTF-8 for the most part is not; None where it is in an older encoding."""
    text = data.decode("utf-8", "surrogateescape")
    wrong = UNDECODED.findall(text)
    right = sum(character > "\x7f" for character in text) - len(wrong)
    if right < 3 * len(wrong):
        return None
    before = text.partition(wrong[0])[0]
    return f"at byte {len(before.encode('utf-8'))}, in line {before.count(chr(10)) + 1}"


def _wide_codec(data: bytes) -> str | None:
    """UTF-16 or UTF-32 without a mark: where that reading, and no older encoding's, has common characters.

    Nearly any bytes are UTF-16, but the characters of a wrong reading are rare ones.
    """
    shares = {}
    for codec in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
        text = _decode(data, codec)
        shares[codec] = _share_of_common(text) if text else 0.0
    best = max(shares, key=shares.__getitem__)
    if shares[best] < 0.9:
        return None
    if not CONTROL_BYTES.search(data):
        for codec in LIKE_UTF16:
            text = _decode(data, codec)
            if text and _share_of_common(text) >= 0.9 and not MIXED.search(text):
                return None
    return best


def _share_of_common(text: str) -> float:
    sample = text[:SAMPLE]
    return sum(map(_is_common, sample)) / len(sample)


@cache
def _is_common(character: str) -> bool:
    """Whether the character is among those that most texts are made of."""
    number = ord(character)
    if number < 0x1100:  # alphabets
        return character.isprintable() or character in "\t\n\r\f\v\x1b"
    if 0x2010 <= number <= 0x2030 or character in "€™":
        return True
    if 0x3000 <= number <= 0x30FF or 0xAC00 <= number <= 0xD7A3 or 0xFF01 <= number <= 0xFF5E:
        return True  # Japanese syllables, Korean ones, wide forms
    for codec, last in (("gb2312", 0xD7), ("big5", 0xC6), ("shift_jis", 0x97)):
        try:  # the standards give their commoner ideographs the lower numbers
            encoded = character.encode(codec)
        except UnicodeEncodeError:
            continue
        if len(encoded) == 2 and encoded[0] <= last:
            return True
    return False


def _older_codec(data: bytes) -> str | None:
    """The legacy encoding that fits best; None where none fits well, or gives the same bytes again.

    That is as charset-normalizer sees it, which cannot tell the languages of Europe apart in a few lines, and
    the share of characters beyond ASCII that do not belong to one language of the encoding.
    """
    sample = b""
    for line in data.splitlines(keepends=True):
        first = re.search(rb"[\x80-\xff]", line)
        if first and len(sample) < SAMPLE:
            sample += line[first.start() if len(line) > SAMPLE else 0 :][:SAMPLE]
    doubts = {}
    for codec in LETTERS:
        with suppress(UnicodeDecodeError):
            text = codecs.getincrementaldecoder(codec)().decode(sample)  # which may end within a character
            doubts[codec] = round(_doubt(text, codec), 1)
    for codec in sorted(doubts, key=doubts.__getitem__):
        text = _decode(data, codec) if doubts[codec] <= LARGEST_DOUBT else None
        if text is not None and encode_text(text, codec) == data:
            return codec
    return None


def _doubt(text: str, codec: str) -> float:
    """How wrong the text looks that this codec makes of its bytes: 0 is not at all."""
    from charset_normalizer.md import mess_ratio

    beyond = [character for character in text if not character.isascii()]
    letters = [character for character in beyond if character.isalpha() or unicodedata.combining(character)]
    wrong = _wrong_letters(letters, LETTERS[codec])
    wrong += sum(map(_is_out_of_place, " " + text, text, text[1:] + " "))
    if codec in COMMON:
        wrong += sum(not letter.encode(COMMON[codec], errors="ignore") for letter in letters)
    one_case = codec in CASED and text in (text.lower(), text.upper())  # rather Hebrew, or Thai
    return wrong / max(len(beyond), 1) + mess_ratio(text, 1.0) + 0.1 * one_case


def _wrong_letters(letters: list[str], languages: str) -> float:
    """How many letters are not of the one language that has most of them."""
    if languages not in SCRIPTS:
        letters = "".join(letters).lower()
        letters = [letter for letter in letters if not letter.isascii()]  # "İ" in lower case has an "i"
        return min(sum(letter not in alphabet for letter in letters) for alphabet in languages.split())
    (first, last), (first_frequent, last_frequent) = SCRIPTS[languages]
    wrong = sum(not first <= letter <= last for letter in letters)
    frequent = sum(first_frequent <= letter <= last_frequent for letter in letters)
    return wrong + (len(letters) / 2 if frequent < len(letters) / 10 else 0)


def _is_out_of_place(before: str, character: str, after: str) -> bool:
    """Whether this is no character of a text, or one that does not stand where it is, beside letters."""
    if character.isascii():
        return False
    if character.isalpha():
        return character.isupper() and before.islower()
    category = unicodedata.category(character)
    if character in "ª¹²³¼½¾±¶¦¤¥¢":
        return before.isalpha() or after.isalpha()
    inside = before.isalpha() and after.isalpha() and category[0] != "M"
    return category[0] == "C" or (inside and character not in "’‘‑–")


# --- word vectors -------------------------------------------------------------------------------------------


def load_embeddings(path: str | Path, word_map: dict[str, int]) -> tuple[Tensor, int]:
    """Word vectors from a text file, one word and its numbers per line (GloVe, word2vec, fastText).

    Returns:
        embeddings (len(word_map), width) float32; a word with capitals that the file lacks gets the vector of
        the same word in lower case, other such words are drawn from U(-sqrt(3/width), sqrt(3/width)). How
        many of the words were found.

    Raises:
        UserError: the file is missing, the line of a word is malformed, or it has none of the words.
    """
    import torch

    vectors: dict[str, np.ndarray] = {}
    wanted = {*word_map, *map(str.lower, word_map)}
    width, number = None, 0
    require_regular_file(path, "no such file of word vectors")
    try:
        with open(path, encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                line = line.rstrip()
                if number == 1 and len(line.split(" ")) == 2:
                    continue  # word2vec's header: count and width
                width = width or len(line.split(" ")) - 1
                word, *values = line.rsplit(" ", width)  # from the right: some words contain spaces
                if word in wanted:
                    vectors[word] = np.array(values, dtype=np.float32)
                    if len(values) != width or not width:
                        raise ValueError(f"{len(values)} numbers where {width} were expected")
                    if not np.isfinite(vectors[word]).all():
                        raise ValueError("one is nan or infinite")
    except ValueError as error:  # UnicodeDecodeError is one
        raise UserError(
            f"{path}, line {number + 1 if isinstance(error, UnicodeDecodeError) else number}: not a word and "
            f"its numbers ({error}); give a GloVe text file"
        ) from None
    found = {
        word: own for word in word_map if (own := vectors.get(word, vectors.get(word.lower()))) is not None
    }
    if not found:
        raise UserError(
            f"{path}: holds none of the word map's words; give a GloVe text file of the captions' language"
        )
    embeddings = torch.empty(len(word_map), width).uniform_(-math.sqrt(3 / width), math.sqrt(3 / width))
    for word, vector in found.items():
        embeddings[word_map[word]] = torch.from_numpy(vector)
    return embeddings, len(found)

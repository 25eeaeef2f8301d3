"""Text files from anywhere: which encoding they have.

UTF-8, what a byte order mark says, UTF-16 without one, and else the likeliest of the encodings in `LETTERS`.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from contextlib import suppress
from functools import cache
from pathlib import Path

from utils import UserError, printable

BOMS = {  # the longest first; the codecs write the mark again (UTF-16 with the low byte first)
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
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
COMMON = {
    "gb18030": "gb2312",
    "cp949": "iso2022_kr",
}  # for those that take nearly any bytes: the usual characters
CASED = ("cp1251", "cp1253", "koi8_r")  # in which a text is nearly all beyond ASCII, and has capitals
LONGEST_SAMPLE = 2**16  # bytes from which the encoding is told
LARGEST_DOUBT = 0.4  # share of a text's characters that look wrong above which it is not told


def read_text(path: str | Path) -> tuple[str, str]:
    """A text file's content, its line ends as they are, and the codec that `decode_text` finds.

    Raises:
        UserError: no such file, or as `decode_text` does.
    """
    path = Path(path)
    if not path.is_file():  # nor a pipe, from which reading might never end
        raise UserError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    return decode_text(path.read_bytes(), path)


def decode_text(data: bytes, name: str | Path) -> tuple[str, str]:
    """Text of any encoding, and the codec to write it with again: one of UTF-8, "utf-8-sig", "utf-16" and
    "utf-32", which write the byte order mark too, "utf-16-le" and "utf-16-be" without one, or one of
    `LETTERS`.

    Args:
        name: for messages.

    Raises:
        UserError: this is no text, or damaged, or it cannot be told which encoding it has.
    """
    codec = next((codec for mark, codec in BOMS.items() if data.startswith(mark)), None)
    for start, reason in NO_TEXT.items():
        if data.startswith(start):
            raise UserError(f"{name}: {reason}")
    if codec is None and b"\0" in data:
        codec = _utf16_without_bom(data)
    try:
        text, codec = data.decode(codec or "utf-8"), codec or "utf-8"
    except UnicodeDecodeError as error:
        if codec or _is_mostly_utf8(data):
            what = f"not {(codec or 'utf-8').upper()}, as the rest of the file is ({error.reason})"
            line = data.count(b"\n", 0, error.start) + 1
            raise UserError(f"{name}, line {line}: {what}; mend the line, or replace the file") from None
        text, codec = _decode_by_likelihood(data, name)
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{name}, line {line}: a NUL byte: no text, or damaged; mend or replace the file")
    return text, codec


@cache
def note_encoding(path: str | Path, codec: str) -> None:
    """Say once which encoding a file was read with, where it is not UTF-8."""
    if codec not in ("utf-8", "utf-8-sig"):
        print(printable(f"{path}: not UTF-8; read as {codec}"), flush=True)


def _utf16_without_bom(data: bytes) -> str | None:
    """The codec of text whose bytes 0 are halves of characters, None of other text."""
    blanks = sum(map(data.count, (b" ", b"\n", b"\r", b"\t")))  # each must be half of a blank
    found = {}
    for codec in ("utf-16-le", "utf-16-be"):
        with suppress(UnicodeDecodeError):
            text = data.decode(codec)
            if "\0" not in text and 2 * sum(map(text.count, " \n\r\t")) >= blanks:
                found[codec] = sum(map(str.isascii, text))  # some are in any text: blanks, digits, line ends
    best = max(found, key=found.__getitem__, default=None)
    return best if best and found[best] else None


def _is_mostly_utf8(data: bytes) -> bool:
    """Whether UTF-8 is what the text was meant to be: in other encodings its sequences are rare."""
    text = data.decode("utf-8", errors="replace")
    wrong = text.count("\ufffd")
    return sum(not character.isascii() for character in text) - wrong > 4 * wrong


def _decode_by_likelihood(data: bytes, name: str | Path) -> tuple[str, str]:
    """The text and codec of `LETTERS` by which the least of it looks wrong.

    That is as charset-normalizer sees it, which cannot tell the languages of Europe apart in a few lines, and
    the share of characters beyond ASCII that do not belong to one language of the encoding.
    """
    sample = b""
    for line in data.splitlines(keepends=True):
        first = re.search(rb"[\x80-\xff]", line)
        if first and len(sample) < LONGEST_SAMPLE:
            sample += line[first.start() if len(line) > LONGEST_SAMPLE else 0 :][:LONGEST_SAMPLE]
    doubts = {}
    for codec in LETTERS:
        with suppress(UnicodeDecodeError):
            text = codecs.getincrementaldecoder(codec)().decode(sample)  # which may end within a character
            doubts[codec] = round(_doubt(text, codec), 1)
    for codec in sorted(doubts, key=doubts.__getitem__):
        if doubts[codec] <= LARGEST_DOUBT:
            with suppress(UnicodeDecodeError):
                return data.decode(codec), codec
    raise UserError(f"{name}: it cannot be told which encoding this text has; save it as UTF-8")


def _doubt(text: str, codec: str) -> float:
    """How wrong the text looks that this codec makes of its bytes: 0 is not at all."""
    from charset_normalizer.md import mess_ratio

    beyond = [character for character in text if not character.isascii()]
    letters = [character for character in beyond if character.isalpha() or unicodedata.combining(character)]
    wrong = _wrong_letters(letters, LETTERS[codec])
    wrong += sum(map(_is_out_of_place, " " + text, text, text[1:] + " "))
    if codec in COMMON:
        wrong += "".join(letters).encode(COMMON[codec], errors="replace").count(b"?")
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

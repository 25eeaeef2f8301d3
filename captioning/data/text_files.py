"""Text in whatever encoding it comes, and back again in the same one."""

from __future__ import annotations

import codecs
import re
from functools import cache
from pathlib import Path

from utils import UserError

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
TWO_BYTE_CODECS = ("gb18030", "big5", "cp932", "euc_kr", "euc_jp")
CYRILLIC_CODECS = ("cp1251", "koi8_r")
# a Latin letter or digit beside one of another script, as where halves of characters are read as whole ones
MIXED = re.compile(r"[0-9A-Za-z][\u0400-\uffef]|[\u0400-\uffef][0-9A-Za-z]")
WESTERN = re.compile(r"[\x00-\x7f‘’“”„‚–—…•€™Œœ¡£§©«®°·»¿À-ÖØ-öø-ÿŠšŽžŸ]*")
# what every encoding that is taken has as single bytes; Japanese ones may have a yen sign and an overline
ASCII = bytes(byte for byte in range(0x20, 0x7F) if byte not in b"\\~")
UNDECODED = re.compile("[\udc80-\udcff]")
SAMPLE = 10_000  # characters that are looked at, of a long text


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
        place = f"byte {control.start()} is a control character"
        raise UserError(f"{name}: not a text file ({place}); replace it, or save it as UTF-8")
    if codec is None and text is not None:
        return text, "utf-8"
    if codec is None and (error := _damage(data)):
        raise UserError(f"{name}: damaged UTF-8 text ({error}); mend it, and save it as UTF-8")
    codec = codec or _older_codec(data)
    text = codec and _decode(data, codec)
    if text is None or encode_text(text, codec) != data:
        raise UserError(f"{name}: not UTF-8, and its encoding cannot be told; save it as UTF-8")
    return text, codec


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
    return f"at byte {len(text.partition(wrong[0])[0].encode('utf-8'))}"


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
        for codec in (*TWO_BYTE_CODECS, *CYRILLIC_CODECS):
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
    """The likeliest encoding in which ASCII characters are single bytes. Short texts tell little: those that
    read well as a Western language are taken for one."""
    from charset_normalizer import from_bytes

    matches = [match for match in from_bytes(data) if _has_ascii(match.encoding)]
    best = matches[0] if matches else None
    if best is None or not best.coherence:
        western = _decode(data, "cp1252")
        if western is not None and WESTERN.fullmatch(western) and _is_mostly_ascii(data):
            return "cp1252"
    return best.encoding if best else None


def _has_ascii(codec: str) -> bool:
    return _decode(ASCII, codec) == ASCII.decode("ascii")


def _is_mostly_ascii(data: bytes) -> bool:
    return sum(byte < 0x80 for byte in data) >= 0.6 * len(data)

"""METEOR's knowledge of English words: a stemmer, synonyms and paraphrases, and where their files are.

The stemmer is implemented here. Word lists and paraphrases are read from an installed `pycocoevalcap`. Its
paraphrase table (62 MB compressed, 5.3 million pairs) is converted once, in a few seconds, into a 100 MB file
in the user's cache directory, and from then on mapped into memory. Where no file can be written, each Meteor
holds those 100 MB in its own memory.
"""

import gzip
import importlib.util
import mmap
import os
import re
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from array import array
from collections.abc import Iterator
from functools import lru_cache
from io import BytesIO
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO

KEPT_PHRASES = 2**14  # whose paraphrases are cached


class MeteorDataError(RuntimeError):
    """METEOR's data files are missing or damaged; the message is one line, to be shown to the user."""


# ------------------------------------------------------------------------------------------------------ stems

# Porter2 in Snowball's version of 2010; later ones stem some words differently, which changes scores.
_WHOLE_WORDS = dict(
    skis="ski", skies="sky", dying="die", lying="lie", tying="tie", idly="idl", gently="gentl", ugly="ugli",
    early="earli", only="onli", singly="singl", sky="sky", news="news", howe="howe", atlas="atlas",
    cosmos="cosmos", bias="bias", andes="andes",
)  # fmt: skip
_DONE_AFTER_STEP_1A = {"inning", "outing", "canning", "herring", "earring", "proceed", "exceed", "succeed"}
_STEP_2 = dict(
    tional="tion", enci="ence", anci="ance", abli="able", entli="ent", izer="ize", ization="ize",
    ational="ate", ation="ate", ator="ate", alism="al", aliti="al", alli="al", fulness="ful", ousli="ous",
    ousness="ous", iveness="ive", iviti="ive", biliti="ble", bli="ble", ogi="og", fulli="ful", lessli="less",
    li="",
)  # fmt: skip
_STEP_3 = dict(
    tional="tion", ational="ate", alize="al", icate="ic", iciti="ic", ical="ic", ful="", ness="", ative="",
)  # fmt: skip
_STEP_4 = dict(
    al="", ance="", ence="", er="", ic="", able="", ible="", ant="", ement="", ment="", ent="", ism="",
    ate="", iti="", ous="", ive="", ize="", ion="",
)  # fmt: skip
_ONLY_AFTER = {"ogi": ("l",), "li": tuple("cdeghkmnrt"), "ion": ("s", "t")}
_CLOSED_SYLLABLE = re.compile("[aeiouy][^aeiouy]")
_SHORT_SYLLABLE = re.compile("([^aeiouy][aeiouy][^aeiouywxY]|^[aeiouy][^aeiouy])$")


def stem(word: str) -> str:
    """Stem of a lower-case word by the English (Porter2) algorithm of the Snowball project, as of 2010."""
    if len(word) <= 2 or word in _WHOLE_WORDS:
        return _WHOLE_WORDS.get(word, word)
    letters = list(word.removeprefix("'"))
    for i, letter in enumerate(letters):
        if letter == "y" and (i == 0 or letters[i - 1] in "aeiouy"):
            letters[i] = "Y"  # a consonant
    word = "".join(letters)

    # The regions R1 and R2 are fixed here; later changes to the word do not move them.
    head = re.match("gener|commun|arsen", word) or _CLOSED_SYLLABLE.search(word)
    r1 = head.end() if head else len(word)
    head = _CLOSED_SYLLABLE.search(word, r1)
    r2 = head.end() if head else len(word)

    word = _step_1a(re.sub("('s'|'s|')$", "", word))
    if word in _DONE_AFTER_STEP_1A:
        return word
    word = _step_1b(word, r1)
    if len(word) > 2 and word[-1] in "yY" and word[-2] not in "aeiouy":  # step 1c
        word = word[:-1] + "i"
    for endings, region in ((_STEP_2, r1), (_STEP_3, r1), (_STEP_4, r2)):
        for start in range(max(0, len(word) - 7), len(word)):  # longest suffix first
            suffix = word[start:]
            if suffix in endings:
                in_region = start >= (r2 if suffix == "ative" else region)
                if in_region and (suffix not in _ONLY_AFTER or word[:start].endswith(_ONLY_AFTER[suffix])):
                    word = word[:start] + endings[suffix]
                break  # shorter suffixes are not tried, even where this one is not replaced
    body = word[:-1]
    in_r1, in_r2 = len(body) >= r1, len(body) >= r2
    loses_e = word.endswith("e") and (in_r2 or (in_r1 and not _SHORT_SYLLABLE.search(body)))
    loses_l = word.endswith("ll") and in_r2
    return (body if loses_e or loses_l else word).replace("Y", "y")  # step 5


def _step_1a(word: str) -> str:
    if word.endswith("sses"):
        return word[:-2]
    if word.endswith(("ied", "ies")):
        return word[:-2] if len(word) > 4 else word[:-1]
    is_plural = word.endswith("s") and not word.endswith(("us", "ss")) and re.search("[aeiouy]", word[:-2])
    return word[:-1] if is_plural else word


def _step_1b(word: str, r1: int) -> str:
    suffix = re.search("(eed|ed|ing)(ly)?$", word)
    if not suffix:
        return word
    body = word[: suffix.start()]
    if suffix[1] == "eed":
        return body + "ee" if len(body) >= r1 else word
    if not re.search("[aeiouy]", body):
        return word
    if body.endswith(("bb", "dd", "ff", "gg", "mm", "nn", "pp", "rr", "tt")):
        return body[:-1]
    is_short = len(body) == r1 and _SHORT_SYLLABLE.search(body)
    return body + "e" if is_short or body.endswith(("at", "bl", "iz")) else body


# ------------------------------------------------------------------------------------------------- word lists


class Lexicon:
    """The word lists in METEOR's jar: function words, abbreviations, WordNet's synsets and exceptions.

    Raises:
        MeteorDataError: the jar cannot be read.
    """

    # WordNet's rules of detachment for nouns, verbs and adjectives, in the order of the original
    _ENDINGS = (
        ("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"),
        ("ies", "y"), ("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"),
        ("ing", ""), ("er", ""), ("est", ""), ("er", "e"), ("est", "e"),
    )  # fmt: skip

    def __init__(self, jar: Path) -> None:
        lists = "function/english.words", "nonbreaking/english.prefixes"
        lists += "synonym/english.synsets", "synonym/english.exceptions"
        try:
            with zipfile.ZipFile(jar) as archive:
                contents = [archive.read(name).decode().split("\n") for name in lists]
        except Exception as error:  # zipfile lets a damaged archive raise almost anything
            raise _unreadable(jar, error) from error
        words, prefixes, synsets, exceptions = contents
        self.function_words = set(words)
        self.abbreviations = {}
        for fields in map(str.split, prefixes):
            if fields and not fields[0].startswith("#"):
                self.abbreviations[fields[0]] = "number" if fields[1:2] == ["#NUMERIC_ONLY#"] else "always"
        self._synsets = dict(zip(synsets[::2], synsets[1::2]))
        self._base_forms: dict[str, list[str]] = {}
        for base, forms in zip(exceptions[::2], exceptions[1::2]):
            for form in forms.split():
                self._base_forms.setdefault(form, []).append(base)

    def synsets(self, word: str) -> frozenset[str]:
        """WordNet synsets of a word and of its base form."""
        forms = [word, *(self._base_forms.get(word) or self._detach_ending(word))]
        return frozenset(chain.from_iterable(self._synsets.get(form, "").split() for form in forms))

    def _detach_ending(self, word: str) -> list[str]:
        if len(word) > 2 and not word.endswith("ss"):
            for ending, replacement in self._ENDINGS:
                base = word.removesuffix(ending) + replacement
                if word.endswith(ending) and base in self._synsets:
                    return [base]
        return []


# ------------------------------------------------------------------------------------------------ paraphrases


class ParaphraseTable:
    """The target phrases of each source phrase, in a mapped file or a block of memory with random access.

    The layout: four 32-bit numbers (see `_write`); a paragraph per source phrase, with the source on its
    first line and a target on each further one; a hash table with the 32-bit offsets of the paragraphs, by
    the CRC-32 of the source and its line end, with linear probing and 0 in empty slots.

    Raises:
        ValueError: the data are not a complete table.
    """

    _LAYOUT = int.from_bytes(b"MTR1", "big")  # another number on a machine with the other byte order

    def __init__(self, data: mmap.mmap | bytes) -> None:
        layout, hash_start, slots, size = array("I", data[:16])
        if layout != self._LAYOUT or size != len(data):
            raise ValueError("not a complete paraphrase table")
        self.is_shared = isinstance(data, mmap.mmap)
        self._data = data
        self._slots = memoryview(data)[hash_start:].cast("I")
        self._mask = slots - 1
        self._targets_at = lru_cache(KEPT_PHRASES)(self._read_targets)

    def targets(self, source: str) -> dict[str, None]:
        """The target phrases in the order of METEOR's file, as the keys of a dictionary (maybe empty)."""
        key = source.encode("utf-8", "surrogatepass") + b"\n"
        slot = zlib.crc32(key) & self._mask
        while offset := self._slots[slot]:
            if self._data[offset : offset + len(key)] == key:
                return self._targets_at(offset + len(key))
            slot = (slot + 1) & self._mask
        return {}

    def _read_targets(self, start: int) -> dict[str, None]:
        return dict.fromkeys(self._data[start : self._data.find(b"\n\n", start)].decode().split("\n"))

    @classmethod
    def open(cls, packed: Path, cache_dir: Path) -> "ParaphraseTable":
        """The table of METEOR's gzip file, mapped from the cache directory, and built there if it is missing.

        Raises:
            MeteorDataError: the gzip file cannot be read.
        """
        try:
            with packed.open("rb") as file:
                size = file.seek(-8, os.SEEK_END) + 8
                identity = file.read().hex()  # a gzip file ends with the checksum and length of its content
        except OSError as error:
            raise _unreadable(packed, error) from error
        cached = cache_dir / f"paraphrases-{size}-{identity}.bin"
        try:
            return cls._map(cached)
        except (OSError, ValueError):
            pass  # not built yet, or damaged
        try:
            cls._build(packed, cached)
            return cls._map(cached)
        except OSError as error:
            warnings.warn(f"METEOR builds its paraphrase table in memory: {error}", stacklevel=3)
            memory = BytesIO()
            cls._write(packed, memory)
            return cls(memory.getvalue())

    @classmethod
    def _map(cls, path: Path) -> "ParaphraseTable":
        with path.open("rb") as file:
            return cls(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    @classmethod
    def _build(cls, packed: Path, path: Path) -> None:
        # Written under a temporary name, then renamed: killed or concurrent processes do no harm.
        path.parent.mkdir(parents=True, exist_ok=True)
        for abandoned in path.parent.glob("*.partial"):
            if time.time() - abandoned.stat().st_mtime > 60:  # since its last block was written
                abandoned.unlink(missing_ok=True)
        handle, partial = tempfile.mkstemp(".partial", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                cls._write(packed, file)
            os.replace(partial, path)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise

    @classmethod
    def _write(cls, packed: Path, file: BinaryIO) -> None:
        position = file.write(bytes(16))
        entries = []
        for source, targets in cls._read(packed):
            key = source + b"\n"
            entries.append((zlib.crc32(key), position))
            position += file.write(key + b"\n".join(targets) + b"\n\n")
        if not entries:
            raise _unreadable(packed, ValueError("no paraphrases in it"))
        position += file.write(bytes(-position % 4))
        mask = (1 << (2 * len(entries)).bit_length()) - 1
        slots = array("I", bytes(4 * (mask + 1)))
        for slot, offset in entries:
            slot &= mask
            while slots[slot]:
                slot = (slot + 1) & mask
            slots[slot] = offset
        file.write(slots)
        file.seek(0)
        file.write(array("I", [cls._LAYOUT, position, mask + 1, position + 4 * (mask + 1)]))

    @staticmethod
    def _read(packed: Path) -> Iterator[tuple[bytes, list[bytes]]]:
        """Source phrases with their targets; three lines of the file are probability, source and target."""

        def blocks_of_lines() -> Iterator[list[bytes]]:
            with gzip.open(packed) as file:
                rest = b""
                while block := file.read(1 << 20):
                    *lines, rest = (rest + block).split(b"\n")
                    yield lines

        lines = chain.from_iterable(blocks_of_lines())
        try:
            for source, records in groupby(zip(lines, lines, lines), key=itemgetter(1)):
                yield source, [target for _, _, target in records]
        except (OSError, EOFError, zlib.error) as error:
            raise _unreadable(packed, error) from error


# -------------------------------------------------------------------------------------------------- locations


def _unreadable(path: Path, error: Exception) -> MeteorDataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return MeteorDataError(f"cannot read {path} ({reason}): pip install --force-reinstall pycocoevalcap")


def find_data() -> Path:
    """The directory of METEOR's files in the installed `pycocoevalcap`; none of its code is run.

    Raises:
        MeteorDataError: the package is not installed.
    """
    try:
        return Path(importlib.util.find_spec("pycocoevalcap.meteor.meteor").origin).parent
    except (ImportError, AttributeError):
        raise MeteorDataError("METEOR needs the data of pycocoevalcap: pip install pycocoevalcap") from None


def user_cache() -> Path:
    """The user's cache directory on this platform, or XDG_CACHE_HOME where that is set; it may not exist."""
    try:
        home = Path.home()
    except RuntimeError:
        home = Path(os.devnull)  # nothing can be written there, so the table stays in memory
    windows = os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local"
    places = {"darwin": home / "Library" / "Caches", "win32": windows}
    return Path(os.environ.get("XDG_CACHE_HOME") or places.get(sys.platform, home / ".cache"))

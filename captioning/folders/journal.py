"""The captions of a folder as far as they have come, kept where a kill does not reach them.

Beside the output file stands a journal for each process, OUTPUT.journal-0, OUTPUT.journal-1, ...: JSON lines,
the first with the run and what the captions depend on, then one for each image. A run reads the journals that
an earlier one left, in whatever number, and removes its own when the output is written.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from captioning.data.sidecars import Backup, Sidecars
from captioning.data.submissions import ScoredCaption
from captioning.files import (
    AnyOf,
    find_mismatch,
    named_in_errors,
    open_regular,
    open_to_append,
    remove_unfinished,
)
from utils import UserError, atomic_write


@dataclass
class Entry:
    """The captions of an image.

    Attributes:
        captions: the best one first, or in the order in which they were drawn.
        file: path, size and time of the image file; another file of the same name is captioned anew.
        before: what the image's sidecar contained before this run; None where it had none.
        after: what this run writes there; None where it leaves the sidecar as it is.
    """

    image_id: str
    captions: list[ScoredCaption]
    file: list
    before: bytes | None = None
    after: bytes | None = None

    @property
    def caption(self) -> str:
        return self.captions[0].text

    def to_line(self) -> str:
        contents = [content and content.decode("latin-1") for content in (self.before, self.after)]
        names = ("image_id", "captions", "file", "before", "after")
        return json.dumps(dict(zip(names, (self.image_id, self.captions, self.file, *contents)))) + "\n"

    @classmethod
    def from_line(cls, line: bytes) -> Entry | None:
        """None where the line is no entry, such as the last one, which a kill cut short."""
        values = _parse(line)
        if not isinstance(values, dict) or find_mismatch(values, ENTRY) or set(values) != set(ENTRY):
            return None
        try:
            contents = [values[name] and values[name].encode("latin-1") for name in ("before", "after")]
            captions = [ScoredCaption(*caption) for caption in values["captions"]]
        except (TypeError, UnicodeEncodeError):
            return None
        if not captions or any(find_mismatch(caption._asdict(), CAPTION) for caption in captions):
            return None
        for word in (word for caption in captions for word in caption.words or ()):
            if len(word) != 2 or find_mismatch(dict(zip(("word", "log_prob"), word)), WORD):
                return None
        return cls(values["image_id"], captions, values["file"], *contents)


PRIVATE = 0o600  # a journal has what sidecars say, also those that only their owner may read
OF_ONE_RUN = (
    "run",
    "triggers",
)  # in a header: its name; what stays first in sidecars, as it was at its beginning
CONTENT, NUMBER = AnyOf(str, None), AnyOf(float, None)
CAPTION = {"text": str, "log_prob": NUMBER, "log_prob_per_word": NUMBER, "words": AnyOf([list], None)}
WORD = {"word": str, "log_prob": float}
ENTRY = {"image_id": str, "captions": [list], "file": list, "before": CONTENT, "after": CONTENT}


class Journal:
    """The journals of one output.

    Args:
        output: the file that the captions are for; of sidecars, a name in their folder.
    """

    def __init__(self, output: str | Path):
        self.output = Path(output)

    def __str__(self) -> str:
        return str(self.path(0))

    def path(self, process: int) -> Path:
        return self.output.with_name(f"{self.output.name}.journal-{process}")

    def files(self) -> list[Path]:
        """The journals that there are; no links, pipes or folders of such a name."""
        return [path for path in self._names() if path.is_file() and not path.is_symlink()]

    def _names(self) -> list[Path]:
        found = self.output.parent.glob(f"{glob.escape(self.output.name)}.journal-*")
        return sorted(path for path in found if re.fullmatch(r".*\.journal-\d{1,9}", path.name, re.DOTALL))

    def read(self, depends_on: dict) -> tuple[dict[str, Entry], list[str]]:
        """The entries whose journals began with the same `depends_on`, by image id, and what differs in the
        other journals: names of `depends_on`."""
        entries: dict[str, Entry] = {}
        different: list[str] = []
        for file in self.files():
            header, *lines = file.read_bytes().split(b"\n")
            other = _differences(_parse(header), depends_on)
            different += other
            for entry in map(Entry.from_line, lines if not other else ()):
                if entry is not None:
                    entries[entry.image_id] = entry
        return entries, different

    def triggers(self, depends_on: dict) -> list[str] | None:
        """The "triggers" of a journal that began with the same `depends_on`; None where there is none."""
        for file in self.files():
            with file.open("rb") as stream:
                header = _parse(stream.readline())
            if not _differences(header, depends_on) and find_mismatch(header, {"triggers": [str]}) is None:
                return header["triggers"]
        return None

    def begin(self, depends_on: dict, entries: Iterable[Entry]) -> None:
        """One journal with these entries in place of all that there are."""
        earlier = self._names()
        with atomic_write(self.path(0)) as tmp_path:
            tmp_path.touch(PRIVATE)
            with tmp_path.open("w", encoding="ascii") as stream:
                stream.write(_header(depends_on))
                stream.writelines(entry.to_line() for entry in entries)
        for file in earlier:
            if file != self.path(0):
                file.unlink()

    def append(self, process: int, depends_on: dict, entries: Sequence[Entry]) -> None:
        """Add entries to the journal of a process; when this returns, a kill can no longer lose them.

        Raises:
            UserError: the run's journal is no longer there, or another run's has taken its place.
        """
        header, text = _header(depends_on), "".join(entry.to_line() for entry in entries)
        try:
            with open(open_regular(self.path(0)), encoding="ascii", errors="replace") as stream:
                ours = stream.readline() == header
        except FileNotFoundError:
            ours = False
        if not ours:
            raise UserError(
                f"{self}: removed while this run was at work, or written by another run, or not in a folder "
                f"that all machines share; the same command starts anew"
            )
        file = self.path(process)
        with named_in_errors(file), open_to_append(file, PRIVATE) as stream:
            stream.write(text if os.fstat(stream.fileno()).st_size else header + text)

    def count(self) -> int:
        """Entries in all journals."""
        total = 0
        for file in self.files():
            with suppress(FileNotFoundError):  # the main process has just removed it
                total += file.read_bytes().count(b'\n{"image_id"')
        return total

    def end_early(self) -> None:
        """Note that the main process was interrupted and has said so."""
        flags = os.O_WRONLY | os.O_APPEND
        with suppress(OSError, UserError), open(open_regular(self.path(0), flags), "ab") as stream:
            stream.write(b"\ninterrupted\n")

    def ended_early(self) -> bool:
        return any(file.read_bytes().endswith(b"\ninterrupted\n") for file in self.files()[:1])

    def remove_unfinished(self) -> None:
        """Remove what killed processes left of the output and its journals."""
        remove_unfinished(self.output.parent, self.output.name)

    def remove(self) -> None:
        for file in self._names():
            file.unlink()


def _differences(header: object, depends_on: dict) -> list[str]:
    """The names of what a run that began its journal so depended on, and this one does not, or otherwise."""
    known = header if isinstance(header, dict) else {}
    names = [name for name in {**depends_on, **known} if name not in OF_ONE_RUN]
    return [name for name in names if known.get(name) != depends_on.get(name)]


def _header(depends_on: dict) -> str:
    return json.dumps(depends_on) + "\n"


def _parse(line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def file_stamp(path: str | Path) -> list:
    """Path, size in bytes and time of change in nanoseconds. Raises OSError where there is no such file."""
    status = os.stat(path)
    return [str(path), status.st_size, status.st_mtime_ns]


def files_digest(files: Iterable[str | Path]) -> str:
    """A fingerprint of the content of files; those that are not there are left out.

    Of a model the content counts, not the time: a copy is the same model, and a file of the same size
    that was trained again is another one.
    """
    digest = hashlib.sha256()
    for file in files:
        if Path(file).is_file():
            with open(file, "rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


# --- sidecars ----------------------------------------------------------------------------------------------


class SidecarChanges:
    """Writes the sidecars of a run.

    Args:
        backup: keeps what they say before; None: nothing does.
        triggers: words that stay first in those that begin with them, see `shared_beginnings`.
    """

    def __init__(self, sidecars: Sidecars, backup: Backup | None, triggers: Collection[str] = ()):
        self.sidecars, self.backup, self.triggers = sidecars, backup, triggers

    def prepare(self, image: str, entry: Entry) -> None:
        """Put into a new entry what the sidecar contains and what is to be written; keep the former.

        Raises:
            UserError: it cannot be written; the entry then leaves it as it is.
        """
        entry.before = self.sidecars.read(image)
        if entry.before is None or self.sidecars.existing != "skip":
            after = self.sidecars.compose(image, entry.caption, entry.before, self.triggers)
            self._keep(image, entry.before, after)
            entry.after = after

    def _keep(self, image: str, before: bytes | None, after: bytes) -> None:
        if before == after:
            return
        self.sidecars.require_writable(image)
        if self.backup is not None:
            self.backup.keep(self.sidecars.path(image), before, after)

    def record(self) -> None:
        """To be called between `prepare` and `make`, for any number of entries."""
        if self.backup is not None:
            self.backup.record()

    def make(self, image: str, entry: Entry) -> None:
        """Write the sidecar of an entry that is in the journal. Raises UserError where that cannot be."""
        if entry.after not in (None, entry.before):
            self.sidecars.write(image, entry.after)

    def finish(self, image: str, entry: Entry) -> bool:
        """Write the sidecar of an earlier run's entry where that run was killed before it did.

        Returns:
            Whether it is as the run makes it. Otherwise it was changed since, is the user's, and is left as
            it is.

        Raises:
            UserError: it cannot be read or written.
        """
        content = self.sidecars.read(image)
        if content is not None and content == entry.after:
            return True
        skip = self.sidecars.existing == "skip"
        if content is None or (entry.after is None and not skip):
            self.prepare(image, entry)  # it was removed since, or there was something in its place
        elif skip or content != entry.before:
            return False
        else:
            self._keep(image, entry.before, entry.after)
        self.record()
        self.make(image, entry)
        return True

    def undo(self, image: str, entry: Entry) -> None:
        """Put back what an earlier run of the same kind replaced, where nobody has changed it since.

        Raises:
            UserError: it cannot be read or written.
        """
        if entry.after is None or self.sidecars.read(image) != entry.after:
            return
        self.sidecars.require_writable(image)
        if entry.before is None:
            self.sidecars.remove(image)
        else:
            self.sidecars.write(image, entry.before)

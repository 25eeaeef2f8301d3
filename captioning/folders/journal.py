"""The captions of a folder as far as they have come, kept where a kill does not reach them.

Beside the output file stands a journal for each process, OUTPUT.journal-0, OUTPUT.journal-1, ...: JSON lines,
the first with what the captions depend on, then one for each image. A run reads the journals that an
earlier one left, in whatever number, and removes its own when the output is written.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from captioning.data.submissions import ScoredCaption
from captioning.files import named_in_errors, remove_unfinished
from utils import atomic_write


@dataclass
class Entry:
    """The captions of an image.

    Attributes:
        captions: the best one first, or in the order in which they were drawn.
        file: path, size and time of the image file; another file of the same name is captioned anew.
        before: what the image's sidecar said before this run, where it is kept in the new one.
    """

    image_id: str
    captions: list[ScoredCaption]
    file: list
    before: str = ""

    def __post_init__(self):  # JSON knows no tuples
        self.captions = [ScoredCaption(*caption) for caption in self.captions]

    @property
    def caption(self) -> str:
        return self.captions[0].text


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
        return sorted(self.output.parent.glob(f"{glob.escape(self.output.name)}.journal-*"))

    def read(self, depends_on: dict) -> tuple[dict[str, Entry], list[str]]:
        """The entries whose journals began with the same `depends_on`, by image id, and what differs in the
        other journals: names of `depends_on`."""
        entries: dict[str, Entry] = {}
        different: list[str] = []
        for file in self.files():
            header, *lines = file.read_bytes().split(b"\n")
            known = _parse(header)
            if known != depends_on:
                known = known if isinstance(known, dict) else {}
                names = {**depends_on, **known}
                different += [name for name in names if known.get(name) != depends_on.get(name)]
                continue
            for line in lines:
                try:
                    entry = Entry(**_parse(line))
                except TypeError:  # no entry, or the last one, which a kill cut short
                    continue
                entries[entry.image_id] = entry
        return entries, different

    def begin(self, depends_on: dict, entries: Iterable[Entry]) -> None:
        """One journal with these entries in place of all that there are."""
        earlier = self.files()
        with atomic_write(self.path(0)) as tmp_path, tmp_path.open("w", encoding="ascii") as stream:
            stream.write(json.dumps(depends_on) + "\n")
            stream.writelines(json.dumps(asdict(entry)) + "\n" for entry in entries)
        for file in earlier:
            if file != self.path(0):
                file.unlink()

    def append(self, process: int, depends_on: dict, entries: Sequence[Entry]) -> None:
        """Add entries to the journal of a process; when this returns, a kill can no longer lose them."""
        file = self.path(process)
        text = "".join(json.dumps(asdict(entry)) + "\n" for entry in entries)
        if not file.exists():
            text = json.dumps(depends_on) + "\n" + text
        with named_in_errors(file), file.open("a", encoding="ascii") as stream:
            stream.write(text)

    def count(self) -> int:
        """Entries in all journals."""
        return sum(file.read_bytes().count(b'\n{"image_id"') for file in self.files())

    def end_early(self) -> None:
        """Note that the main process was interrupted and has said so."""
        with self.path(0).open("a", encoding="ascii") as stream:
            stream.write("\ninterrupted\n")

    def ended_early(self) -> bool:
        return self.path(0).read_bytes().endswith(b"\ninterrupted\n")

    def remove_unfinished(self) -> None:
        """Remove what killed processes left of the output and its journals."""
        remove_unfinished(self.output.parent, self.output.name)

    def remove(self) -> None:
        for file in self.files():
            file.unlink()


def _parse(line: bytes) -> object:
    try:
        return json.loads(line)
    except ValueError:
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

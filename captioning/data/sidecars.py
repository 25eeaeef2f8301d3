"""Sidecar files: the caption of photo.jpg in photo.txt, as trainings of image generators want it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from captioning.data.images import IMAGE_EXTENSIONS, PACKAGES
from utils import UserError, atomic_write

EXISTING = Literal["skip", "overwrite", "append", "prepend"]


@dataclass
class Sidecars:
    """How sidecars are named and what is in them.

    Attributes:
        extension: of the sidecars, such as ".txt".
        existing: what happens to a sidecar that is there before: its image is not captioned, or the caption
            takes its place, or goes behind or in front of its text.
        prefix, suffix: words around each caption; {name} and {folder} in them stand for the image file's
            name without extension and the name of the folder that it is in.
    """

    extension: str = ".txt"
    existing: EXISTING = "skip"
    prefix: str = ""
    suffix: str = ""

    def __post_init__(self):
        self.extension = "." + self.extension.removeprefix(".")
        if self.extension.lower() in (".", *IMAGE_EXTENSIONS, *PACKAGES) or "/" in self.extension:
            raise UserError(f"--sidecar_extension {self.extension}: give one of a text file, such as .txt")

    def path(self, image: str) -> str:
        return os.path.splitext(image)[0] + self.extension

    def check(self, images: Sequence[str]) -> None:
        """Raise UserError where two images would share a sidecar, or no sidecar can be written."""
        owners: dict[str, str] = {}
        for image in images:
            other = owners.setdefault(self.path(image), image)
            if other != image:
                raise UserError(
                    f"{self.path(image)} would be the sidecar of {other} and of {image}: rename one of them, "
                    f"or give --output_csv in place of --sidecars"
                )
        for folder in {os.path.dirname(image) for image in images}:
            if not os.access(folder or ".", os.W_OK):
                raise UserError(f"{folder}: no sidecars can be written there; change its permissions")

    def exist(self, images: Sequence[str]) -> set[str]:
        """Those of `images` that have a sidecar; each folder is listed once."""
        names = cache(lambda folder: set(os.listdir(folder or ".")))
        sidecars = {image: os.path.split(self.path(image)) for image in images}
        return {image for image, (folder, name) in sidecars.items() if name in names(folder)}

    def read(self, image: str) -> str:
        """What is in the image's sidecar, "" where it has none."""
        with suppress(FileNotFoundError):
            return Path(self.path(image)).read_text(encoding="utf-8", errors="surrogateescape").strip()
        return ""

    def keeps(self) -> bool:
        """Whether the text of a sidecar that is there becomes part of the new one."""
        return self.existing in ("append", "prepend")

    def write(self, image: str, caption: str, before: str = "") -> None:
        """Write the image's sidecar, unless it says the same already. before: the text that is kept in it."""
        text = self.text(image, caption, before)
        if self.read(image) != text:
            with atomic_write(self.path(image)) as tmp_path:
                tmp_path.write_text(text + "\n", encoding="utf-8", errors="surrogateescape")

    def text(self, image: str, caption: str, before: str = "") -> str:
        """The caption between prefix and suffix, behind or in front of `before`."""
        name, folder = Path(image).stem, Path(image).absolute().parent.name
        around = [
            words.replace("{name}", name).replace("{folder}", folder).strip()
            for words in (self.prefix, self.suffix)
        ]
        text = " ".join(part for part in (around[0], " ".join(caption.split())) if part)
        text += around[1] if around[1][:1] in ",.;:!?" else f" {around[1]}"
        first, second = (text, before) if self.existing == "prepend" else (before, text)
        if not (first and second):
            return first or second
        return f"{first}{' ' if first[-1] in '.,;:!?' else ', '}{second}"

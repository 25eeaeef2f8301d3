"""What a run does to sidecars, kept in its journal, so that a rerun tells the user's text from its own."""

from __future__ import annotations

from captioning.data.sidecars import Backup, Sidecars
from captioning.folders.journal import Entry


class SidecarChanges:
    """Writes the sidecars of a run.

    Args:
        backup: keeps what they say before; None: nothing does.
        trigger: words that stay first in them, see `Sidecars.find_trigger`.
    """

    def __init__(self, sidecars: Sidecars, backup: Backup | None, trigger: str = ""):
        self.sidecars, self.backup, self.trigger = sidecars, backup, trigger

    def prepare(self, image: str, entry: Entry) -> None:
        """Put into a new entry what the sidecar contains and what is to be written; keep the former.

        Raises:
            UserError: it cannot be written; the entry then leaves it as it is.
        """
        entry.before = self.sidecars.read(image)
        if entry.before is None or self.sidecars.existing != "skip":
            after = self.sidecars.compose(image, entry.caption, entry.before, self.trigger)
            self._keep(image, entry.before, after)
            entry.after = after

    def _keep(self, image: str, before: bytes | None, after: bytes) -> None:
        if self.backup is not None and before not in (None, after):
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
        if entry.before is None:
            self.sidecars.remove(image)
        else:
            self.sidecars.write(image, entry.before)

"""The folder of a command with several stages: who made it, and which stages are complete."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glmtune.data.files import read_json_object, write_json
from glmtune.disk import check_room
from glmtune.drafts import clear_drafts
from glmtune.errors import UserError, value_words
from glmtune.run_files import JOURNAL_FILE

Key = Mapping[str, Mapping[str, Any]]
"""What a stage depends on: "settings", name -> value, and "reads", name -> sha256.

The sha256 of a missing file is None: an earlier stage is about to write it."""


@contextmanager
def usable_folder(out: Path) -> Iterator[None]:
    """Report a folder that cannot be read or written as a mistake in `--out`."""
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--out: {out} cannot be used ({reason}); name a folder that can be written"
        ) from error


def check_folder(
    out: Path, is_ours: bool, names: Collection[str], num_bytes: int, verb: str
) -> set[str]:
    """Check that a folder may be written into; nothing in it is changed.

    Args:
        out: the folder, which need not exist.
        is_ours: whether the verb has made it.
        names: the files and folders that the verb writes.
        num_bytes: bytes that will be written.
        verb: the verb's name, for messages.

    Returns:
        Names of the entries in it.

    Raises:
        UserError: it holds other things, or its disk has too little space.
    """
    entries = {entry.name for entry in out.iterdir()} if out.exists() else set()
    if others := sorted(entries - {*names} if is_ours else entries):
        raise UserError(
            f"--out: {out} holds other things ({others[0]}); name a new folder, or one that "
            f"`glmtune {verb}` made"
        )
    fix = "free some, or let --out name a folder on another disk"
    check_room(out, num_bytes, f"the {verb} takes at most", fix)
    return entries


def print_stage(number: int, num_stages: int, what: str) -> None:
    """Print the heading of a stage."""
    print(f"\n[{number}/{num_stages}] {what}", flush=True)


@dataclass
class Journal:
    """Which stages of a folder are complete, and what each was made from."""

    folder: Path
    stages: Sequence[str]
    entries: dict[str, Any] = field(default_factory=dict)
    is_claimed: bool = False
    """Whether the folder is marked as ours; until then nothing is written into it."""

    @classmethod
    def of(cls, folder: Path, stages: Sequence[str]) -> "Journal":
        """Read the journal of a folder; empty if there is none.

        Raises:
            UserError: it is damaged.
        """
        path = folder / JOURNAL_FILE
        if not path.is_file():
            return cls(folder, stages)
        entries = read_json_object(path)
        if not all(isinstance(entry, dict) for entry in entries.values()):
            raise UserError(f"{path}: is damaged; let --out name a new folder")
        clear_drafts(folder, lambda _: True)  # of a command that was killed
        return cls(folder, stages, entries, is_claimed=True)

    def claim(self) -> None:
        """Make the folder, and mark it as ours."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.is_claimed = True
        self._write()

    def changes(self, stage: str, key: Key) -> list[str]:
        """What has changed since a stage was done, as text; empty for a new stage."""
        if not (old := self.entries.get(stage)):
            return []
        settings, reads = old.get("settings", {}), old.get("reads", {})
        return [
            *(
                f"{name} was {value_words(settings.get(name))}, is {value_words(value)}"
                for name, value in key["settings"].items()
                if settings.get(name) != value
            ),
            *(
                f"{name} has changed"
                for name, sha in key["reads"].items()
                if sha is not None and reads.get(name) != sha
            ),
        ]

    def do(
        self, stage: str, key: Key, writes: Sequence[str], work: Callable[[], object], **marks: Any
    ) -> bool:
        """Run a stage, unless it is complete, made from the same, and all that it writes exists.

        Args:
            stage: its name.
            key: what it depends on.
            writes: names of the files and folders that it writes.
            work: runs it; returns False if it stopped before its end.
            marks: further entries to keep until it is complete.

        Returns:
            Whether the stage is complete now.
        """
        number, num_stages = self.stages.index(stage) + 1, len(self.stages)
        if self.is_whole(stage, key, writes):
            print_stage(number, num_stages, f"{stage}: done before")
            return True
        changes = self.changes(stage, key)
        again = f", again: {'; '.join(changes)}" if changes else ""
        print_stage(number, num_stages, f"{stage}{again}")
        self.entries[stage] = {**key, **marks}
        self._write()
        if is_whole := work() is not False:
            self.entries[stage] = {**key, "is_whole": True}
            self._write()
        return is_whole

    def is_whole(self, stage: str, key: Key, writes: Sequence[str]) -> bool:
        """Whether a stage need not be run again."""
        is_done = self.entries.get(stage, {}).get("is_whole", False)
        is_there = all((self.folder / name).exists() for name in writes)
        return is_done and is_there and not self.changes(stage, key)

    def _write(self) -> None:
        if self.is_claimed:
            write_json(self.entries, self.folder / JOURNAL_FILE)

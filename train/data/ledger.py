"""What checking videos found, kept while a folder is being made: each is decoded once, whoever asks and however often.

Every part appends to a file of its own, a line a video, so that a run that is killed loses the line under way alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import NamedTuple

from rehyat_jax.errors import RehyatError
from rehyat_jax.runtime.files import reason
from train.data.footage import Footage

_PATTERN = "checked-*.jsonl"


class Key(NamedTuple):
    """A file as it was when it was looked at: with the same name, size and time of change it is the same."""

    name: str
    size: int
    modified: int

    @classmethod
    def of(cls, video: Footage) -> Key:
        return cls(video.name, video.size, video.modified)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
    """A video's content and number of clips, or why it cannot be used."""

    content: str = ""
    clips: int = 0
    reason: str = ""


class Ledger:
    """The results of a folder, by this part and by others."""

    def __init__(self, folder: Path, *, part: int, parts: int) -> None:
        self._folder, self._path = folder, folder / f"checked-{part:05d}-of-{parts:05d}.jsonl"

    def read(self) -> dict[Key, Checked]:
        """Of all parts; a line that a kill cut short is passed over."""
        found: dict[Key, Checked] = {}
        for path in sorted(self._folder.glob(_PATTERN)):
            try:
                lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            except FileNotFoundError:  # the part that was last has just removed it
                continue
            for line in lines:
                try:
                    name, size, modified, content, clips, why = json.loads(line)
                    found[Key(name, size, modified)] = Checked(content=content, clips=clips, reason=why)
                except (ValueError, TypeError):
                    continue
        return found

    def add(self, key: Key, checked: Checked) -> None:
        """
        Raises:
            RehyatError: it cannot be written.
        """
        line = json.dumps([*key, checked.content, checked.clips, checked.reason])
        try:
            with self._path.open("ab") as file:
                # A line break first, which ends a line that was cut short.
                file.write(f"\n{line}\n".encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RehyatError(f"cannot write {self._path}: {reason(error)}") from error

    def clear(self) -> None:
        """The index has it all."""
        for path in self._folder.glob(_PATTERN):
            path.unlink(missing_ok=True)

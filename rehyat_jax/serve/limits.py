"""What clients may take of a host, and how they name what is theirs."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from rehyat_jax.errors import RehyatError

#: What names a stream or a video: never a path, nor anything that a client chose.
NAME = re.compile(r"[0-9a-f]{16}")


class Full(RehyatError):
    """As many streams as the host may hold are there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What clients may take.

    Attributes:
        streams: live streams at once.
        idle: seconds after which a stream without viewers is closed and its file removed.
        life: seconds after which any stream is closed.
        characters: of a sentence.
        jobs: videos that wait or are kept; the oldest that has ended makes room.
        frames: of such a video.
    """

    streams: int = 8
    idle: float = 300.0
    life: float = 6 * 3600.0
    characters: int = 2000
    jobs: int = 64
    frames: int = 16 * 600

    def check_prompt(self, prompt: Any) -> None:
        """
        Raises:
            RehyatError: it is no text, or too long.
        """
        if not isinstance(prompt, str):
            raise RehyatError("a sentence must be a text")
        if len(prompt) > self.characters:
            raise RehyatError(f"a sentence may have {self.characters} characters, not {len(prompt)}")

"""Which sentence a video shows when: a file of seconds and sentences, and a stream that follows it."""

from __future__ import annotations

import dataclasses
import math
import os
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

from rehyat_jax.errors import RehyatError
from rehyat_jax.text.files import numbered_lines, read_text

#: A frame's place is compared with seconds to within so much: 0.1 s is no whole number of binary fractions.
_TIE = 1e-6


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Sentences by the second from which each counts, the first from 0.

    A chunk shows the sentence that counts at its first frame.

    Args:
        sentences: as ``{0: "a koala …", 4.5: "a lemon …"}``.

    Raises:
        RehyatError: there is none from second 0, or seconds do not rise, or a sentence is no text.
    """

    sentences: Mapping[Any, Any]

    def __post_init__(self) -> None:
        before = -1.0
        for second, sentence in self.sentences.items():
            if why := _wrong(second, sentence, before=before):
                raise RehyatError(f"the timeline's {second!r}: {why}")
            before = float(second)
        if not self.sentences:
            raise RehyatError("a timeline has a sentence from second 0 on")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Timeline:
        """From a file with one sentence a line, ``4.5 = "a lemon …"``: TOML, each line by itself.

        Raises:
            RehyatError: the file cannot be read, or a line says what cannot be followed; its number is told.
        """
        sentences: dict[float, str] = {}
        for number, line in numbered_lines(read_text(path)):
            if line.startswith("#"):
                continue
            try:
                second, sentence = _parsed(line)
            except ValueError:
                raise RehyatError(
                    f'{os.fspath(path)}, line {number}: not seconds and a sentence, as 4.5 = "a cat"'
                ) from None
            if why := _wrong(second, sentence, before=max(sentences, default=-1.0)):
                raise RehyatError(f"{os.fspath(path)}, line {number}: {why}")
            sentences[second] = str(sentence)
        if not sentences:
            raise RehyatError(f'{os.fspath(path)} has no sentence; the first line is 0 = "a sentence"')
        return cls(sentences)

    def at(self, second: float | int) -> str:
        """The sentence that counts at a second of the video."""
        return [sentence for begin, sentence in self.sentences.items() if begin <= second + _TIE][-1]

    def follow(self, stream: Any, *, fps: int | None = None) -> Iterator[UInt8[np.ndarray, "F H W 3"]]:
        """A `Stream`'s blocks, its sentence changed before each chunk to the one that counts there.

        Seconds are those of the whole video, a beginning's frames and those made before among them, at ``fps`` or the
        model's own rate.

        Raises:
            RehyatError: the stream is one of several videos side by side, or cannot go on.
        """
        while True:
            self.steer(stream, fps=fps)
            yield next(stream)

    def steer(self, stream: Any, *, fps: int | None = None) -> None:
        """Change a `Stream`'s sentence to the one that counts at its next frame, where that is another."""
        sentence = self.at(stream.frames_done / (fps or stream.fps))
        if stream.prompt != sentence:
            stream.change_prompt(sentence)


def _parsed(line: str) -> tuple[float, object]:
    """
    Raises:
        ValueError: it is not one key and one value; TOML's own error is one.
    """
    entry: object = tomllib.loads(line)
    keys: list[str] = []
    while isinstance(entry, dict) and len(entry) == 1:  # TOML takes 4.5 for the key 5 in the table 4
        ((key, entry),) = entry.items()
        keys.append(key)
    if isinstance(entry, dict):
        raise ValueError(line)
    return float(".".join(keys)), entry


def _wrong(second: object, sentence: object, *, before: float) -> str | None:
    if isinstance(second, bool) or not isinstance(second, int | float) or not math.isfinite(second):
        return f"a second is a finite number, not {str(second)[:80]!r}"
    if before < 0 and second != 0:
        return f"the first sentence counts from second 0, not {second:g}"
    if second <= before:
        return f"seconds rise from line to line, and {second:g} comes after {before:g}"
    if not isinstance(sentence, str) or not sentence.strip():
        return f"a sentence is a text that is not empty, not {str(sentence)[:80]!r}"
    return None

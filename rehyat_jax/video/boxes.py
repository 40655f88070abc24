"""The boxes of a fragmented mp4 (ISO/IEC 14496-12): its fragments, and the chapters that stand between them.

A fragmented file has no place for chapters: QuickTime's are a track whose samples players read from the head alone, and
Nero's a list in the head, which is written before the first frame. So each chapter is a box of its own (``uuid``,
section 4.2: players skip it) before the fragment that begins it, and becomes an ordinary one in the finished video.
"""

from __future__ import annotations

import dataclasses
import io
import os
import struct
from collections.abc import Iterator

#: Bytes of a box's size and name.
BOX = 8
#: Of a chapter's box; the number is random, as the standard wants it.
_CHAPTER = bytes.fromhex("9c3ad2e14f0b4a55b1d7c61f2a8e7740")
#: More than the longest prompt that a tokenizer keeps.
_LONGEST_TITLE = 1 << 16


@dataclasses.dataclass(frozen=True)
class Fragment:
    """Its end in bytes, the number of frames up to there, and the title of the chapter that it begins, if it does."""

    end: int
    frames: int
    chapter: str | None = None


@dataclasses.dataclass(frozen=True)
class Box:
    kind: bytes
    start: int
    end: int


def boxes(file: io.IOBase, start: int, end: int) -> Iterator[Box]:
    """The whole boxes between two places of a file."""
    while start + BOX <= end:
        file.seek(start)
        size, kind = struct.unpack(">I4s", file.read(BOX))
        if size < BOX or start + size > end:
            return
        yield Box(kind, start, start + size)
        start += size


def fragments(file: io.IOBase) -> Iterator[Fragment]:
    """The whole fragments from the beginning; whatever follows the last one is torn."""
    frames, chapter = 0, None
    for box in boxes(file, 0, file.seek(0, os.SEEK_END)):
        if box.kind == b"uuid":
            chapter = _title(file, box) or chapter
        elif box.kind == b"moof":
            frames += sum(
                _samples(file, run) for track in _inside(file, box, b"traf") for run in _inside(file, track, b"trun")
            )
        elif box.kind == b"mdat":
            yield Fragment(box.end, frames, chapter)
            chapter = None


def chapter_box(title: str) -> bytes:
    """What is to stand before the fragment that begins a chapter."""
    text = title.encode("utf-8", "replace")[:_LONGEST_TITLE]
    return struct.pack(">I4s", BOX + len(_CHAPTER) + len(text), b"uuid") + _CHAPTER + text


def _title(file: io.IOBase, box: Box) -> str | None:
    file.seek(box.start + BOX)
    data = file.read(min(box.end - box.start - BOX, len(_CHAPTER) + _LONGEST_TITLE))
    return data[len(_CHAPTER) :].decode("utf-8", "replace") if data.startswith(_CHAPTER) else None


def _inside(file: io.IOBase, box: Box, kind: bytes) -> Iterator[Box]:
    return (inner for inner in boxes(file, box.start + BOX, box.end) if inner.kind == kind)


def _samples(file: io.IOBase, run: Box) -> int:
    """The sample count of a track run; version and flags stand before it."""
    file.seek(run.start + 12)
    return int.from_bytes(file.read(4))

"""What a live stream is made of: the stream that it steers, a chunk of its file, its pace."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Steerable(Protocol):
    """What a live stream needs of `rehyat_jax.streams.stream.Stream`."""

    prompt: str
    state: Any

    @property
    def how(self) -> Mapping[str, Any]:
        """Width, height, steps, guidance, …, by the names that clients ask for them with."""
        ...

    @property
    def frames_done(self) -> int: ...
    def __next__(self) -> np.ndarray: ...
    def fork(self, *, seed: int | None = None) -> Steerable: ...
    def snapshot(self) -> Steerable: ...
    def change_prompt(self, prompt: str) -> None: ...
    def save(self, folder: str | os.PathLike[str]) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """One chunk of a live stream's file."""

    number: int
    #: Frames of the video before this chunk, and in it.
    first_frame: int
    frames: int
    #: Bytes of the file before the end of this chunk's fragment; its beginning is the end of the one before.
    end: int
    prompt: str
    #: Seconds that it took to make.
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> Chunk:
        # Servers of before kept each chunk's picture beside it.
        return cls(**{name: value for name, value in source.items() if name != "thumbnail"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """What rewinds left: so many chunks, which end after so many seconds; and the epoch since."""

    epoch: int
    chunks: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
    """How far a live stream runs ahead of its viewers, and how long without any.

    Attributes:
        fps: frames a second of the video.
        ahead: seconds of video that may be made beyond the furthest viewer's place.
        alone: seconds for which it goes on without a viewer.
        snapshot_bytes: device memory for snapshots of one stream.
    """

    fps: int = 16
    ahead: float = 4.0
    alone: float = 10.0
    snapshot_bytes: int = 256 << 20


@runtime_checkable
class Batches(Protocol):
    """Which streams are made together, and making them: `rehyat_jax.streams.together.Together`."""

    def batches(self, streams: Sequence[Any]) -> list[list[int]]: ...
    def advance(self, streams: Sequence[Any]) -> list[Any]: ...
    def close(self) -> None: ...

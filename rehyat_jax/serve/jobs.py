"""Videos of a given length that are made in the background, a chunk a turn beside the live streams. Knows no web."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Literal

from rehyat_jax.errors import RehyatError
from rehyat_jax.serve.steerable import Steerable
from rehyat_jax.serve.wish import Wish
from rehyat_jax.video.growing import GrowingVideo, finish_video

Status = Literal["queued", "in_progress", "completed", "failed"]


@dataclasses.dataclass
class Job:
    """One video: what is asked for, how far it is, and its file once it is whole.

    Attributes:
        frames: of the video.
        path: where it stands when it is completed.
    """

    name: str
    wish: Wish
    frames: int
    path: Path
    fps: int
    created: float = dataclasses.field(default_factory=time.time)
    completed: float | None = None
    done: int = 0
    error: str | None = None
    _stream: Steerable | None = dataclasses.field(default=None, repr=False)
    _video: GrowingVideo | None = dataclasses.field(default=None, repr=False)

    @property
    def status(self) -> Status:
        if self.error is not None:
            return "failed"
        if self.completed is not None:
            return "completed"
        return "queued" if self._stream is None else "in_progress"

    @property
    def ended(self) -> bool:
        return self.error is not None or self.completed is not None

    def begin(self, stream: Steerable) -> None:
        """Its turn has come."""
        self._stream, self._video = stream, GrowingVideo(self._partial, fps=self.fps)

    def work(self) -> int:
        """Make the next chunk, and the file when it was the last; the frames that were made."""
        assert self._stream is not None
        assert self._video is not None
        block = next(self._stream)[: self.frames - self.done]
        self._video.append(block)
        self.done += len(block)
        if self.done >= self.frames:
            self._video.close()
            finish_video(self._partial, self.path)
            self._partial.unlink()
            self._stream = self._video = None
            self.completed = time.time()
        return len(block)

    def fail(self, error: Exception) -> None:
        """It ends with a reason: the user's to mend, or the program's defect."""
        self.error = str(error) if isinstance(error, RehyatError) else f"the server failed ({type(error).__name__})"
        self.discard()

    def discard(self) -> None:
        """Remove what there is of it."""
        if self._video is not None:
            self._video.close()
        self._stream = self._video = None
        self._partial.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    @property
    def _partial(self) -> Path:
        return self.path.with_suffix(".growing.mp4")

"""Videos of a given length that are made in the background, a chunk a turn beside the live streams. Knows no web."""

from __future__ import annotations

import dataclasses
import logging
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rehyat_jax.errors import RehyatError
from rehyat_jax.serve.limits import NAME, Full, Limits
from rehyat_jax.serve.steerable import Steerable
from rehyat_jax.serve.wish import Wish
from rehyat_jax.video.growing import GrowingVideo, finish_video

_log = logging.getLogger(__name__)

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


class Jobs:
    """Videos that wait for their turn, are made, or are kept; any thread may ask for one.

    Args:
        folder: where their files are.
        call: runs something on the thread that makes chunks, before the next one.
        on_change: called when there is something to do.
    """

    def __init__(
        self,
        limits: Limits,
        folder: Path,
        *,
        fps: int,
        call: Callable[[Callable[[], Any]], Any],
        on_change: Callable[[], None],
    ) -> None:
        self._limits, self._folder, self._fps, self._call, self._on_change = limits, folder, fps, call, on_change
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()

    def queue(self, wish: Wish, *, frames: int) -> Job:
        """A video of so many frames, to be made when those before it are done, beside the live streams.

        Raises:
            Full: as many wait as may.
            RehyatError: it is too long, or its sentence is.
        """
        self._limits.check_prompt(wish.prompt)
        self._limits.check_prompt(wish.negative_prompt)
        if not 1 <= frames <= self._limits.frames:
            raise RehyatError(f"a video may have 1 to {self._limits.frames} frames, not {frames}")
        name = secrets.token_hex(8)
        job = Job(name, wish, frames, self._folder / f"{name}.video.mp4", self._fps)
        with self._lock:
            while len(self._jobs) >= self._limits.jobs:
                ended = next((other for other in self._jobs.values() if other.ended), None)
                if ended is None:
                    raise Full(f"{self._limits.jobs} videos wait; try again later")
                self._jobs.pop(ended.name).discard()
            self._jobs[name] = job
        self._on_change()
        return job

    def all(self) -> list[Job]:
        with self._lock:
            return list(self._jobs.values())

    def get(self, name: str) -> Job:
        """
        Raises:
            RehyatError: there is no such video (any more).
        """
        job = self._jobs.get(name) if NAME.fullmatch(name) else None
        if job is None:
            raise RehyatError("there is no such video (any more)")
        return job

    def drop(self, name: str) -> None:
        """Forget a video, finished or not, and remove its file."""
        job = self.get(name)
        with self._lock:
            self._jobs.pop(name, None)
        self._call(job.discard)

    def work(self, open_stream: Callable[[Wish], Steerable]) -> int | None:
        """A chunk of the oldest video that is not done: its frames; None where none waits."""
        job = next((job for job in self.all() if not job.ended), None)
        if job is None:
            return None
        try:
            if job.status == "queued":
                job.begin(open_stream(job.wish))
            made = job.work()
            if job.ended:
                _log.info("video made", extra={"video": job.name, "frames": job.frames})
            return made
        except Exception as error:
            if not isinstance(error, RehyatError):
                _log.exception("video failed", extra={"video": job.name})
            job.fail(error)
            return 0

    def close(self) -> None:
        """Remove what is not done."""
        for job in self._jobs.values():
            if not job.ended:
                job.discard()

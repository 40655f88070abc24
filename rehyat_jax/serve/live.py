"""A video that is steered while it is made: events at the ends of chunks, snapshots to go back to. Knows no web.

One thread, the host's, makes chunks and applies events; any thread may post events and read what was made. Viewers hold
no queues: each reads the growing file at its own pace, so that a slow one never slows the stream.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from rehyat_jax.errors import RehyatError
from rehyat_jax.serve.snapshots import Snapshots
from rehyat_jax.serve.steerable import Chunk, Kept, Pace, Steerable
from rehyat_jax.serve.thumbnails import Thumbnails, last_frame
from rehyat_jax.serve.viewers import Viewer, Viewers
from rehyat_jax.video.growing import GrowingVideo


class LiveStream:
    """A stream, its growing file, what was made of which sentence, and what was asked for next.

    Args:
        stream: before its first chunk; the live stream owns it.
        path: of the growing file, which must not be there.
        on_change: called, from any thread, when there is something to do or to see.
    """

    def __init__(
        self, stream: Steerable, path: Path, *, pace: Pace, on_change: Callable[[], None] = lambda: None
    ) -> None:
        self.pace, self.path = pace, path
        self.failed: str | None = None
        #: Frames of the stream before the file's first: of one that goes on from a saved state.
        self.before = stream.frames_done
        #: The chunks that rewinds went back to, in order: what a viewer has from there on is void.
        self._cuts: list[int] = []
        self._stream, self._on_change = stream, on_change
        self._video = GrowingVideo(path, fps=pace.fps)
        self._lock = threading.RLock()
        self._chunks: list[Chunk] = []
        self._snapshots = Snapshots(pace.snapshot_bytes, {0: stream.snapshot()})
        self._thumbnails = Thumbnails()
        self._events: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._viewers = Viewers(self.changed)
        self._watchers: set[Callable[[], object]] = set()
        self._closed = False
        self._head, self._codec = b"", None

    @classmethod
    def resumed(
        cls,
        stream: Steerable,
        path: Path,
        chunks: Sequence[Chunk],
        *,
        before: int,
        pace: Pace,
        on_change: Callable[[], None],
    ) -> LiveStream:
        """A live stream that was made before: its file, cut where the saved ``stream`` stands, and its chunks.

        Raises:
            RehyatError: the file and the stream do not belong together.
        """
        live = cls(stream, path, pace=pace, on_change=on_change)
        done = stream.frames_done - before
        live.before = before
        live._chunks = [chunk for chunk in chunks if chunk.first_frame + chunk.frames <= done]
        if live.frames != done:
            live.close()
            raise RehyatError(f"{path} does not belong to the stream beside it")
        live._video.cut(after=done)
        live._head, live._codec = live._video.head, live._video.codec
        live._snapshots = Snapshots(pace.snapshot_bytes, {len(live._chunks): live._snapshots[0]})
        return live

    # What any thread may read.

    _codec: str | None

    @property
    def chunks(self) -> list[Chunk]:
        with self._lock:
            return list(self._chunks)

    @property
    def frames(self) -> int:
        with self._lock:
            return self._chunks[-1].first_frame + self._chunks[-1].frames if self._chunks else 0

    @property
    def epoch(self) -> int:
        """Counts the rewinds."""
        return len(self._cuts)

    def kept_since(self, epoch: int) -> Kept:
        """What is left of the chunks that there were at an epoch, now that there were rewinds."""
        with self._lock:
            kept = min(self._cuts[epoch:], default=len(self._chunks))
            before = self._chunks[kept - 1] if kept else None
            frames = before.first_frame + before.frames if before else 0
            return Kept(epoch=self.epoch, chunks=kept, seconds=frames / self.pace.fps)

    @property
    def seconds(self) -> float:
        """Of video made so far."""
        return self.frames / self.pace.fps

    @property
    def prompt(self) -> str:
        return self._stream.prompt

    @property
    def how(self) -> Mapping[str, Any]:
        """As `Steerable`; the file's frames may be larger than the model's."""
        return self._stream.how

    @property
    def sentences(self) -> dict[float, str]:
        """What was made so far shows, by the seconds from which on it does."""
        told: dict[float, str] = {}
        for chunk in self.chunks:
            if not told or told[max(told)] != chunk.prompt:
                told[chunk.first_frame / self.pace.fps] = chunk.prompt
        return told

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def viewers(self) -> int:
        return len(self._viewers)

    @property
    def snapshots(self) -> Snapshots:
        """To be asked for their count and bytes alone."""
        return self._snapshots

    @property
    def codec(self) -> str | None:
        """As browsers want it named, ``avc1.…``; None before the first chunk."""
        return self._codec

    @property
    def head(self) -> bytes:
        """What a player must have before a fragment. Empty before the first chunk."""
        return self._head

    def fragment(self, number: int, *, epoch: int) -> bytes | None:
        """A chunk's bytes in the file, without the head; None where there is no such chunk (yet, or any more)."""
        with self._lock:
            if epoch != self.epoch or number >= len(self._chunks) or self._closed:
                return None
            start = self._chunks[number - 1].end if number else len(self._head)
            with open(self.path, "rb") as file:
                file.seek(start)
                return file.read(self._chunks[number].end - start)

    def thumbnail(self, number: int) -> bytes:
        """A chunk's last frame, small, as a PNG.

        Raises:
            RehyatError: there is no such chunk.
        """
        with self._lock:
            kept = self._thumbnails.get(number)
            fragment = None if kept else self.fragment(number, epoch=self.epoch)
            if fragment is not None:
                return self._thumbnails.put(number, last_frame(self._head + fragment))
        if kept is None:
            raise RehyatError(f"there is no such chunk: {number}")
        return kept

    # What any thread may ask for.

    def join(self, *, position: float | None = None) -> Viewer:
        """A viewer from now on, from ``position`` (seconds) or the newest frame on."""
        return self._viewers.join(self.seconds if position is None else position)

    def join_asking(self, lead: float) -> None:
        """Someone watches without a connection, and asks for what is new again and again: see `Viewers.ask`."""
        self._viewers.ask(self.seconds + lead)

    def watch(self, watcher: Callable[[], object]) -> Callable[[], None]:
        """Call ``watcher``, from any thread, whenever something changed; returns what ends that."""
        with self._lock:
            self._watchers.add(watcher)
        return lambda: self._watchers.discard(watcher)

    def change_prompt(self, prompt: str) -> Future[int]:
        """What the chunks from the next one on show. The result: that chunk's number."""

        def change() -> int:
            self._stream.change_prompt(prompt)
            return len(self._chunks)

        return self._post(change)

    def rewind(self, number: int) -> Future[int]:
        """Drop every chunk from ``number`` on and go on from there, with the sentence in force now."""
        return self._post(lambda: self._rewind(number))

    def branch(self, number: int, path: Path, *, seed: int | None = None) -> Future[LiveStream]:
        """A second live stream with the same chunks before ``number``, whose file is ``path``; it goes its own way."""
        return self._post(lambda: self._branch(number, path, seed))

    def save(self, folder: Path) -> Future[None]:
        """Keep the state after the newest chunk: see ``Stream.save``."""
        return self._post(lambda: self._stream.save(folder))

    def close(self) -> None:
        """No more chunks; the file is closed and stays."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._video.close()
                for _, future in self._events:
                    future.set_exception(RehyatError("the stream has ended"))
                self._events.clear()
        self.changed()

    # What the host's thread does.

    @property
    def stream(self) -> Steerable:
        """What makes the next chunk."""
        return self._stream

    def work(self) -> bool:
        """Apply the events that wait, then make a chunk if one is wanted; was there anything to do?"""
        busy = self.apply()
        if self.wants_chunk():
            begun = time.monotonic()
            try:
                block = next(self._stream)
            except Exception as error:
                self.fail(error)
                if not isinstance(error, RehyatError):
                    raise
            else:
                self.take(block, time.monotonic() - begun)
            busy = True
        return busy

    def apply(self) -> bool:
        """Apply the events that wait; were there any?"""
        busy = False
        while self._events and not self._closed:
            event, future = self._events.popleft()
            busy = True
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(event())
                except Exception as error:
                    future.set_exception(error)
            self.changed()
        return busy

    def fail(self, error: Exception) -> None:
        """The stream cannot go on; viewers are told why."""
        self.failed = str(error) or type(error).__name__
        self.close()

    def take(self, block: np.ndarray, seconds: float) -> None:
        """Append the chunk that `stream` made in so many seconds; the stream ends where it cannot be written."""
        with self._lock:
            if self._closed:
                return
            first = self.frames
            self._video.begin_chapter(self._stream.prompt)
            try:
                self._video.append(block)
            except RehyatError as error:
                self.fail(error)
                return
            self._head, self._codec = self._video.head, self._video.codec
            self._chunks.append(
                Chunk(
                    number=len(self._chunks),
                    first_frame=first,
                    frames=len(block),
                    end=self._video.size,
                    prompt=self._stream.prompt,
                    seconds=seconds,
                )
            )
            self._thumbnails.put(self._chunks[-1].number, block[-1])
            self._snapshots.put(len(self._chunks), self._stream.snapshot())
        self.changed()

    def save_now(self, folder: Path) -> None:
        """As `save`, on the host's thread."""
        self._stream.save(folder)

    def wants_chunk(self) -> bool:
        """Somebody watches, or did a moment ago, and is not far behind."""
        return not self._closed and self._viewers.want(self.seconds, self.pace)

    def changed(self) -> None:
        self._on_change()
        with self._lock:
            watchers = list(self._watchers)
        for watcher in watchers:
            watcher()

    def _post(self, event: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            if self._closed:
                future.set_exception(RehyatError("the stream has ended"))
                return future
            self._events.append((event, future))
        self.changed()
        return future

    def _at(self, number: int) -> Steerable:
        """The stream after so many chunks: from the nearest snapshot before, the chunks after it made again."""
        nearest = self._snapshots.nearest(number)
        if nearest is None:
            raise RehyatError(f"the stream was resumed at chunk {self._snapshots.first}: it cannot go back further")
        stream = self._snapshots[nearest].fork()
        for chunk in self._chunks[nearest:number]:
            if stream.prompt != chunk.prompt:
                stream.change_prompt(chunk.prompt)
            next(stream)
        return stream

    def _check_number(self, number: int) -> None:
        if not isinstance(number, int) or not 0 <= number <= len(self._chunks):
            raise RehyatError(f"there is no chunk {number!r}: the stream has {len(self._chunks)}")

    def _rewind(self, number: int) -> int:
        self._check_number(number)
        prompt, stream = self._stream.prompt, self._at(number)
        if stream.prompt != prompt:
            stream.change_prompt(prompt)
        with self._lock:
            self._stream = stream
            del self._chunks[number:]
            self._snapshots.cut(number)
            self._thumbnails.cut(number)
            self._cuts.append(number)
            self._viewers.back_to(self.seconds)
            self._video.cut(after=self.frames)
        return number

    def _branch(self, number: int, path: Path, seed: int | None) -> LiveStream:
        self._check_number(number)
        stream = self._at(number)
        if seed is not None:
            stream = stream.fork(seed=seed)
        other = LiveStream(stream, path, pace=self.pace, on_change=self._on_change)
        chunks = self._chunks[:number]
        if chunks:
            other._video.close()
            with open(self.path, "rb") as source, open(path, "wb") as copy:
                left = chunks[-1].end
                while left and (data := source.read(min(left, 1 << 20))):
                    copy.write(data)
                    left -= len(data)
            other._video = GrowingVideo(path, fps=self.pace.fps)
            other._chunks = chunks
            other._video.go_on(after=other.frames)
            other._head, other._codec = self._head, self._codec
            kept = self._snapshots.up_to(number) | {number: stream.snapshot()}
            other._snapshots = Snapshots(self.pace.snapshot_bytes, kept)
        if stream.prompt != self._stream.prompt:
            stream.change_prompt(self._stream.prompt)
        return other

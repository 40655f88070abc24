"""One model and the live streams that are made with it, in turn, by one thread. Knows no web."""

from __future__ import annotations

import dataclasses
import logging
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from rehyat_jax.errors import RehyatError
from rehyat_jax.runtime.heap import Trim
from rehyat_jax.serve.jobs import Jobs
from rehyat_jax.serve.kept import StreamFiles
from rehyat_jax.serve.limits import NAME, Full, Limits
from rehyat_jax.serve.live import LiveStream
from rehyat_jax.serve.steerable import Batches, Pace, Steerable
from rehyat_jax.serve.wish import Wish
from rehyat_jax.video.growing import finish_video

_log = logging.getLogger(__name__)

_GONE = "there is no such stream (any more)"


#: Makes a stream of a wish, or raises RehyatError.
Open = Callable[[Wish], Steerable]
#: What a saved video says of how it was made, of a stream and its sentences by second.
Describe = Callable[[Any, Mapping[float, str]], Mapping[str, str]]
#: The stream that was saved in a folder; raises RehyatError where there is none that can be trusted.
Resume = Callable[[Path], Steerable]
#: Of a stream's time, at most a quarter goes into saving it.
_PATIENCE = 3.0


@dataclasses.dataclass
class _Held:
    live: LiveStream
    begun: float
    seen: float
    saved: float = 0.0
    cost: float = 0.0


class Host:
    """Holds live streams, gives each its turn, and ends those that nobody watches.

    Args:
        open_stream: makes a stream of the model; called on the host's thread alone, as all that a model does.
        resume: reads a saved stream; without it none can be handed in.
        together: makes chunks of several streams as rows of one batch; without it, each by itself.
        describe: metadata of the videos that are handed out; the stream is that of the newest chunk.
        folder: where files are kept; a temporary one, removed with the host, by default. With ``resume``, streams are
            saved in it as they grow, and those of an earlier host go on.
    """

    def __init__(
        self,
        open_stream: Open,
        *,
        resume: Resume | None = None,
        together: Batches | None = None,
        describe: Describe | None = None,
        pace: Pace | None = None,
        limits: Limits | None = None,
        folder: Path | None = None,
    ) -> None:
        self.pace, self.limits = pace or Pace(), limits or Limits()
        self._open, self._resume, self._together, self._describe = open_stream, resume, together, describe
        self._keeps = folder is not None and resume is not None
        self._own = None if folder else tempfile.TemporaryDirectory(prefix="rehyat-serve-")
        self.folder = folder or Path(self._own.name if self._own else "")
        self._files = StreamFiles(self.folder)
        self._held: dict[str, _Held] = {}
        self._calls: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._work = threading.Condition()
        self._saving = threading.Lock()
        self._stop = False
        #: Set once the streams of an earlier host are there again.
        self.restored = threading.Event()
        self.chunks_made = self.frames_made = self.batches_made = self.largest_batch = 0
        self.chunk_seconds = 0.0
        #: Of a batch's streams, which are written at once.
        self._encoders = ThreadPoolExecutor(thread_name_prefix="rehyat-encode")
        self.videos = Jobs(self.limits, self.folder, fps=self.pace.fps, call=self.call, on_change=self._something)
        self._thread = threading.Thread(target=self._run, name="rehyat-host", daemon=True)
        self._thread.start()

    # Any thread.

    def begin(self, wish: Wish) -> Future[str]:
        """A new live stream; the result is its name.

        Raises:
            Full: there are as many as may be.
            RehyatError: the sentence is too long; in the result: what the model says of the wish.
        """
        self.limits.check_prompt(wish.prompt)
        self.limits.check_prompt(wish.negative_prompt)
        self._check_room()

        def begin() -> str:
            name = secrets.token_hex(8)
            live = LiveStream(self._open(wish), self._files.video(name), pace=self.pace, on_change=self._something)
            return self._hold(name, live)

        return self.call(begin)

    def begin_saved(self, state: bytes) -> Future[str]:
        """A live stream that goes on from a saved state, the content of its file; the result is its name.

        Raises:
            Full: there are as many as may be.
            RehyatError: this host takes none; in the result: why the state cannot be gone on from.
        """
        resume = self._resume
        if resume is None:
            raise RehyatError("this server takes no saved states")
        self._check_room()

        def begin() -> str:
            name = secrets.token_hex(8)
            with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                Path(folder, "stream.safetensors").write_bytes(state)
                stream = resume(Path(folder))
            live = LiveStream(stream, self._files.video(name), pace=self.pace, on_change=self._something)
            return self._hold(name, live)

        return self.call(begin)

    def branch(self, name: str, number: int, *, seed: int | None = None) -> Future[str]:
        """A fork of a live stream from a chunk on, held beside it; the result is its name."""
        live = self.get(name)
        self._check_room()
        other = secrets.token_hex(8)
        done: Future[str] = Future()

        def held(branched: Future[LiveStream]) -> None:
            try:
                done.set_result(self._hold(other, branched.result()))
            except Exception as error:
                done.set_exception(error)

        live.branch(number, self._files.video(other), seed=seed).add_done_callback(held)
        return done

    def whole(self, name: str) -> Future[Path]:
        """A finished mp4 of what a live stream has made: an index, a chapter for each sentence, how it was made.

        Raises:
            RehyatError: there is no such stream, or nothing was made yet.
        """
        live = self.get(name)
        if not live.frames:
            raise RehyatError("nothing was made yet")
        target = self._files.whole(name)

        def make() -> Path:
            metadata = {} if self._describe is None else self._describe(live.stream, live.sentences)
            copy = target.with_suffix(".part")
            shutil.copyfile(live.path, copy)
            try:
                finish_video(copy, target, metadata=metadata)
            finally:
                copy.unlink()
            return target

        return self.call(make)

    def save(self, name: str) -> Future[None]:
        """Keep the state after a live stream's newest chunk, as `state_of` finds it."""
        return self.get(name).save(self._files.state(name))

    def state_of(self, name: str) -> Path:
        """The file of a live stream's state that was kept last."""
        return self._files.state(name) / "stream.safetensors"

    def get(self, name: str) -> LiveStream:
        """
        Raises:
            RehyatError: there is no such stream (any more).
        """
        held = self._held.get(name) if NAME.fullmatch(name) else None
        if held is None:
            raise RehyatError(_GONE)
        return held.live

    def names(self) -> list[str]:
        with self._work:
            return list(self._held)

    def end(self, name: str) -> None:
        """Close a stream and remove its file."""
        live = self.get(name)
        with self._work:
            if self._held.pop(name, None) is None:
                raise RehyatError(_GONE)
        live.close()
        with self._saving:
            self._files.remove(name)

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Run something on the host's thread, before the next chunk."""
        future: Future[Any] = Future()
        with self._work:
            if self._stop:
                future.set_exception(RehyatError("the server is ending"))
                return future
            self._calls.append((function, future))
            self._work.notify_all()
        return future

    def close(self) -> None:
        """End every stream after the chunk under way; files in the host's own folder go."""
        with self._work:
            self._stop = True
            self._work.notify_all()
        self._thread.join()
        self._encoders.shutdown()
        if self._together is not None:
            self._together.close()
        for name, held in list(self._held.items()):
            if self._keeps and held.live.chunks and not held.live.closed:
                self._save(name, held)
        for held in list(self._held.values()):
            held.live.close()
        self._held.clear()
        self.videos.close()
        for _, future in self._calls:
            future.set_exception(RehyatError("the server is ending"))
        if self._own:
            self._own.cleanup()

    # The host's thread.

    def _check_room(self) -> None:
        if len(self._held) >= self.limits.streams:
            raise Full(f"{self.limits.streams} streams are being made: end one, or try again later")

    def _hold(self, name: str, live: LiveStream) -> str:
        now = time.monotonic()
        with self._work:
            self._held[name] = _Held(live, now, now)
            self._work.notify_all()
        _log.info("stream begun", extra={"stream": name, "streams": len(self._held)})
        return name

    def _something(self) -> None:
        with self._work:
            self._work.notify_all()

    def _save(self, name: str, held: _Held) -> None:
        """A stream that was ended meanwhile is not kept: its files are gone."""
        begun = time.monotonic()
        with self._saving:
            if name not in self._held:
                return
            self._files.save(name, held.live)
        held.saved = time.monotonic()
        held.cost = held.saved - begun

    def _restore(self) -> None:
        """Streams that an earlier host left in the folder; what cannot be gone on with stays as it is, and is said."""
        resume = self._resume
        assert resume is not None
        for name in self._files.saved():
            try:
                live = self._files.read(name, resume, pace=self.pace, on_change=self._something)
            except (RehyatError, OSError, ValueError, TypeError, KeyError) as error:
                _log.warning("stream cannot be gone on with: %s", error, extra={"stream": name})
                continue
            self._hold(name, live)

    def _run(self) -> None:
        if self._keeps:
            self._restore()
        self.restored.set()
        trim = Trim()
        while True:
            with self._work:
                if self._stop:
                    return
                calls, self._calls = self._calls, []
                turn = list(self._held.items())
            for function, future in calls:
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(function())
                    except Exception as error:
                        future.set_exception(error)
            busy = bool(calls)
            for batch in self._batches(turn):  # one chunk each, in turn
                busy |= self._one_turn(*batch[0]) if len(batch) == 1 else self._batch_turn(batch)
            made = self.videos.work(self._open)
            self.frames_made += made or 0
            self.chunks_made += bool(made)
            busy |= made is not None
            if busy:
                trim()
            else:
                with self._work:
                    if not self._stop and not self._calls:
                        self._work.wait(timeout=0.1)

    def _batches(self, turn: list[tuple[str, _Held]]) -> list[list[tuple[str, _Held]]]:
        """Those that want a chunk, by batches; every other by itself."""
        if self._together is None:
            return [[each] for each in turn]
        for _, held in turn:  # a sentence that changes may change the batch
            held.live.apply()
        wanting = [each for each in turn if each[1].live.wants_chunk()]
        batches = self._together.batches([held.live.stream for _, held in wanting])
        resting = [[each] for each in turn if each not in wanting]
        return [[wanting[number] for number in batch] for batch in batches] + resting

    def _batch_turn(self, batch: list[tuple[str, _Held]]) -> bool:
        """A chunk of each, made together."""
        assert self._together is not None
        begun = time.monotonic()
        try:
            blocks = self._together.advance([held.live.stream for _, held in batch])
        except Exception as error:  # none has advanced: each by itself says whose it is
            _log.warning("%d streams could not be made together: %s", len(batch), error)
            for name, held in batch:
                self._one_turn(name, held)
            return True
        seconds = time.monotonic() - begun
        taken = {
            held.live: self._encoders.submit(held.live.take, block, seconds)
            for (_, held), block in zip(batch, blocks, strict=True)
            if not isinstance(block, Exception)
        }
        for (name, held), block in zip(batch, blocks, strict=True):
            if isinstance(block, Exception):
                held.live.fail(block)
            else:
                taken[held.live].result()
                self._made(name, held, chunks=1, frames=len(block))
            self._end_in_time(name, held)
        self._count_batch(len(batch), seconds)
        return True

    def _count_batch(self, rows: int, seconds: float) -> None:
        self.batches_made += 1
        self.chunk_seconds += seconds
        self.largest_batch = max(self.largest_batch, rows)

    def _made(self, name: str, held: _Held, *, chunks: int, frames: int) -> None:
        self.chunks_made += chunks
        self.frames_made += frames
        if self._keeps and time.monotonic() - held.saved >= _PATIENCE * held.cost:
            self._save(name, held)

    def _end_in_time(self, name: str, held: _Held) -> None:
        now = time.monotonic()
        if held.live.viewers:
            held.seen = now
        if now - held.begun > self.limits.life or now - held.seen > self.limits.idle:
            _log.info("stream ended", extra={"stream": name, "frames": held.live.frames})
            with suppress(RehyatError):  # a client ended it meanwhile
                self.end(name)

    def _one_turn(self, name: str, held: _Held) -> bool:
        live, begun = held.live, time.monotonic()
        before, frames = len(live.chunks), live.frames
        try:
            busy = live.work()
        except Exception:
            _log.exception("stream failed", extra={"stream": name})
            busy = True
        made = len(live.chunks) - before
        if made > 0:
            self._count_batch(1, time.monotonic() - begun)
            self._made(name, held, chunks=made, frames=live.frames - frames)
        self._end_in_time(name, held)
        return busy

"""One model and the live streams that are made with it, in turn, by one thread. Knows no web."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
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
from rehyat_jax.runtime.files import whole_file
from rehyat_jax.runtime.memory import give_back
from rehyat_jax.serve.jobs import Job
from rehyat_jax.serve.live import LiveStream
from rehyat_jax.serve.steerable import Batches, Chunk, Pace, Steerable
from rehyat_jax.serve.wish import Wish
from rehyat_jax.video.growing import finish_video

_log = logging.getLogger(__name__)

#: What names a stream: never a path, nor anything that a client chose.
_NAME = re.compile(r"[0-9a-f]{16}")
_GONE = "there is no such stream (any more)"


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


#: Makes a stream of a wish, or raises RehyatError.
Open = Callable[[Wish], Steerable]
#: What a saved video says of how it was made, of a stream and its sentences by second.
Describe = Callable[[Any, Mapping[float, str]], Mapping[str, str]]
#: The stream that was saved in a folder; raises RehyatError where there is none that can be trusted.
Resume = Callable[[Path], Steerable]
#: Of a stream's time, at most a quarter goes into saving it.
_PATIENCE = 3.0
#: Seconds between two returns of freed memory to the system.
_TIDY = 2.0


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
        self._held: dict[str, _Held] = {}
        self._jobs: dict[str, Job] = {}
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
        self._thread = threading.Thread(target=self._run, name="rehyat-host", daemon=True)
        self._thread.start()

    # Any thread.

    def begin(self, wish: Wish) -> Future[str]:
        """A new live stream; the result is its name.

        Raises:
            Full: there are as many as may be.
            RehyatError: the sentence is too long; in the result: what the model says of the wish.
        """
        self.check_prompt(wish.prompt)
        self.check_prompt(wish.negative_prompt)
        self._check_room()

        def begin() -> str:
            name = secrets.token_hex(8)
            live = LiveStream(self._open(wish), self.folder / f"{name}.mp4", pace=self.pace, on_change=self._something)
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
            live = LiveStream(stream, self.folder / f"{name}.mp4", pace=self.pace, on_change=self._something)
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

        live.branch(number, self.folder / f"{other}.mp4", seed=seed).add_done_callback(held)
        return done

    def whole(self, name: str) -> Future[Path]:
        """A finished mp4 of what a live stream has made: an index, a chapter for each sentence, how it was made.

        Raises:
            RehyatError: there is no such stream, or nothing was made yet.
        """
        live = self.get(name)
        if not live.frames:
            raise RehyatError("nothing was made yet")
        target = self.folder / f"{name}.whole.mp4"

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
        return self.get(name).save(self._state_folder(name))

    def state_of(self, name: str) -> Path:
        """The file of a live stream's state that was kept last."""
        return self._state_folder(name) / "stream.safetensors"

    def get(self, name: str) -> LiveStream:
        """
        Raises:
            RehyatError: there is no such stream (any more).
        """
        held = self._held.get(name) if _NAME.fullmatch(name) else None
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
            live.path.unlink(missing_ok=True)
            self._chunks_file(name).unlink(missing_ok=True)
            (self.folder / f"{name}.whole.mp4").unlink(missing_ok=True)
            shutil.rmtree(self._state_folder(name), ignore_errors=True)

    def queue(self, wish: Wish, *, frames: int) -> Job:
        """A video of so many frames, to be made when those before it are done, beside the live streams.

        Raises:
            Full: as many wait as may.
            RehyatError: it is too long, or its sentence is.
        """
        self.check_prompt(wish.prompt)
        self.check_prompt(wish.negative_prompt)
        if not 1 <= frames <= self.limits.frames:
            raise RehyatError(f"a video may have 1 to {self.limits.frames} frames, not {frames}")
        name = secrets.token_hex(8)
        job = Job(name, wish, frames, self.folder / f"{name}.video.mp4", self.pace.fps)
        with self._work:
            while len(self._jobs) >= self.limits.jobs:
                ended = next((other for other in self._jobs.values() if other.ended), None)
                if ended is None:
                    raise Full(f"{self.limits.jobs} videos wait; try again later")
                self._jobs.pop(ended.name).discard()
            self._jobs[name] = job
            self._work.notify_all()
        return job

    def jobs(self) -> list[Job]:
        with self._work:
            return list(self._jobs.values())

    def job(self, name: str) -> Job:
        """
        Raises:
            RehyatError: there is no such video (any more).
        """
        job = self._jobs.get(name) if _NAME.fullmatch(name) else None
        if job is None:
            raise RehyatError("there is no such video (any more)")
        return job

    def drop(self, name: str) -> None:
        """Forget a video, finished or not, and remove its file."""
        job = self.job(name)
        with self._work:
            self._jobs.pop(name, None)
        self.call(job.discard)

    def check_prompt(self, prompt: Any) -> None:
        """
        Raises:
            RehyatError: it is no text, or too long.
        """
        if not isinstance(prompt, str):
            raise RehyatError("a sentence must be a text")
        if len(prompt) > self.limits.characters:
            raise RehyatError(f"a sentence may have {self.limits.characters} characters, not {len(prompt)}")

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
        for job in self._jobs.values():
            if not job.ended:
                job.discard()
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

    def _state_folder(self, name: str) -> Path:
        return self.folder / f"{name}.state"

    def _chunks_file(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _save(self, name: str, held: _Held) -> None:
        """The chunks first: of those that a kill leaves beyond the state, the next host knows nothing. A stream that
        was ended meanwhile is not kept: its files are gone."""
        begun, live = time.monotonic(), held.live
        content = {"before": live.before, "chunks": [chunk.to_dict() for chunk in live.chunks]}
        with self._saving:
            if name not in self._held:
                return
            with whole_file(self._chunks_file(name)) as partial:
                partial.write_text(json.dumps(content), encoding="utf-8")
            live.save_now(self._state_folder(name))
        held.saved = time.monotonic()
        held.cost = held.saved - begun

    def _restore(self) -> None:
        """Streams that an earlier host left in the folder; what cannot be gone on with stays as it is, and is said."""
        for state in sorted(self.folder.glob("*.state")):
            name = state.stem
            if not _NAME.fullmatch(name) or self._resume is None:
                continue
            try:
                content = json.loads(self._chunks_file(name).read_text("utf-8"))
                live = LiveStream.resumed(
                    self._resume(state),
                    self.folder / f"{name}.mp4",
                    [Chunk.from_dict(each) for each in content["chunks"]],
                    before=content["before"],
                    pace=self.pace,
                    on_change=self._something,
                )
            except (RehyatError, OSError, ValueError, TypeError, KeyError) as error:
                _log.warning("stream cannot be gone on with: %s", error, extra={"stream": name})
                continue
            self._hold(name, live)

    def _run(self) -> None:
        if self._keeps:
            self._restore()
        self.restored.set()
        tidied = time.monotonic()
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
            busy |= self._one_job()
            if busy and time.monotonic() - tidied > _TIDY:
                give_back()
                tidied = time.monotonic()
            if not busy:
                with self._work:
                    if not self._stop and not self._calls:
                        self._work.wait(timeout=0.1)

    def _one_job(self) -> bool:
        """A chunk of the oldest video that is not done."""
        job = next((job for job in self.jobs() if not job.ended), None)
        if job is None:
            return False
        try:
            if job.status == "queued":
                job.begin(self._open(job.wish))
            self.frames_made += job.work()
            self.chunks_made += 1
            if job.ended:
                _log.info("video made", extra={"video": job.name, "frames": job.frames})
        except Exception as error:
            if not isinstance(error, RehyatError):
                _log.exception("video failed", extra={"video": job.name})
            job.fail(error)
        return True

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

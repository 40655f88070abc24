"""The files of live streams in a host's folder: what was made, and what another host goes on from. Knows no web."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from rehyat_jax.runtime.files import whole_file
from rehyat_jax.serve.limits import NAME
from rehyat_jax.serve.live import LiveStream
from rehyat_jax.serve.steerable import Chunk, Pace, Steerable


class StreamFiles:
    """By a stream's name: its growing video, that as a finished file, its chunks and its state."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def video(self, name: str) -> Path:
        return self._folder / f"{name}.mp4"

    def whole(self, name: str) -> Path:
        return self._folder / f"{name}.whole.mp4"

    def state(self, name: str) -> Path:
        """A folder, as `Stream.save` has it."""
        return self._folder / f"{name}.state"

    def _chunks(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def remove(self, name: str) -> None:
        for path in (self.video(name), self._chunks(name), self.whole(name)):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.state(name), ignore_errors=True)

    def save(self, name: str, live: LiveStream) -> None:
        """The chunks first: of those that a kill leaves beyond the state, the next host knows nothing."""
        content = {"before": live.before, "chunks": [chunk.to_dict() for chunk in live.chunks]}
        with whole_file(self._chunks(name)) as partial:
            partial.write_text(json.dumps(content), encoding="utf-8")
        live.save_now(self.state(name))

    def saved(self) -> Iterator[str]:
        """Names of streams whose state an earlier host left."""
        return (path.stem for path in sorted(self._folder.glob("*.state")) if NAME.fullmatch(path.stem))

    def read(
        self, name: str, resume: Callable[[Path], Steerable], *, pace: Pace, on_change: Callable[[], None]
    ) -> LiveStream:
        """A saved stream, where its state stands.

        Raises:
            RehyatError, OSError, ValueError, TypeError, KeyError: it cannot be gone on with.
        """
        content = json.loads(self._chunks(name).read_text("utf-8"))
        return LiveStream.resumed(
            resume(self.state(name)),
            self.video(name),
            [Chunk.from_dict(each) for each in content["chunks"]],
            before=content["before"],
            pace=pace,
            on_change=on_change,
        )

"""Who watches a live stream, how far each is, and whether more is wanted. Knows no web."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from rehyat_jax.serve.steerable import Pace


class Viewer:
    """Someone who watches: where in the video, in seconds. ``position`` is told by a player that reports it;
    otherwise a player is taken to show a second a second from the place where it joined."""

    def __init__(self, among: Viewers, position: float) -> None:
        self._among, self._joined, self._from, self._told = among, time.monotonic(), position, None

    _told: float | None

    @property
    def position(self) -> float:
        return self._from + time.monotonic() - self._joined if self._told is None else self._told

    def at(self, position: float) -> None:
        """The player shows this second of the video."""
        self._told = max(0.0, position)
        self._among.changed()

    def close(self) -> None:
        self._among.leave(self)


class Viewers:
    """Those of one stream; any thread may ask.

    Args:
        changed: called when somebody joined, or told where they are.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self.changed = changed
        self._viewers: set[Viewer] = set()
        #: Of those who ask again and again, and when one did last.
        self._asking: Viewer | None = None
        self._asked = 0.0
        self._last_seen = time.monotonic()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._viewers)

    def join(self, position: float) -> Viewer:
        viewer = Viewer(self, position)
        with self._lock:
            self._viewers.add(viewer)
        self.changed()
        return viewer

    def ask(self, position: float) -> None:
        """Someone without a connection asks for what is new, as they do again and again: a viewer who goes on from
        ``position``, ahead of the newest frame since such players begin late, a second a second; gone once nothing was
        asked for a while."""
        with self._lock:
            self._asked = time.monotonic()
            if self._asking is None:
                self._asking = Viewer(self, position)
                self._viewers.add(self._asking)
        self.changed()

    def leave(self, viewer: Viewer) -> None:
        with self._lock:
            if viewer in self._viewers:
                self._viewers.remove(viewer)
                self._last_seen = time.monotonic()

    def back_to(self, seconds: float) -> None:
        """The stream was rewound to there."""
        with self._lock:
            self._nobody_asks()  # until asked again, and then from here on
            viewers = list(self._viewers)
        for viewer in viewers:
            viewer.at(min(viewer.position, seconds))

    def want(self, seconds: float, pace: Pace) -> bool:
        """Somebody watches, or did a moment ago, and is not far behind the ``seconds`` that were made."""
        with self._lock:
            if time.monotonic() - self._asked > pace.alone:
                self._nobody_asks()
            places = [viewer.position for viewer in self._viewers]
        if not places:
            return time.monotonic() - self._last_seen < pace.alone and seconds < pace.ahead
        return seconds - max(places) < pace.ahead

    def _nobody_asks(self) -> None:
        if self._asking is not None:
            self.leave(self._asking)
            self._asking = None

"""How many denoising steps a machine can take and still make a video as fast as it is shown."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from rehyat_jax.streams.stream import Stream

#: Chunks that are made before time is taken: the first, and the next one, wait for the compiler.
_COMPILED = 2
#: Chunks whose time is taken.
_TIMED = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredSteps:
    """A number of denoising steps, and the frames a second that a stream makes with it on this machine."""

    steps: int
    frames_per_second: float
    #: Whether that is as fast as the video is shown.
    real_time: bool


def frames_per_second(stream: Stream) -> float:
    """Of a stream before its first chunk; four chunks of it are made."""
    for _ in range(_COMPILED):
        next(stream)
    begun = time.monotonic()
    frames = sum(next(stream).shape[-4] for _ in range(_TIMED))
    return frames / (time.monotonic() - begun)


def most_steps(open_stream: Callable[[int], Stream], candidates: Sequence[int], *, fps: float | int) -> MeasuredSteps:
    """The most steps of a list with which a stream makes ``fps`` frames a second or more; the fewest, and the rate that
    they reach, where none does. A binary search: more steps are never faster.

    Args:
        open_stream: a new stream of so many steps.
        candidates: numbers of steps, in any order.

    Raises:
        RehyatError: what opening or making a stream raises.
    """
    ordered = sorted(set(candidates))
    best: MeasuredSteps | None = None
    low, high = 0, len(ordered)  # below low every number is fast enough, from high on none
    while low < high:
        middle = (low + high) // 2
        reached = frames_per_second(open_stream(ordered[middle]))
        measured = MeasuredSteps(steps=ordered[middle], frames_per_second=reached, real_time=reached >= fps)
        if measured.real_time:
            best, low = measured, middle + 1
        else:
            high = middle
            best = measured if best is None or not best.real_time else best
    assert best is not None, "a list of steps is not empty"
    return best

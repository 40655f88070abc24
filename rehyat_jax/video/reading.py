"""Videos as a player shows them: rotated, deinterlaced, with square pixels, in their true colours, at their times.

HDR is refused, not tone-mapped: how bright white is to be is the user's choice, and a model would learn it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from rehyat_jax.errors import RehyatError
from rehyat_jax.runtime import arguments
from rehyat_jax.video import colour
from rehyat_jax.video.containers import OpenVideo, opened_video, unreadable

#: Of two frames that are as near in time, to within so much, the earlier is taken.
_TIE = 1e-6
#: A pixel's width over its height beyond which a file is wrong, not anamorphic.
_WIDEST = 8


@dataclasses.dataclass(frozen=True)
class ShownFrame:
    """A frame of a video. Its pixels are made when they are asked for."""

    #: When it is shown and for how long, in seconds; the first frame of a video is shown at 0.
    seconds: float
    lasts: float
    _frame: av.VideoFrame = dataclasses.field(repr=False)
    _wide: Fraction = Fraction(1)

    def pixels(self) -> UInt8[np.ndarray, "H W 3"]:
        """RGB as shown, with square pixels."""
        pixels = colour.to_rgb(self._frame)
        if self._wide != 1:
            height, width = pixels.shape[:2]
            size = (max(1, round(width * self._wide)), height)
            pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
        return _oriented(pixels, _display_matrix(self._frame))


def shown_frames(path: str | os.PathLike[str]) -> Iterator[ShownFrame]:
    """Every frame of a video, in the order of their times. A cover picture is no video; an edit list is obeyed.

    Raises:
        RehyatError: the file is missing, damaged or no video, or is HDR or otherwise not to be shown without a choice.
    """
    begin = last = None
    with opened_video(path) as video:
        wide = _pixel_width(video.stream, path)
        step = 1 / float(video.stream.average_rate or video.stream.guessed_rate or 25)
        for frame in _progressive(video):
            if begin is None:
                _check(frame, path)
            time = frame.time if frame.time is not None else 0.0 if last is None else last + step
            begin = time if begin is None else begin
            lasts = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else step
            yield ShownFrame(seconds=time - begin, lasts=lasts, _frame=frame, _wide=wide)
            last = time
    if begin is None:
        raise unreadable(path, "it holds no frames")


def frames_at_rate(path: str | os.PathLike[str], fps: float | int) -> Iterator[ShownFrame]:
    """For each multiple of 1 / ``fps`` the frame nearest in time, whether the video's own rate is steady or not.

    Raises:
        RehyatError: as :func:`shown_frames`.
    """
    shown: ShownFrame | None = None
    number = 0
    for frame in shown_frames(path):
        if shown is not None:
            halfway = (shown.seconds + frame.seconds) / 2
            while number / fps <= halfway + _TIE:
                yield shown
                number += 1
        shown = frame
    while shown is not None and number / fps <= shown.seconds + shown.lasts / 2 + _TIE:
        yield shown
        number += 1


def read_video(path: str | os.PathLike[str], *, fps: float | int | None = None) -> UInt8[np.ndarray, "F H W 3"]:
    """The frames of a video, RGB, as a player shows them. Exact for videos written with ``codec="rgb"``, ``scale=1``.

    Args:
        fps: ``None``: every frame, whatever its time; else the nearest in time at so many a second.

    Raises:
        RehyatError: the file is missing, damaged or no video, or is HDR or otherwise not to be shown without a choice.
    """
    path = arguments.user_path("path", path)
    if fps is not None and not 0 < fps < float("inf"):
        raise RehyatError(f"fps must be a number above 0, not {fps!r}")
    return np.stack([frame.pixels() for frame in (shown_frames(path) if fps is None else frames_at_rate(path, fps))])


def _check(frame: av.VideoFrame, path: str | os.PathLike[str]) -> None:
    if why := colour.why_not_rgb(frame):
        raise unreadable(path, why)
    a, b, c, d = _display_matrix(frame)
    if min(abs(a) + abs(d), abs(b) + abs(c)) > 0.01 * max(abs(a) + abs(d), abs(b) + abs(c)):
        raise unreadable(path, "it is to be shown rotated, and by no whole number of right angles")


def _pixel_width(stream: av.VideoStream, path: str | os.PathLike[str]) -> Fraction:
    wide = stream.sample_aspect_ratio or Fraction(1)
    if not Fraction(1, _WIDEST) <= wide <= _WIDEST:
        raise unreadable(path, f"its pixels would be {wide} times as wide as high")
    return Fraction(wide)


def _progressive(video: OpenVideo) -> Iterator[av.VideoFrame]:
    """Decoded frames; from the first one on that is flagged as two fields, all through a deinterlacer, which leaves
    those alone that are not."""
    graph: av.filter.Graph | None = None
    for frame in video.container.decode(video.stream):
        if graph is None and not frame.interlaced_frame:
            yield frame
            continue
        graph = graph or _deinterlacer(video.stream, frame)
        graph.push(frame)
        yield from _pulled(graph)
    if graph is not None:
        graph.push(None)
        yield from _pulled(graph)


def _deinterlacer(stream: av.VideoStream, frame: av.VideoFrame) -> av.filter.Graph:
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or stream.time_base
    )
    filters = [graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink")]
    for before, after in zip([source, *filters], filters, strict=False):
        before.link_to(after)
    graph.configure()
    return graph


def _pulled(graph: av.filter.Graph) -> Iterator[av.VideoFrame]:
    while True:
        try:
            yield graph.pull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return


def _display_matrix(frame: av.VideoFrame) -> tuple[float, float, float, float]:
    """a, b, c, d of ISO/IEC 14496-12's matrix: a stored (x, y) is shown at (ax + cy, bx + dy)."""
    try:
        # By name: what PyAV goes through are values until 18, names from 19 on.
        raw = np.frombuffer(bytes(frame.side_data["DISPLAYMATRIX"]), np.int32) / 65536.0
    except (KeyError, ValueError):  # ValueError: a kind of side data that PyAV has no name for
        turns = round(frame.rotation / 90) % 4  # counterclockwise
        return ((1.0, 0.0, 0.0, 1.0), (0.0, -1.0, 1.0, 0.0), (-1.0, 0.0, 0.0, -1.0), (0.0, 1.0, -1.0, 0.0))[turns]
    a, b, c, d = (float(raw[i]) for i in (0, 1, 3, 4))
    return (a, b, c, d) if any((a, b, c, d)) else (1.0, 0.0, 0.0, 1.0)


def _oriented(
    pixels: UInt8[np.ndarray, "H W 3"], matrix: tuple[float, float, float, float]
) -> UInt8[np.ndarray, "_H _W 3"]:
    a, b, c, d = matrix
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, across, down = pixels.swapaxes(0, 1), c, b
    else:
        across, down = a, d
    return np.ascontiguousarray(pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1])

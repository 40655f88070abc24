"""A video's clips: frames at the model's rate, scaled and cut to its size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from rehyat_jax.errors import RehyatError
from train.data.footage import pictures

#: Of two frames that are as near in time, to within so much, the earlier is taken.
_TIE = 1e-6


class _Frame(NamedTuple):
    #: Seconds.
    time: float
    #: Makes its pixels, [H, W, 3].
    pixels: Callable[[], np.ndarray]


def count_clips(path: Path, *, frames: int, fps: int) -> int:
    """How many whole clips decoding a video gives: all of it is decoded, and no pixels are kept.

    Raises:
        RehyatError: the file is no video, is damaged, or has no whole clip.
    """
    there = sum(1 for _ in _at_rate(path, fps))
    if there < frames:
        raise _too_short(path, there=there, frames=frames, fps=fps)
    return there // frames


def clips(
    path: Path, *, frames: int, fps: int, height: int, width: int
) -> Iterator[UInt8[np.ndarray, "F {height} {width} 3"]]:
    """A video's whole clips one after the other; what is left at its end is dropped. Memory is one clip's.

    At each multiple of 1 / ``fps`` the frame nearest in time is taken. It is scaled to cover ``height`` x ``width`` and
    what stands over is cut off on both sides. A folder of numbered pictures has ``fps`` of them a second.

    Raises:
        RehyatError: the file is no video, is damaged, or has no whole clip.
    """
    clip: list[np.ndarray] = []
    made = 0
    for frame in _at_rate(path, fps):
        clip.append(_fitted(frame.pixels(), height, width))
        if len(clip) == frames:
            yield np.stack(clip)
            clip, made = [], made + 1
    if not made:
        raise _too_short(path, there=len(clip), frames=frames, fps=fps)


def _too_short(path: Path, *, there: int, frames: int, fps: int) -> RehyatError:
    return RehyatError(f"{path} is too short: {there} frames at {fps} a second, and {frames} are needed")


def _at_rate(path: Path, fps: int) -> Iterator[_Frame]:
    """A frame for each 1 / ``fps`` seconds."""
    if path.is_dir():
        for number, picture in enumerate(pictures(path)):
            yield _Frame(number / fps, lambda picture=picture: _picture(picture))  # type: ignore[misc]
        return
    shown, begin, ending, number = None, 0.0, 0.0, 0
    try:
        with av.open(str(path)) as container:
            rate = container.streams.video[0].average_rate
            for decoded in container.decode(video=0):
                frame = _Frame(decoded.time or 0.0, lambda decoded=decoded: decoded.to_ndarray(format="rgb24"))  # type: ignore[misc]
                if shown is None:
                    begin, ending = frame.time, 0.5 / float(rate or fps)
                else:
                    halfway = (shown.time + frame.time) / 2 - begin
                    while number / fps <= halfway + _TIE:
                        yield shown
                        number += 1
                shown = frame
    except (av.error.FFmpegError, IndexError) as error:
        raise RehyatError(f"cannot read a video from {path}: {getattr(error, 'strerror', None) or error}") from error
    while shown is not None and number / fps <= shown.time - begin + ending + _TIE:
        yield shown
        number += 1


def _picture(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits of grey
                return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=-1)
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow has no error of its own
        raise RehyatError(f"cannot read a picture from {path}: {str(error)[:200]}") from error


def _fitted(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    if pixels.shape[:2] == (height, width):
        return pixels
    rows, columns = pixels.shape[:2]
    scale = max(height / rows, width / columns)
    kept_rows, kept_columns = height / scale, width / scale
    top, left = (rows - kept_rows) / 2, (columns - kept_columns) / 2
    box = (left, top, left + kept_columns, top + kept_rows)
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC, box=box))

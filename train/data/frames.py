"""A video's clips: frames at the model's rate, scaled and cut to its size."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from rehyat_jax.errors import RehyatError
from rehyat_jax.video.reading import frames_at_rate
from train.data.footage import pictures


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

    At each multiple of 1 / ``fps`` the frame nearest in time is taken, as a player shows it. It is scaled to cover
    ``height`` x ``width`` and what stands over is cut off on both sides. A folder of numbered pictures has ``fps`` of
    them a second.

    Raises:
        RehyatError: the file is no video, is damaged, or has no whole clip.
    """
    clip: list[np.ndarray] = []
    made = 0
    for pixels in _at_rate(path, fps):
        clip.append(_fitted(pixels(), height, width))
        if len(clip) == frames:
            yield np.stack(clip)
            clip, made = [], made + 1
    if not made:
        raise _too_short(path, there=len(clip), frames=frames, fps=fps)


def _too_short(path: Path, *, there: int, frames: int, fps: int) -> RehyatError:
    return RehyatError(f"{path} is too short: {there} frames at {fps} a second, and {frames} are needed")


def _at_rate(path: Path, fps: int) -> Iterator[Callable[[], np.ndarray]]:
    """For each 1 / ``fps`` seconds what makes the frame's pixels, [H, W, 3], as a player shows them."""
    if path.is_dir():
        for picture in pictures(path):
            yield functools.partial(_picture, picture)
        return
    for frame in frames_at_rate(path, fps):
        yield frame.pixels


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

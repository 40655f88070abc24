"""What a stream goes on from: a clip's last frames, made to fit; other sizes are cropped with a word."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8

from rehyat_jax.errors import RehyatError, RehyatWarning
from rehyat_jax.video.images import scaled
from rehyat_jax.video.reading import frames_at_rate

#: Frames of a clip that are gone on from at most: of those before, hardly anything is left in a stream's state.
_LONGEST = 1 << 14


def read_beginning(
    path: str | os.PathLike[str],
    *,
    fps: int,
    height: int,
    width: int,
    most: Callable[[int], int],
) -> UInt8[np.ndarray, "F {height} {width} 3"]:
    """The last frames of a clip, at a rate and a size.

    Args:
        most: of so many frames, how many are whole chunks; 0 where there are too few.

    Raises:
        RehyatError: the file is no video, or has too few frames.

    Warns:
        RehyatWarning: it is cropped, or its first frames are left out.
    """
    kept: deque[np.ndarray] = deque(maxlen=_LONGEST)
    count, size = 0, (height, width)
    for frame in frames_at_rate(path, fps):
        pixels = frame.pixels()
        size = pixels.shape[:2]
        kept.append(scaled(pixels, height=height, width=width))
        count += 1
    frames = most(len(kept))
    if not frames:
        raise RehyatError(f"{os.fspath(path)} is too short to go on from: {count} frames at {fps} a second")
    if tuple(size) != (height, width):
        cut = "scaled" if size[0] * width == size[1] * height else "scaled and cropped"
        _warn(f"{os.fspath(path)} is {size[1]}x{size[0]}: {cut} to {width}x{height}")
    if frames < count:
        _warn(f"{os.fspath(path)}: its last {frames} frames of {count} are whole chunks, and are gone on from")
    return np.stack(list(kept)[-frames:])


def _warn(message: str) -> None:
    warnings.warn(message, RehyatWarning, stacklevel=4)

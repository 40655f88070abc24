"""Frames as notebooks show them: a player in the page."""

from __future__ import annotations

import base64
import dataclasses
import tempfile
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from rehyat_jax.video.io import write_video

#: A notebook keeps what it shows in its file.
_MOST_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True, repr=False)
class Video:
    """Frames, and how many are shown a second: the value of a notebook's cell plays.

    ``Video(pipe("a koala …"))``
    """

    frames: UInt8[np.ndarray, "F H W 3"]
    fps: int = 16

    def __repr__(self) -> str:
        count, height, width, _ = self.frames.shape
        return f"Video({count} frames of {width}x{height}, {count / self.fps:.1f} s)"

    def _repr_html_(self) -> str:
        return player(self.frames, fps=self.fps, title=repr(self))


def player(frames: UInt8[np.ndarray, "F H W 3"], *, fps: int, title: str) -> str:
    """HTML that plays the frames, with the video in it; a line that says why where it would be too large."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "video.mp4")
        write_video(path, frames, fps=fps)
        data = path.read_bytes()
    if len(data) > _MOST_BYTES:
        return f"<div>{title}: too large for a notebook ({len(data) >> 20} MiB); write it with rj.write_video</div>"
    source = base64.b64encode(data).decode()
    return (
        f'<figure style="margin:0"><video controls loop muted autoplay playsinline style="image-rendering:pixelated" '
        f'src="data:video/mp4;base64,{source}"></video><figcaption>{title}</figcaption></figure>'
    )

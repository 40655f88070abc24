"""Videos on disk: mp4 through PyAV, in BT.709 and tagged so, and a contact sheet to see a video at a glance."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from rehyat_jax.errors import RehyatError
from rehyat_jax.runtime import arguments
from rehyat_jax.runtime.files import check_room, whole_file
from rehyat_jax.runtime.outputs import marker
from rehyat_jax.video import colour
from rehyat_jax.video.containers import address
from rehyat_jax.video.reading import read_video as read_video

#: At crf 16, of pictures with much detail; flat ones take a tenth of it.
_BYTES_PER_PIXEL = 0.1
#: Frames smaller than this on their shorter side are enlarged: 4:2:0 halves the colour planes, and a video of 64 x 64
#: pixels is a stamp in a text-book player.
_COMFORTABLE = 256
#: The same for a frame in a contact sheet.
_THUMBNAIL = 128

Codec = Literal["h264", "rgb"]
#: Encoder, pixel format and options. "h264" plays everywhere; "rgb" is lossless: x264 in RGB at quantiser 0.
_CODECS: dict[Codec, tuple[str, str, dict[str, str]]] = {
    "h264": ("libx264", "yuv420p", {"crf": "16", "preset": "medium"}),
    "rgb": ("libx264rgb", "rgb24", {"crf": "0", "preset": "medium"}),
}

#: Metadata may have any names; without this the muxer drops those that iTunes does not know.
FREE_NAMES = {"movflags": "use_metadata_tags"}


def write_video(
    path: str | os.PathLike[str],
    frames: UInt8[np.ndarray, "F H W 3"] | Iterable[UInt8[np.ndarray, "_F H W 3"]],
    *,
    fps: int = 16,
    scale: int | None = None,
    codec: Codec = "h264",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an mp4 under a partial name and rename it when whole.

    Args:
        path: where the video is to stand; missing folders are made.
        frames: all frames, or an iterator of blocks of frames (a stream), RGB.
        fps: frames a second.
        scale: whole number by which each side is enlarged (nearest neighbour). ``None``: for "h264" the smallest that
            makes the shorter side at least 256 pixels and both sides even; for "rgb" 1.
        codec: "h264" (4:2:0, for people) or "rgb" (lossless, for measuring).
        metadata: texts to keep in the file by any names, as those of
            :func:`~rehyat_jax.video.metadata.generation_metadata`.

    Raises:
        RehyatError: there are no frames, blocks differ in size, a side is odd under "h264", or the file cannot be
            written (full disk, read-only folder, …). Nothing is left behind then, nor on an interrupt.
    """
    blocks = (checked_frames(block) for block in ([frames] if isinstance(frames, np.ndarray) else frames))
    first = next((block for block in blocks if len(block)), None)
    if first is None:
        raise RehyatError(f"cannot write {path}: there are no frames")
    picture = Picture.of(first, fps=fps, scale=scale, codec=codec)
    # FFmpeg's own errors of writing (full disk, …) are OSErrors.
    with whole_file(path) as partial, av.open(address(partial), "w", format="mp4", options=FREE_NAMES) as container:
        container.metadata.update(metadata or {})
        stream = picture.add_stream(container)
        for block in itertools.chain([first], blocks):
            if block.shape[1:3] != first.shape[1:3]:
                raise RehyatError(f"frames of {block.shape[1:3]} follow frames of {first.shape[1:3]} in {path}")
            for frame in block:
                container.mux(stream.encode(picture.image(frame)))
        container.mux(stream.encode())


def checked_frames(block: Any) -> UInt8[np.ndarray, "F H W 3"]:
    """
    Raises:
        RehyatError: it is no block of frames.
    """
    if not hasattr(block, "dtype"):
        raise arguments.wrong("frames", block, "uint8 [F, H, W, 3]")
    if block.dtype != np.uint8 or block.ndim != 4 or block.shape[-1] != 3:
        raise RehyatError(f"frames must be uint8 [F, H, W, 3], not {block.dtype} {list(block.shape)}")
    return np.asarray(block)


def check_video_room(path: str | os.PathLike[str], frames: int, *, height: int, width: int) -> None:
    """Warn before frames of this size are made that their video may not fit on the disk.

    Warns:
        RehyatWarning: there is less room than twice what ordinary pictures take: a stream is copied when it is whole.
    """
    pixels = frames * height * width * _comfortable_scale(height, width) ** 2
    check_room(path, size=int(2 * _BYTES_PER_PIXEL * pixels), what="the video", certain=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """How frames become a video's pictures. Made by :meth:`of`, which checks."""

    height: int
    width: int
    scale: int
    fps: int
    codec: Codec
    #: In BT.709 and said so; else as files were written before: converted by BT.601, and nothing said.
    tagged: bool = True

    @classmethod
    def of(cls, block: UInt8[np.ndarray, "F H W 3"], *, fps: int, scale: int | None, codec: Codec) -> Picture:
        """For frames like these; arguments and errors as :func:`write_video`."""
        if fps < 1 or (scale is not None and scale < 1):
            raise RehyatError(f"fps and scale must be at least 1, not {fps} and {scale}")
        height, width = block.shape[1:3]
        scale = scale or (1 if codec == "rgb" else _comfortable_scale(height, width))
        height, width = height * scale, width * scale
        if codec == "h264" and (height % 2 or width % 2):
            raise RehyatError(f"an h264 video needs even sides, not {width} x {height}")
        return cls(height=height, width=width, scale=scale, fps=fps, codec=codec)

    def add_stream(self, container: av.container.OutputContainer, **options: str) -> av.VideoStream:
        """The encoder, in a container; ``options`` are more of its own."""
        encoder, pixel_format, settings = _CODECS[self.codec]
        stream = container.add_stream(encoder, rate=self.fps, options=settings | options)
        stream.width, stream.height, stream.pix_fmt = self.width, self.height, pixel_format
        if self.tagged:
            colour.tag(stream.codec_context)
        return stream

    def image(self, frame: UInt8[np.ndarray, "H W 3"]) -> av.VideoFrame:
        pixels = enlarged(frame, self.scale)
        if not self.tagged:
            return av.VideoFrame.from_ndarray(pixels, format="rgb24")
        return colour.from_rgb(pixels, _CODECS[self.codec][1])


def contact_sheet(
    path: str | os.PathLike[str],
    frames: UInt8[np.ndarray, "F H W 3"],
    *,
    output: str | os.PathLike[str],
    columns: int = 4,
    rows: int = 3,
) -> None:
    """Write a PNG of up to ``columns * rows`` frames, evenly spaced in time, first and last among them.

    Small frames are enlarged by a whole number (nearest neighbour). The PNG says that it was made for the video
    ``output``, so that it may be replaced with that one.

    Raises:
        RehyatError: there are no frames, or the file cannot be written.
    """
    count, height, width = frames.shape[:3]
    if not count:
        raise RehyatError(f"cannot write {path}: there are no frames")
    chosen = np.unique(np.linspace(0, count - 1, columns * rows).round().astype(int))
    columns = min(columns, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    scale, gap = max(1, math.ceil(_THUMBNAIL / min(height, width))), 2
    height, width = height * scale, width * scale
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for place, index in enumerate(chosen):
        top, left = place // columns * (height + gap), place % columns * (width + gap)
        sheet[top : top + height, left : left + width] = enlarged(frames[index], scale)
    texts = PngInfo()
    for name, text in marker(output).items():
        texts.add_itxt(name, text)
    with whole_file(path) as partial, open(partial, "wb") as file:
        Image.fromarray(sheet).save(file, format="png", pnginfo=texts)


def enlarged(frame: UInt8[np.ndarray, "H W 3"], scale: int) -> UInt8[np.ndarray, "_H _W 3"]:
    """Each pixel repeated ``scale`` times down and across."""
    return np.repeat(np.repeat(frame, scale, axis=0), scale, axis=1)


def _comfortable_scale(height: int, width: int) -> int:
    scale = max(1, math.ceil(_COMFORTABLE / min(height, width)))
    return scale if height * scale % 2 == 0 and width * scale % 2 == 0 else scale + scale % 2

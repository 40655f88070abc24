"""Videos as phones, cameras and editors leave them, made with PyAV and nothing of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np


def corners(height: int = 32, width: int = 48, frames: int = 4) -> np.ndarray:
    """A red, a green, a blue and a black corner: it tells how it lies."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    video[:, : height // 2, : width // 2] = (200, 30, 30)
    video[:, height // 2 :, : width // 2] = (30, 200, 30)
    video[:, : height // 2, width // 2 :] = (30, 30, 200)
    return video


def encode(
    path: Path,
    frames: Sequence[np.ndarray] | np.ndarray,
    *,
    given: str = "rgb24",
    stored: str = "yuv420p",
    codec: str = "libx264",
    times: Sequence[int] | None = None,
    rate: int = 16,
    converted: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    rotation: Mapping[str, Any] | None = None,
    options: Mapping[str, str] | None = None,
    muxer: Mapping[str, str] | None = None,
    cover: bytes | None = None,
) -> Path:
    """Write frames; ``tags`` are set on the encoder, ``times`` are in units of 1 / ``rate``."""
    lossless = {"crf": "0"} if codec.startswith("libx264") else {}
    with av.open(str(path), "w", options=dict(muxer or {})) as container:
        if cover is not None:
            picture = container.add_stream("png")
            picture.width, picture.height, picture.pix_fmt = 8, 8, "rgb24"
            picture.disposition = av.stream.Disposition.attached_pic
        stream = container.add_stream(codec, rate=rate, options=lossless | dict(options or {}))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = stored
        stream.codec_context.time_base = Fraction(1, rate)
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        if rotation is not None:
            stream.set_display_rotation(**rotation)
        if cover is not None:
            packet = av.Packet(cover)
            packet.stream, packet.pts, packet.dts, packet.is_keyframe = picture, 0, 0, True
            container.mux(packet)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=given)
            if given != stored:
                frame = frame.reformat(format=stored, **(converted or {}))
            frame.pts, frame.time_base = number if times is None else times[number], Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def decoded(path: Path, *filters: tuple[str, str]) -> np.ndarray:
    """FFmpeg's own word: the first frame through its filters, in RGB."""
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        graph = av.filter.Graph()
        chain = [graph.add_buffer(template=container.streams.video[0])]
        chain += [graph.add(*each) for each in filters] + [graph.add("format", "rgb24"), graph.add("buffersink")]
        graph.link_nodes(*chain).configure()
        graph.push(frame)
        return graph.pull().to_ndarray(format="rgb24")

"""Containers through PyAV: opened by a path that is a path, one video stream chosen, failures told in one sentence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import av
from av.stream import Disposition

from rehyat_jax.errors import RehyatError

#: Streams that look like videos and are pictures beside one.
_BESIDE = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image


class OpenVideo(NamedTuple):
    """A container, and the stream in it that a player shows."""

    container: av.container.InputContainer
    stream: av.VideoStream


def address(path: str | os.PathLike[str]) -> str:
    """A path as FFmpeg is to be given it: absolute, because it takes ``12:30.mp4`` for a protocol named 12."""
    return os.path.abspath(os.fspath(path))


@contextmanager
def opened_video(path: str | os.PathLike[str]) -> Iterator[OpenVideo]:
    """A file to read, and its video: no cover picture, and of several the one that is marked as the default.

    Raises:
        RehyatError: the file is missing, is no video or is damaged; so too what FFmpeg raises inside the block.
    """
    try:
        with av.open(address(path)) as container:
            yield OpenVideo(container, _shown_stream(container, path))
    except (av.error.FFmpegError, UnicodeDecodeError, EOFError) as error:
        raise unreadable(path, getattr(error, "strerror", None) or error) from error


def unreadable(path: str | os.PathLike[str], why: object) -> RehyatError:
    return RehyatError(f"cannot read a video from {os.fspath(path)}: {why}")


def _shown_stream(container: av.container.InputContainer, path: str | os.PathLike[str]) -> av.VideoStream:
    videos = [stream for stream in container.streams.video if not stream.disposition & _BESIDE]
    if not videos:
        kinds = {stream.type for stream in container.streams}
        only = (
            ", only a cover picture" if "video" in kinds else f", only {' and '.join(sorted(kinds))}" if kinds else ""
        )
        raise unreadable(path, f"it holds no video{only}")
    return next((stream for stream in videos if stream.disposition & Disposition.default), videos[0])

"""A folder of videos with captions, and a video's clips: frames at the model's rate, scaled and cut to its size."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.runtime.files import reason

#: Endings of files that are videos.
SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
#: Names each video and its caption, where captions are not in files of their own.
METADATA = "metadata.jsonl"
#: Of two frames that are as near in time, to within so much, the earlier is taken.
_TIE = 1e-6


class Footage(NamedTuple):
    """A video and its caption."""

    path: Path
    caption: str


def find_footage(folder: Path) -> list[Footage]:
    """Every video of a folder, in the order of their names (with ``metadata.jsonl``: of its lines).

    Raises:
        ConfigError: there are none, one has no caption or is missing, or the captions cannot be read.
    """
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}")
    if (folder / METADATA).is_file():
        found = [_listed(folder, number, line) for number, line in enumerate(_text(folder / METADATA).splitlines(), 1)]
    else:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        found = [Footage(path, _beside(path)) for path in paths]
    if not found:
        raise ConfigError(f"{folder} has no videos ({', '.join(SUFFIXES)})")
    return found


def _listed(folder: Path, number: int, line: str) -> Footage:
    where = f"line {number} of {folder / METADATA}"
    try:
        entry = json.loads(line)
        name, caption = entry["file_name"], entry["caption"]
        path = folder / name
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f'{where} is not {{"file_name": …, "caption": …}}') from error
    if not path.is_file():
        raise ConfigError(f"{where} names {name}, which is not there")
    if not isinstance(caption, str) or not caption.strip():
        raise ConfigError(f"{where} has no caption for {name}")
    return Footage(path, caption.strip())


def _beside(path: Path) -> str:
    text = path.with_suffix(".txt")
    if not text.is_file():
        raise ConfigError(f"{path} has no caption: there is no {text.name} beside it")
    if not (caption := _text(text).strip()):
        raise ConfigError(f"{path} has no caption: {text.name} is empty")
    return caption


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {reason(error)}") from error


def check_length(path: Path, *, frames: int, fps: int) -> None:
    """As far as a file's header tells; nothing is decoded.

    Raises:
        ConfigError: it is no video, or one that is shorter than ``frames`` at ``fps``.
    """
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            count, rate = stream.frames, stream.average_rate
    except (av.error.FFmpegError, IndexError) as error:
        raise ConfigError(f"cannot read a video from {path}: {getattr(error, 'strerror', None) or error}") from error
    # A header that tells no number of frames is not held against a file.
    if count and rate and (there := math.floor((count - 0.5) / float(rate) * fps + _TIE) + 1) < frames:
        raise ConfigError(f"{path} is too short: {there} frames at {fps} a second, and {frames} are needed")


def clips(
    path: Path, *, frames: int, fps: int, height: int, width: int
) -> Iterator[UInt8[np.ndarray, "F {height} {width} 3"]]:
    """A video's whole clips one after the other; what is left at its end is dropped. Memory is one clip's.

    At each multiple of 1 / ``fps`` the frame nearest in time is taken. It is scaled to cover ``height`` x ``width`` and
    what stands over is cut off on both sides.

    Raises:
        RehyatError: the file is no video, is damaged, or has no whole clip.
    """
    clip: list[np.ndarray] = []
    made = 0
    for frame in _at_rate(path, fps):
        clip.append(_fitted(frame, height, width))
        if len(clip) == frames:
            yield np.stack(clip)
            clip, made = [], made + 1
    if not made:
        raise RehyatError(f"{path} is too short: {len(clip)} frames at {fps} a second, and {frames} are needed")


def _at_rate(path: Path, fps: int) -> Iterator[av.VideoFrame]:
    """A frame for each 1 / ``fps`` seconds."""
    shown, begin, ending, number = None, 0.0, 0.0, 0
    try:
        with av.open(str(path)) as container:
            rate = container.streams.video[0].average_rate
            for frame in container.decode(video=0):
                if shown is None:
                    begin, ending = frame.time or 0.0, 0.5 / float(rate or fps)
                else:
                    halfway = ((shown.time or 0.0) + (frame.time or 0.0)) / 2 - begin
                    while number / fps <= halfway + _TIE:
                        yield shown
                        number += 1
                shown = frame
    except (av.error.FFmpegError, IndexError) as error:
        raise RehyatError(f"cannot read a video from {path}: {getattr(error, 'strerror', None) or error}") from error
    while shown is not None and number / fps <= (shown.time or 0.0) - begin + ending + _TIE:
        yield shown
        number += 1


def _fitted(frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
    pixels = frame.to_ndarray(format="rgb24")
    if pixels.shape[:2] == (height, width):
        return pixels
    rows, columns = pixels.shape[:2]
    scale = max(height / rows, width / columns)
    kept_rows, kept_columns = height / scale, width / scale
    top, left = (rows - kept_rows) / 2, (columns - kept_columns) / 2
    box = (left, top, left + kept_columns, top + kept_rows)
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC, box=box))

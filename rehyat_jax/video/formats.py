"""Frames as files of the kind that the name says: mp4, animated WebP and GIF, a folder of PNG, raw frames to a pipe."""

from __future__ import annotations

import itertools
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedIOBase, RawIOBase
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from rehyat_jax.errors import RehyatError
from rehyat_jax.runtime import arguments
from rehyat_jax.runtime.files import cannot_write, check_new_folder, hidden, reason, whole_file
from rehyat_jax.video import io

#: "png" is a folder of numbered pictures, "raw" the frames' bytes, RGB, one after the other.
Format = Literal["mp4", "webp", "gif", "png", "raw"]
#: Milliseconds in which each kind of animation counts.
_TICKS = {"webp": 1, "gif": 10}
#: An animation is compressed as a whole: its frames are all held at once.
_MOST_ANIMATED_BYTES = 1 << 31

Blocks = UInt8[np.ndarray, "F H W 3"] | Iterable[UInt8[np.ndarray, "_F H W 3"]]


def format_of(path: str | os.PathLike[str]) -> Format:
    """What is written under this name: ``-`` raw frames, a name without an ending a folder of pictures.

    Raises:
        RehyatError: the ending is none that is written.
    """
    name = os.fspath(path)
    if name == "-":
        return "raw"
    ending = Path(name).suffix.lower().removeprefix(".")
    if not ending or name.endswith(("/", os.sep)):
        return "png"
    if ending in ("mp4", "webp", "gif"):
        return ending  # type: ignore[return-value]
    if Path(name).is_dir():
        return "png"
    raise RehyatError(f"out must end in .mp4, .webp or .gif, or name a folder of pictures or - (a pipe), not {name!r}")


def write_video(
    path: str | os.PathLike[str],
    frames: Blocks,
    *,
    fps: int = 16,
    scale: int | None = None,
    codec: io.Codec = "h264",
    metadata: Mapping[str, str] | None = None,
    quality: int = 80,
) -> None:
    """Write frames as the name says: ``a.mp4``, ``a.webp``, ``a.gif``, ``a`` (a new folder of PNGs), ``-`` (raw RGB to
    the standard output). Whole or not at all, but for a pipe.

    Args:
        frames: uint8 [F, H, W, 3], or an iterator of such blocks; all are held at once for WebP and GIF alone.
        fps: frames a second.
        scale: whole number by which each side is enlarged; when not given, an mp4's is `video.io.write_video`'s, and
            others' is 1.
        codec, metadata: of an mp4: see `video.io.write_video`.
        quality: of WebP, 0 to 100.

    Raises:
        RehyatError: a name of no known kind, frames that are none, or a file that cannot be written.
    """
    kind = format_of(path if path == "-" else arguments.user_path("path", path))
    if kind == "mp4":
        io.write_video(path, frames, fps=fps, scale=scale, codec=codec, metadata=metadata)
        return
    arguments.whole_number("fps", fps, least=1)
    arguments.whole_number("quality", quality, least=0, most=100)
    scale = 1 if scale is None else arguments.whole_number("scale", scale, least=1)
    pictures = _pictures(frames, scale, path)
    if kind == "raw":
        write_raw(sys.stdout.buffer, pictures)  # type: ignore[arg-type]
    elif kind == "png":
        _write_folder(Path(path), pictures)
    else:
        _write_animation(Path(path), pictures, kind=kind, fps=fps, quality=quality)


def write_raw(file: RawIOBase | BufferedIOBase, pictures: Iterable[UInt8[np.ndarray, "H W 3"]]) -> None:
    """Each frame's bytes as soon as it is there, rows of RGB.

    Raises:
        RehyatError: whoever reads them ended.
    """
    for count, picture in enumerate(pictures):
        try:
            left = memoryview(np.ascontiguousarray(picture).data).cast("B")
            while left:  # an unbuffered file takes what a pipe has room for
                left = left[file.write(left) or 0 :]
            file.flush()
        except BrokenPipeError as error:
            # What is still buffered would be written, and fail, when the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
            raise RehyatError(f"the reader of the pipe ended after {count} frames") from error


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside ``path`` to fill; it becomes ``path`` when the block ends well and goes when not.

    Raises:
        RehyatError: ``path`` is there and not empty, or cannot be written.
    """
    target = check_new_folder(path)
    partial = hidden(target, f"{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir()
        yield partial
        if target.exists():
            target.rmdir()  # it is empty
        os.replace(partial, target)
    except OSError as error:
        raise cannot_write(path, reason(error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_folder(path: Path, pictures: Iterable[np.ndarray]) -> None:
    with new_folder(path) as folder:
        for number, picture in enumerate(pictures):
            Image.fromarray(picture).save(folder / f"{number:06d}.png")


def _write_animation(path: Path, pictures: Iterable[np.ndarray], *, kind: str, fps: int, quality: int) -> None:
    images: list[Image.Image] = []
    size = 0
    for picture in pictures:
        size += picture.nbytes
        if size > _MOST_ANIMATED_BYTES:
            raise cannot_write(
                path, f"a {kind} is held in memory as a whole, and {len(images)} of its frames are 2 GiB: write an mp4"
            )
        images.append(Image.fromarray(picture))
    tick = _TICKS[kind]
    # Rounded so that errors do not add up: 16 frames a second are 62.5 ms each.
    places = [tick * round(1000 * number / fps / tick) for number in range(len(images) + 1)]
    durations = [after - before for before, after in itertools.pairwise(places)]
    options: dict[str, Any] = {"quality": quality, "method": 6} if kind == "webp" else {"optimize": True}
    with whole_file(path) as partial, open(partial, "wb") as file:
        try:
            images[0].save(file, kind, save_all=True, append_images=images[1:], duration=durations, loop=0, **options)
        except (ValueError, SystemError) as error:  # Pillow's encoders have no error of their own
            raise cannot_write(path, str(error)[:200]) from error


def _pictures(frames: Blocks, scale: int, path: str | os.PathLike[str]) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    shape, count = None, 0
    for block in [frames] if isinstance(frames, np.ndarray) else frames:
        io.checked_frames(block)
        if shape is not None and block.shape[1:] != shape:
            raise RehyatError(f"frames of {block.shape[1:3]} follow frames of {shape[:2]} in {os.fspath(path)}")
        shape = block.shape[1:]
        for frame in block:
            count += 1
            yield io.enlarged(frame, scale)
    if not count:
        raise RehyatError(f"cannot write {os.fspath(path)}: there are no frames")

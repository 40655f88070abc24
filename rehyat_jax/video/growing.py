"""A video file that grows: it plays at every moment, a kill leaves it sound, and another process may go on with it.

The file is a fragmented mp4 (ISO/IEC 14496-12, section 8.8): a head without frames, then fragments that each stand for
themselves. Every block of frames is encoded by an encoder of its own, begins with a key frame and becomes one fragment,
which is there as a whole or not at all, and is flushed to the disk. So nothing is carried from block to block but the
count of frames, and a file that was cut back and continued is, byte for byte, the file that was never interrupted.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8

from rehyat_jax.errors import RehyatError
from rehyat_jax.runtime.files import reason, whole_file
from rehyat_jax.video.io import Codec, Picture

#: Fragments whose times the muxer leaves as they are; no index at the end, where the next fragment will stand.
_FRAGMENTED = {
    "movflags": "empty_moov+default_base_moof+frag_discont+skip_trailer",
    "avoid_negative_ts": "disabled",
    "fflags": "+bitexact",
}
#: For packets that stand in a file already: a fragment begins with each key frame.
_FRAGMENTED_AT_KEYS = _FRAGMENTED | {"movflags": "empty_moov+default_base_moof+frag_keyframe+skip_trailer"}

#: Bytes of a box's size and name.
_BOX = 8


class GrowingVideo:
    """Appends blocks of frames to an mp4, each whole on the disk before :meth:`append` returns.

    ::

        with GrowingVideo("long.mp4") as video:
            for block in stream:
                video.append(block)

    Args:
        path: the file; missing folders are made. One that is there stays as it is until the first block, which begins
            a new video; or :meth:`go_on` with it.
        fps, scale, codec: as :func:`~rehyat_jax.video.io.write_video`.

    Raises:
        RehyatError: the file cannot be written, or another process is writing it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        fps: int = 16,
        scale: int | None = None,
        codec: Codec = "h264",
    ) -> None:
        self.path, self.frames = Path(path), 0
        self._how = {"fps": fps, "scale": scale, "codec": codec}
        self._picture: Picture | None = None
        self._fragments, self._end = 0, 0
        self._parameters: bytes | None = None
        self._head = b""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = io.FileIO(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            _lock(self._file, self.path)
        except BaseException:
            self._file.close()
            raise

    def go_on(self, *, after: int) -> None:
        """Keep this many frames of the file that is there, and append to them: the rest is cut off, a torn end too.

        Raises:
            RehyatError: none of its fragments ends there.
        """
        frames = 0
        for number, fragment in enumerate(_fragments(self._file), start=1):
            frames = fragment.frames
            if frames == after:
                self._file.truncate(fragment.end)
                self._parameters = _parameter_sets(self.path)
                self.frames, self._fragments, self._end = frames, number, fragment.end
                return
        raise RehyatError(f"cannot go on with {self.path} after {after} frames: it holds {frames}, or is cut elsewhere")

    def append(self, block: UInt8[np.ndarray, "F H W 3"]) -> None:
        """Encode a block of frames and put it on the disk, whole or not at all. A block without frames is nothing.

        Raises:
            RehyatError: the disk is full, the file was removed meanwhile, …, or the frames do not fit those before.
        """
        if not len(block):
            return
        head, fragment, parameters = self._encode(block)
        if self._parameters is None:
            self._parameters, fragment = parameters, head + fragment
        elif parameters != self._parameters:
            raise RehyatError(
                f"cannot go on with {self.path}: this encoder, or the frames' size, is not the one it was begun with"
            )
        try:
            self._file.truncate(self._end)
            self._write(fragment)
            os.fsync(self._file.fileno())
            if not os.fstat(self._file.fileno()).st_nlink:
                raise FileNotFoundError(errno.ENOENT, "it was removed meanwhile")
        except BaseException as error:
            with suppress(OSError):  # back to the last whole fragment
                self._file.truncate(self._end)
            if isinstance(error, OSError):
                raise self._unwritable(error) from error
            raise
        self._end += len(fragment)
        self._fragments += 1
        self.frames += len(block)

    @property
    def size(self) -> int:
        """Bytes up to the end of the last whole fragment."""
        return self._end

    @property
    def head(self) -> bytes:
        """What stands before the first fragment, and a player must have before any; empty before the first block."""
        if not self._end:
            return b""
        if not self._head:
            start = next(box.start for box in _boxes(self._file, 0, self._end) if box.kind == b"moof")
            self._file.seek(0)
            self._head = self._file.read(start)
        return self._head

    @property
    def codec(self) -> str | None:
        """As browsers name the codec, ``avc1.PPCCLL`` (RFC 6381); None before the first block, or of another codec."""
        sets = self._parameters
        return f"avc1.{sets[1:4].hex()}" if sets and sets[0] == 1 and self._how["codec"] == "h264" else None

    def cut(self, *, after: int) -> None:
        """Drop what was appended beyond so many frames, 0 for all, and append there.

        Raises:
            RehyatError: none of the fragments ends there.
        """
        if after:
            return self.go_on(after=after)
        self._file.truncate(0)
        self.frames, self._fragments, self._end = 0, 0, 0
        self._parameters, self._head = None, b""

    def close(self) -> None:
        """Let other processes write the file. One that is still empty is removed."""
        with suppress(OSError):
            if not self._file.closed and os.fstat(self._file.fileno()).st_size == 0:
                self.path.unlink()
        self._file.close()

    def __enter__(self) -> GrowingVideo:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _encode(self, block: UInt8[np.ndarray, "F H W 3"]) -> tuple[bytes, bytes, bytes | None]:
        """The file's head, the fragment, and the encoder's parameter sets, which the head holds."""
        picture = self._picture = self._picture or Picture.of(block, **self._how)  # type: ignore[arg-type]
        file, number = io.BytesIO(), str(self._fragments + 1)
        with av.open(file, "w", format="mp4", options=_FRAGMENTED | {"fragment_index": number}) as container:
            # Without B-frames a packet's times are its frame's.
            stream = picture.add_stream(container, bf="0")
            for index, frame in enumerate(block, start=self.frames):
                image = picture.image(frame)
                image.pts = index
                container.mux(stream.encode(image))
            container.mux(stream.encode())
        whole = file.getvalue()
        file.seek(0)
        parameters = _parameter_sets(file)
        start = next(box.start for box in _boxes(file, 0, len(whole)) if box.kind == b"moof")
        return whole[:start], whole[start:], parameters

    def _write(self, data: bytes) -> None:
        """What begins a box is written last: until then all that is new is a box without a name, which players skip."""
        for start, part in ((_BOX, data[_BOX:]), (0, data[:_BOX])):
            view = memoryview(part)
            self._file.seek(self._end + start)
            while view:  # an unbuffered write may take a part
                view = view[self._file.write(view) :]

    def _unwritable(self, error: OSError) -> RehyatError:
        why = "it was removed meanwhile" if error.errno == errno.ENOENT else reason(error)
        return RehyatError(f"cannot write {self.path}: {why}")


def whole_frames(path: str | os.PathLike[str]) -> Iterator[int]:
    """Number of frames up to the end of each whole fragment of a growing video, in order; of a missing file none."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        for fragment in _fragments(file):
            yield fragment.frames


def finish_video(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """An ordinary mp4, with an index and a length, of a growing one: the same packets, none encoded again.

    Raises:
        RehyatError: it cannot be read or written.
    """
    _copy_packets(source, target, {"fflags": "+bitexact"})


def reopen_video(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """The reverse of :func:`finish_video`: what :class:`GrowingVideo` may go on with, of what it made.

    Raises:
        RehyatError: it cannot be read or written.
    """
    _copy_packets(source, target, _FRAGMENTED_AT_KEYS)


def spaced_frames(path: str | os.PathLike[str], *, count: int, fps: int) -> UInt8[np.ndarray, "F H W 3"]:
    """Up to ``count`` frames of a finished video, evenly spaced in time, first and last among them, read by seeking.

    Raises:
        RehyatError: the file is missing or is no video.
    """
    chosen: list[np.ndarray] = []
    try:
        with av.open(os.fspath(path)) as container:
            stream = container.streams.video[0]
            assert stream.time_base is not None
            ticks = 1 / (fps * stream.time_base)  # of one frame
            for index in np.unique(np.linspace(0, stream.frames - 1, count).round().astype(int)):
                wanted = int(index * ticks)
                container.seek(wanted, stream=stream)
                frames = (frame for frame in container.decode(stream) if frame.pts is not None)
                chosen.append(next(frame for frame in frames if frame.pts >= wanted).to_ndarray(format="rgb24"))
    except (av.error.FFmpegError, IndexError, StopIteration) as error:
        raise RehyatError(f"cannot read a video from {path}: {getattr(error, 'strerror', None) or error}") from error
    return np.stack(chosen)


def _copy_packets(source: str | os.PathLike[str], target: str | os.PathLike[str], options: dict[str, str]) -> None:
    try:
        with whole_file(target) as partial, av.open(os.fspath(source)) as given:
            stream = given.streams.video[0]
            with av.open(os.fspath(partial), "w", format="mp4", options=options) as made:
                copy = made.add_stream_from_template(stream)
                for packet in given.demux(stream):
                    if packet.dts is not None:  # the last one marks the end
                        packet.stream = copy
                        made.mux(packet)
    except (av.error.InvalidDataError, IndexError) as error:
        raise RehyatError(f"cannot read a video from {source}: {error}") from error


def _parameter_sets(file: Path | io.BytesIO) -> bytes | None:
    """What a decoder must know before the first frame, as the head of the file says it."""
    try:
        with av.open(os.fspath(file) if isinstance(file, Path) else file) as container:
            return container.streams.video[0].codec_context.extradata
    except (av.error.FFmpegError, IndexError) as error:
        raise RehyatError(f"cannot go on with {file}: it is no video ({getattr(error, 'strerror', error)})") from error


def _lock(file: io.FileIO, path: Path) -> None:
    """Held until the file is closed or the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # where there are no such locks
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RehyatError(f"cannot write {path}: another process is writing it") from None
    except OSError:  # a file system without locks
        return


@dataclasses.dataclass(frozen=True)
class _Box:
    kind: bytes
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class _Fragment:
    """Its end in bytes, and the number of frames up to there."""

    end: int
    frames: int


def _boxes(file: io.IOBase, start: int, end: int) -> Iterator[_Box]:
    """The whole boxes between two places of a file."""
    while start + _BOX <= end:
        file.seek(start)
        size, kind = struct.unpack(">I4s", file.read(_BOX))
        if size < _BOX or start + size > end:
            return
        yield _Box(kind, start, start + size)
        start += size


def _inside(file: io.IOBase, box: _Box, kind: bytes) -> Iterator[_Box]:
    return (inner for inner in _boxes(file, box.start + _BOX, box.end) if inner.kind == kind)


def _fragments(file: io.IOBase) -> Iterator[_Fragment]:
    """The whole fragments from the beginning; whatever follows the last one is torn."""
    frames = 0
    for box in _boxes(file, 0, file.seek(0, os.SEEK_END)):
        if box.kind == b"moof":
            frames += sum(
                _samples(file, run) for track in _inside(file, box, b"traf") for run in _inside(file, track, b"trun")
            )
        elif box.kind == b"mdat":
            yield _Fragment(box.end, frames)


def _samples(file: io.IOBase, run: _Box) -> int:
    """The sample count of a track run; version and flags stand before it."""
    file.seek(run.start + 12)
    return int.from_bytes(file.read(4))

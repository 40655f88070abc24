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
from collections.abc import Iterator, Mapping
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8

from rehyat_jax.errors import RehyatError
from rehyat_jax.runtime.files import partial_file, reason, whole_file
from rehyat_jax.video import colour
from rehyat_jax.video.boxes import BOX, boxes, chapter_box, fragments
from rehyat_jax.video.containers import address, opened_video, unreadable
from rehyat_jax.video.io import FREE_NAMES, Codec, Picture

#: Fragments whose times the muxer leaves as they are; no index at the end, where the next fragment will stand.
_FRAGMENTED = {
    "movflags": "empty_moov+default_base_moof+frag_discont+skip_trailer+use_metadata_tags",
    "avoid_negative_ts": "disabled",
    "fflags": "+bitexact",
}
#: For packets that stand in a file already: a fragment begins with each key frame.
_FRAGMENTED_AT_KEYS = _FRAGMENTED | {
    "movflags": "empty_moov+default_base_moof+frag_keyframe+skip_trailer+use_metadata_tags"
}
#: What a reader adds to a file's own metadata.
_BRANDS = {"major_brand", "minor_version", "compatible_brands", "encoder"}


class GrowingVideo:
    """Appends blocks of frames to an mp4, each whole on the disk before :meth:`append` returns.

    ::

        with GrowingVideo("long.mp4") as video:
            for block in stream:
                video.append(block)

    Args:
        path: the file; missing folders are made. One that is there stays as it is until the first block, which begins
            a new video; or :meth:`go_on` with it.
        fps, scale, codec, metadata: as :func:`~rehyat_jax.video.io.write_video`.

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
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path, self.frames = Path(path), 0
        self._metadata = dict(metadata or {})
        self._chapter: str | None = None
        self._next_chapter: str | None = None
        self._how = {"fps": fps, "scale": scale, "codec": codec}
        self._picture: Picture | None = None
        self._tagged = True
        self._fragments, self._end = 0, 0
        self._parameters: bytes | None = None
        self._head = b""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
            self._file = io.FileIO(os.open(self.path, flags, 0o666), "r+")
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            _lock(self._file, self.path)
        except BaseException:
            self._file.close()
            raise

    def go_on(self, *, after: int) -> None:
        """Keep this many frames of the file that is there, and append to them: the rest is cut off, a torn end too.

        A file that was begun before colours were tagged goes on without tags and chapters, as it was begun.

        Raises:
            RehyatError: none of its fragments ends there.
        """
        frames, self._chapter = 0, None
        for number, fragment in enumerate(fragments(self._file), start=1):
            frames, self._chapter = fragment.frames, fragment.chapter or self._chapter
            if frames == after:
                self._file.truncate(fragment.end)
                self._parameters, self._tagged = _begun_with(self.path)
                self.frames, self._fragments, self._end = frames, number, fragment.end
                return
        raise RehyatError(f"cannot go on with {self.path} after {after} frames: it holds {frames}, or is cut elsewhere")

    def begin_chapter(self, title: str) -> None:
        """Say what the blocks from here on show: a chapter of this title begins, unless it is under way already."""
        self._next_chapter = title

    def append(self, block: UInt8[np.ndarray, "F H W 3"]) -> None:
        """Encode a block of frames and put it on the disk, whole or not at all. A block without frames is nothing.

        Raises:
            RehyatError: the disk is full, the file was removed meanwhile, …, or the frames do not fit those before.
        """
        if not len(block):
            return
        head, fragment, parameters = self._encode(block)
        chapter = self._next_chapter
        if chapter is not None and chapter != self._chapter and self._tagged:
            fragment = chapter_box(chapter) + fragment
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
        self._chapter = chapter or self._chapter

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
            end = next(box.end for box in boxes(self._file, 0, self._end) if box.kind == b"moov")
            self._file.seek(0)
            self._head = self._file.read(end)
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
        self._picture, self._tagged, self._chapter = None, True, None

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
        picture = self._picture = self._picture or dataclasses.replace(
            Picture.of(block, **self._how),  # type: ignore[arg-type]
            tagged=self._tagged,
        )
        file, number = io.BytesIO(), str(self._fragments + 1)
        with av.open(file, "w", format="mp4", options=_FRAGMENTED | {"fragment_index": number}) as container:
            container.metadata.update(self._metadata)
            # Without B-frames a packet's times are its frame's.
            stream = picture.add_stream(container, bf="0")
            for index, frame in enumerate(block, start=self.frames):
                image = picture.image(frame)
                image.pts = index
                container.mux(stream.encode(image))
            container.mux(stream.encode())
        whole = file.getvalue()
        file.seek(0)
        parameters, _ = _begun_with(file)
        start = next(box.start for box in boxes(file, 0, len(whole)) if box.kind == b"moof")
        return whole[:start], whole[start:], parameters

    def _write(self, data: bytes) -> None:
        """What begins a box is written last: until then all that is new is a box without a name, which players skip."""
        for start, part in ((BOX, data[BOX:]), (0, data[:BOX])):
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
        for fragment in fragments(file):
            yield fragment.frames


def finish_video(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None
) -> None:
    """An ordinary mp4, with an index, a length and chapters, of a growing one: the same packets, none encoded again.

    Args:
        metadata: beside what the growing one has, or in its place.

    Raises:
        RehyatError: it cannot be read or written.
    """
    with whole_file(target) as partial:
        how = FREE_NAMES | {"fflags": "+bitexact"}
        _copy_packets(source, partial, how, chapters=_chapters(source), metadata=metadata)


def reopen_video(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """The reverse of :func:`finish_video`: what :class:`GrowingVideo` may go on with, of what it made.

    Raises:
        RehyatError: it cannot be read or written.
    """
    with opened_video(source) as video:
        rate = video.stream.average_rate or Fraction(1)
        titles = {
            round(chapter["start"] * (chapter["time_base"] or 1) * rate): chapter["metadata"].get("title", "")
            for chapter in video.container.chapters()
        }
    with whole_file(target) as made, partial_file(target) as plain:
        _copy_packets(source, plain, _FRAGMENTED_AT_KEYS, chapters=[])
        with open(plain, "rb") as given, open(made, "wb") as file:
            begin = frames = 0
            for fragment in fragments(given):
                start = next(box.start for box in boxes(given, begin, fragment.end) if box.kind == b"moof")
                _copy_bytes(given, file, begin, start)
                if frames in titles:
                    file.write(chapter_box(titles[frames]))
                _copy_bytes(given, file, start, fragment.end)
                begin, frames = fragment.end, fragment.frames


def spaced_frames(path: str | os.PathLike[str], *, count: int, fps: int) -> UInt8[np.ndarray, "F H W 3"]:
    """Up to ``count`` frames of a finished video, evenly spaced in time, first and last among them, read by seeking.

    Raises:
        RehyatError: the file is missing or is no video.
    """
    chosen: list[np.ndarray] = []
    with opened_video(path) as video:
        stream = video.stream
        assert stream.time_base is not None
        ticks = 1 / (fps * stream.time_base)  # of one frame
        for index in np.unique(np.linspace(0, stream.frames - 1, count).round().astype(int)):
            wanted = int(index * ticks)
            video.container.seek(wanted, stream=stream)
            frames = (frame for frame in video.container.decode(stream) if frame.pts is not None)
            frame = next((frame for frame in frames if frame.pts >= wanted), None)
            if frame is None:
                raise unreadable(path, f"it has no frame {index}")
            chosen.append(colour.to_rgb(frame))
    return np.stack(chosen)


def _chapters(path: str | os.PathLike[str]) -> list[av.container.core.Chapter]:
    """A growing video's, each up to the next or to the end."""
    with opened_video(path) as video, open(path, "rb") as file:
        step = 1 / (video.stream.average_rate or Fraction(1))
        parts = list(fragments(file))
    starts = [0, *(part.frames for part in parts)]
    begun = [(start, part.chapter) for start, part in zip(starts, parts, strict=False) if part.chapter is not None]
    ends = [*(start for start, _ in begun[1:]), starts[-1]]
    return [
        {"id": number, "start": start, "end": end, "time_base": step, "metadata": {"title": title or ""}}
        for number, ((start, title), end) in enumerate(zip(begun, ends, strict=False))
    ]


def _copy_packets(
    source: str | os.PathLike[str],
    partial: Path,
    options: dict[str, str],
    *,
    chapters: list[av.container.core.Chapter],
    metadata: Mapping[str, str] | None = None,
) -> None:
    with opened_video(source) as given, av.open(address(partial), "w", format="mp4", options=options) as made:
        made.metadata.update({name: text for name, text in given.container.metadata.items() if name not in _BRANDS})
        made.metadata.update(metadata or {})
        made.set_chapters(chapters)
        copy = made.add_stream_from_template(given.stream)
        for packet in given.container.demux(given.stream):
            if packet.dts is not None:  # the last one marks the end
                packet.stream = copy
                made.mux(packet)


def _copy_bytes(given: io.BufferedReader, file: io.BufferedWriter, start: int, end: int) -> None:
    given.seek(start)
    while (left := end - given.tell()) > 0:
        file.write(given.read(min(left, 1 << 20)))


def _begun_with(file: Path | io.BytesIO) -> tuple[bytes | None, bool]:
    """What a decoder must know before the first frame, as the head of the file says it; whether colours are told."""
    try:
        with av.open(address(file) if isinstance(file, Path) else file) as container:
            context = container.streams.video[0].codec_context
            return context.extradata, colour.is_tagged(context)
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

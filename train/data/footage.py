"""Videos with captions: which there are, in a folder or a list, and which of them cannot be used."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from rehyat_jax.errors import ConfigError
from rehyat_jax.runtime.files import reason
from rehyat_jax.text.files import read_text
from train.data.captions import LISTS, read_list

#: Endings of files that are videos.
SUFFIXES = tuple(
    ".3gp .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv".split()  # noqa: SIM905
)
#: Endings of files that are a video's frames: a folder of them is a video.
PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class Footage(NamedTuple):
    """A video (a file, or a folder of numbered pictures) and its caption."""

    path: Path
    caption: str
    #: Its path within the source folder, or its whole path where it lies elsewhere.
    name: str
    #: Bytes and time of the last change, in nanoseconds: while they are the same, so is the content.
    size: int
    modified: int


class Unusable(NamedTuple):
    """A video that is passed over, and why."""

    name: str
    reason: str
    #: Of the file, as `Footage`'s, where there is one: while they are the same, it need not be tried again.
    size: int = -1
    modified: int = -1


class Found(NamedTuple):
    """What a source holds."""

    footage: tuple[Footage, ...]
    unusable: tuple[Unusable, ...]
    #: Videos of the folder that its list does not name.
    unlisted: int


def find_footage(
    folder: Path,
    *,
    captions: Path | None = None,
    file_column: str = "file_name",
    caption_column: str = "caption",
) -> Found:
    """The videos of a folder in the order of their names or, where there is a list, of its entries.

    Linked files and folders count as what they lead to. Hidden files and folders (``.…``, among them the ``._…`` of
    macOS) do not count.

    Args:
        captions: the list; none: the first of `train.data.captions.LISTS` in the folder or, without one, for each video
            the text file of the same name beside it.

    Raises:
        ConfigError: there is no video at all, or the list cannot be read.
    """
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}")
    there = sorted(_videos(folder))
    captions = captions or next((path for name in LISTS if (path := folder / name).is_file()), None)
    usable: list[Footage] = []
    unusable: list[Unusable] = []
    if captions is None:
        pairs: Iterable[tuple[Path, str, str | ConfigError]] = ((path, str(path), _beside(path)) for path in there)
    else:
        rows = read_list(captions, file_column=file_column, caption_column=caption_column)
        pairs = [_listed(folder, row, file_column, caption_column) for row in rows]
        listed = {_real(path) for path, _, _ in pairs}
        there = [path for path in there if _real(path) not in listed]
    for path, said, caption in pairs:
        name = _name(folder, path)
        try:
            if isinstance(caption, ConfigError):
                raise caption
            size, modified = size_and_time(path)
            usable.append(Footage(path, caption, name, size, modified))
        except OSError as error:
            unusable.append(Unusable(name, f"{said} cannot be read: {reason(error)}"))
        except ConfigError as error:
            unusable.append(Unusable(name, str(error)))
    if not usable and not unusable:
        raise ConfigError(
            f"{captions or folder} has no videos ({', '.join(SUFFIXES)}, or folders of numbered pictures)"
        )
    return Found(tuple(usable), tuple(unusable), 0 if captions is None else len(there))


def pictures(folder: Path) -> list[Path]:
    """The pictures of a folder that is a video, in the order of their numbers; none where it is something else."""
    found: list[tuple[int, Path]] = []
    for path in folder.iterdir():
        if path.name.startswith(".") or path.suffix.lower() not in PICTURES:
            continue
        if not (number := re.search(r"(\d+)$", path.stem)):
            return []
        found.append((int(number[1]), path))
    return [path for _, path in sorted(found)]


def content_digest(path: Path) -> str:
    """Of a video's bytes, wherever it lies and whatever its name.

    Raises:
        OSError: it cannot be read.
    """
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    whole = hashlib.sha256()
    for picture in pictures(path):
        whole.update(bytes.fromhex(content_digest(picture)))
    return whole.hexdigest()


def _videos(folder: Path) -> Iterator[Path]:
    """Of a folder and all within it; a folder that links lead to twice counts once."""
    seen: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_unreadable):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        here = Path(place)
        films = [here / name for name in files if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES]
        yield from films
        if not films and here != folder and len(pictures(here)) > 1:
            yield here


def _unreadable(error: OSError) -> None:
    raise ConfigError(f"cannot read {error.filename}: {reason(error)}") from error


def _real(path: Path) -> str:
    return os.path.realpath(path)


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()


def size_and_time(path: Path) -> tuple[int, int]:
    """A video's bytes, and the time of its last change in nanoseconds.

    Raises:
        OSError: it cannot be read.
    """
    if not path.is_dir():
        status = path.stat()
        return status.st_size, status.st_mtime_ns
    each = [picture.stat() for picture in pictures(path)]
    return sum(status.st_size for status in each), max((status.st_mtime_ns for status in each), default=0)


def _listed(folder: Path, row: tuple, file_column: str, caption_column: str) -> tuple[Path, str, str | ConfigError]:
    where, file, caption = row
    if not file or "\0" in file:
        return folder / where, where, ConfigError(f'{where} is not {{"{file_column}": …, "{caption_column}": …}}')
    path = folder / file  # an absolute path stays as it is
    if not os.path.exists(path):  # what no file can be called does not exist either
        return path, where, ConfigError(f"{where} names {file}, which is not there")
    if path.is_dir() and not pictures(path):
        return path, where, ConfigError(f"{where} names {file}, a folder without numbered pictures")
    if caption is None:
        return path, where, ConfigError(f'{where} is not {{"{file_column}": …, "{caption_column}": …}}')
    if not caption.strip():
        return path, where, ConfigError(f"{where} has no caption for {file}")
    return path, where, caption.strip()


def _beside(path: Path) -> str | ConfigError:
    text = path.with_name(f"{path.name}.txt") if path.is_dir() else path.with_suffix(".txt")
    if not text.is_file():
        return ConfigError(f"{path} has no caption: there is no {text.name} beside it")
    try:
        caption = read_text(text).strip()
    except ConfigError as error:
        return error
    return caption or ConfigError(f"{path} has no caption: {text.name} is empty")

"""Files that appear whole or not at all, and failures to write told in one sentence."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rehyat_jax.errors import RehyatError, RehyatWarning

_REASONS = {
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than this disk or a limit allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "a part of the path is a file, not a folder",
    errno.ENOENT: "the folder does not exist",
    errno.EISDIR: "it is a folder",
    errno.ENAMETOOLONG: "the name is too long",
}
#: A hidden name keeps so much of the name that it stands for: with what is added, no file system finds it too long.
_KEPT = 40
_PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{8}\.partial", re.DOTALL)


def reason(error: OSError) -> str:
    """Why an operation on a file failed, in words."""
    return _REASONS.get(error.errno or 0) or error.strerror or str(error)


def cannot_write(path: str | os.PathLike[str], why: str) -> RehyatError:
    return RehyatError(f"cannot write {os.fspath(path)}: {why}")


def real_path(path: str | os.PathLike[str]) -> Path:
    """Where a path leads: what is written replaces a link's target, not the link, and is made on the target's disk."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)


@contextmanager
def partial_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty file beside ``path``, on its disk, to write to; whatever is left of it at the end is removed.

    Missing parent folders are made.

    Raises:
        RehyatError: the file cannot be written (full disk, read-only folder, a folder of that name, …).
    """
    path = Path(path)
    partial = hidden(path, f"{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_kind(path)
        partial.touch(exist_ok=False)
        yield partial
    except OSError as error:
        raise cannot_write(path, reason(error)) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A partial name beside ``path`` to write to; it becomes ``path`` when the block ends well and is removed when not.

    An interrupt counts as not ending well; a file already at ``path`` stays as it was until the rename. Where ``path``
    is a link, the file that it leads to is replaced.

    Raises:
        RehyatError: as :func:`partial_file`.
    """
    target = real_path(path)
    with partial_file(target) as partial:
        yield partial
        os.replace(partial, target)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Learn before long work, not after it, that ``path`` cannot be written: its folder, its kind and its very name.

    Raises:
        RehyatError: as :func:`whole_file`.
    """
    target = real_path(path)
    with partial_file(target), suppress(FileExistsError):
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        target.unlink()


def check_new_folder(path: str | os.PathLike[str]) -> Path:
    """Learn before long work that a folder cannot be made under this name, complete and at once.

    Returns:
        Where it is to be made: what ``path`` leads to.

    Raises:
        RehyatError: it is the working folder, a mount point, a file, not empty, or cannot be written.
    """
    target = Path(os.path.realpath(path))
    try:
        if target.exists():
            if not target.is_dir():
                raise cannot_write(path, "it is a file, not a folder")
            if target == Path.cwd() or target in Path.cwd().parents:
                raise cannot_write(path, "it is the folder that this command runs in: name a new one")
            if _is_mounted(target):
                raise cannot_write(path, "a disk is mounted there, which cannot be renamed: name a folder in it")
            if any(target.iterdir()):
                raise cannot_write(path, "it exists and is not empty: name a new folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        trial = hidden(target, f"{secrets.token_hex(4)}.partial")
        trial.mkdir()
        trial.rmdir()
        if not target.exists():
            target.mkdir()
            target.rmdir()
    except OSError as error:
        raise cannot_write(path, reason(error)) from error
    return target


def check_room(path: str | os.PathLike[str], *, size: int, what: str, certain: bool = True) -> None:
    """Ask for the disk's room before work whose result would not fit.

    Args:
        path: what is to be written; it need not exist.
        size: in bytes, beside what is there already.
        what: its name in the sentence, as "the checkpoint".
        certain: the size is known; else an estimate, and too little room is a warning.

    Raises:
        RehyatError: there is less room than a certain size.

    Warns:
        RehyatWarning: there may be too little.
    """
    folder = Path(os.path.realpath(path))
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        warnings.warn(f"how much room {folder} has is not known ({reason(error)})", RehyatWarning, stacklevel=2)
        return
    if free >= size:
        return
    said = f"{what} {'needs' if certain else 'may need'} {human_size(size)}, and {folder} has {human_size(free)} left"
    if certain:
        raise cannot_write(path, said)
    warnings.warn(said, RehyatWarning, stacklevel=2)


def human_size(size: float | int) -> str:
    """Bytes as people say them: 1.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Remove what runs that were killed left beside ``path``; to be called by its one owner.

    Warns:
        RehyatWarning: each file or folder that was removed, and its size.
    """
    path = real_path(path)
    pattern = re.compile(re.escape(hidden(path, "").name) + r"[0-9a-f]{8}\.partial")
    with suppress(OSError):
        for left in [entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name)]:
            folder = left.is_dir() and not left.is_symlink()
            files = [file for file in left.rglob("*") if file.is_file()] if folder else [left]
            size = sum(file.lstat().st_size for file in files)
            if folder:
                shutil.rmtree(left)
            else:
                left.unlink()
            warnings.warn(
                f"removed {left}, which a run that was killed left ({human_size(size)})", RehyatWarning, stacklevel=2
            )


def hidden(path: Path, ending: str) -> Path:
    """A hidden name beside ``path`` that is its alone; beside a partial name, that of the file it is to become."""
    partial = _PARTIAL.fullmatch(path.name)
    if partial:
        return path.parent / f".{partial[1]}.{ending}"
    name = path.name
    if len(name.encode()) > _KEPT:
        name = f"{name[: _KEPT // 4]}~{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"
    return path.parent / f".{name}.{ending}"


def sample_digest(path: Path, *, count: int = 64) -> bytes:
    """A file's size and enough of its bytes to tell it from another: all of a small one, of a large one ``count``
    megabytes (two at least)."""
    size, block = path.stat().st_size, 1 << 20
    apart = max(block, (size - block) // (count - 1))
    starts = range(0, size if apart == block else size - block + 1, apart)
    digest = hashlib.sha256(f"{path.name} {size}".encode())
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(block))
    return digest.digest()


def _is_mounted(path: Path) -> bool:
    """Whether something is mounted at this very name, which can then not be renamed."""
    if os.path.ismount(path):
        return True
    try:  # a file or a folder of the same disk is told by Linux's own list alone
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    name = re.sub(r"[ \t\n\\]", lambda match: f"\\{ord(match[0]):03o}", os.path.realpath(path))
    return any(line.split(" ")[4] == name for line in mounts)


def _check_kind(path: Path) -> None:
    """
    Raises:
        OSError: the name cannot be looked up.
        RehyatError: something is there that no file may replace.
    """
    if not path.name:
        raise cannot_write(path, "it is a folder")
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "")
    if not stat.S_ISREG(mode):
        raise cannot_write(path, "it is a device, not a file")
    if _is_mounted(path):
        raise cannot_write(path, "it is mounted from elsewhere and cannot be replaced")

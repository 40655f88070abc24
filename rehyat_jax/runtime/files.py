"""Files that appear whole or not at all, and failures to write told in one sentence."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rehyat_jax.errors import RehyatError

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


def reason(error: OSError) -> str:
    """Why an operation on a file failed, in words."""
    return _REASONS.get(error.errno or 0) or error.strerror or str(error)


@contextmanager
def partial_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty file beside ``path``, on its disk, to write to; whatever is left of it at the end is removed.

    Missing parent folders are made.

    Raises:
        RehyatError: the file cannot be written (full disk, read-only folder, a folder of that name, …).
    """
    path = Path(path)
    partial = path.parent / f".{path.name[:40]}.{secrets.token_hex(4)}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "")
        partial.touch(exist_ok=False)
        yield partial
    except OSError as error:
        raise RehyatError(f"cannot write {path}: {reason(error)}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A partial name beside ``path`` to write to; it becomes ``path`` when the block ends well and is removed when not.

    An interrupt counts as not ending well; a file already at ``path`` stays as it was until the rename. Where ``path``
    is a link, the file that it leads to is replaced, and the partial lies beside that one.

    Raises:
        RehyatError: as :func:`partial_file`.
    """
    target = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    with partial_file(target) as partial:
        yield partial
        os.replace(partial, target)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Learn before long work, not after it, that ``path`` cannot be written.

    Raises:
        RehyatError: as :func:`whole_file`.
    """
    try:
        with whole_file(path):
            raise _OnlyAsking
    except _OnlyAsking:
        pass


class _OnlyAsking(Exception):
    """Ends a trial before the rename."""


def sample_digest(path: Path) -> bytes:
    """A file's size and enough of its bytes to tell it from another: all of a small one, samples of a large one."""
    size, block, count = path.stat().st_size, 1 << 20, 64
    apart = max(block, (size - block) // (count - 1))
    starts = range(0, size if apart == block else size - block + 1, apart)
    digest = hashlib.sha256(f"{path.name} {size}".encode())
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(block))
    return digest.digest()

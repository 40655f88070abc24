"""Whose an output is: one process writes it at a time, and nothing is replaced that was not made for it."""

from __future__ import annotations

import datetime
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock

from rehyat_jax.errors import RehyatError
from rehyat_jax.runtime.files import cannot_write, check_writable, hidden, real_path, reason, remove_leftovers

#: What a file beside an output says of itself: who made it, and for which output.
MADE_BY, MADE_FOR = "made_by", "made_for"
_PROGRAM = "rehyat"
#: A lock file can go while it is being opened, when its owner ends: then the next one is tried.
_TRIES = 100


def marker(output: str | os.PathLike[str]) -> dict[str, str]:
    """The entries that a file beside ``output`` carries, in its JSON or in a PNG's texts."""
    return {MADE_BY: _PROGRAM, MADE_FOR: Path(output).name}


@contextmanager
def owned_output(
    path: str | os.PathLike[str],
    *,
    command: str,
    beside: Sequence[str | os.PathLike[str]] = (),
    overwrite: bool = False,
    resume: bool = False,
    otherwise: str = "",
    is_folder: bool = False,
) -> Iterator[None]:
    """Own a file or a folder, and the files beside it, from before the first byte to the last.

    Args:
        path: the output.
        command: what makes it, as "rehyat generate"; told to whoever finds it locked.
        beside: files that are written with it; each must be missing, empty or marked as made for this output.
        overwrite: replace an output that is there.
        resume: go on with an output that is there.
        is_folder: the output is a folder; whether it may be written is the caller's to check.
        otherwise: what else the user may do about one that is there; it ends the sentence.

    Raises:
        RehyatError: it cannot be written, exists already, is another process's, or a file beside it is not ours.
    """
    for each in beside if is_folder else (path, *beside):
        check_writable(each)
    with locked(path, command=command):
        if not (overwrite or resume or is_folder) and _holds_something(path):
            raise RehyatError(f"{os.fspath(path)} exists already: --overwrite replaces it{otherwise}")
        check_ours(path, beside=beside)
        for each in (path, *beside):
            remove_leftovers(each)
        yield


def check_ours(path: str | os.PathLike[str], *, beside: Sequence[str | os.PathLike[str]]) -> None:
    """
    Raises:
        RehyatError: a file beside the output is there and was not made for it.
    """
    for each in beside:
        if _holds_something(each) and not _made_for(Path(each), Path(path)):
            raise RehyatError(
                f"{os.fspath(each)} would be replaced, and was not made by {_PROGRAM} for {Path(path).name}: move it, "
                "or choose another name for the output"
            )


@contextmanager
def locked(path: str | os.PathLike[str], *, command: str) -> Iterator[None]:
    """Let no other process write ``path``, a file or a folder, until the block or the process ends, however it ends.

    The lock is a file beside it that is locked as a whole, on network file systems too.

    Raises:
        RehyatError: another process has it: which, on which host; or the lock file cannot be written.
    """
    path = real_path(path)
    file = hidden(path, "lock")
    lock = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(_TRIES):
            with suppress(_Gone):
                lock = _taken(file, command)
                break
    except filelock.Timeout:
        raise cannot_write(path, f"another process is writing it{_holder(file)}") from None
    except OSError as error:
        raise cannot_write(path, reason(error)) from error
    if lock is None:
        raise cannot_write(path, "another process is writing it")
    try:
        yield
    finally:
        # While it is still ours: whoever opened it before sees that it is gone.
        with suppress(OSError):
            file.unlink()
        lock.release()
        with suppress(OSError):  # where open files cannot be removed
            if os.name == "nt":
                file.unlink()


class _Gone(Exception):
    """The lock file was removed by its owner between its opening and its locking."""


def _taken(file: Path, command: str) -> filelock.BaseFileLock:
    def sign(descriptor: int) -> None:
        try:
            there = os.stat(file)
        except FileNotFoundError:
            raise _Gone from None
        if not os.path.samestat(os.fstat(descriptor), there):
            raise _Gone
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        told = {"process": os.getpid(), "host": socket.gethostname(), "command": command, "since": now}
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, json.dumps(told).encode())

    lock = filelock.FileLock(file, timeout=0, thread_local=False, on_acquired=sign)
    lock.acquire()
    return lock


def _holder(file: Path) -> str:
    with suppress(OSError, ValueError, KeyError, TypeError):
        told = json.loads(file.read_text(encoding="utf-8"))
        return f": process {told['process']} on {told['host']} ({told['command']}, since {told['since']})"
    return ""


def _holds_something(path: str | os.PathLike[str]) -> bool:
    with suppress(OSError):
        return os.stat(path).st_size > 0
    return False


def _made_for(path: Path, output: Path) -> bool:
    """Its marker says so; a record of before there were markers says which command made it, and of what."""
    told = _png_texts(path) if path.suffix.lower() == ".png" else _json(path)
    if MADE_BY in told:
        return told.get(MADE_BY) == _PROGRAM and told.get(MADE_FOR) == output.name
    settings = told.get("settings")
    if not str(told.get("command", "")).startswith(f"{_PROGRAM} ") or not isinstance(settings, Mapping):
        return False
    return any(isinstance(value, str) and Path(value).name == output.name for value in settings.values())


def _json(path: Path) -> Mapping[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        told = json.loads(path.read_text(encoding="utf-8"))
        return told if isinstance(told, Mapping) else {}
    return {}


def _png_texts(path: Path) -> Mapping[str, Any]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return {str(name): value for name, value in image.info.items()}
    except Exception:  # whatever it is, it is no picture of ours
        return {}

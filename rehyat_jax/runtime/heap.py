"""This process's heap, for programs that run for days: few gaps in it, freed pages given back, and how much it holds.

A stream makes and drops arrays of megabytes for as long as it is watched. What is in use does not grow; resident memory
does, by two ways of glibc: each thread that allocates has an arena of its own, whose gaps no other thread fills, and
what is freed between arrays that live on stays resident.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

_C = ctypes.CDLL(None) if sys.platform == "linux" else None
#: Of ``mallopt`` (glibc's malloc.h).
_ARENA_MAX = -8


#: Of ``struct mallinfo2`` (the same file, from 2.33 on), in their order.
_COUNTS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _COUNTS]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heap:
    """Bytes of this process.

    Attributes:
        resident: in the machine's memory, files' pages among them.
        used: that were asked of the C library and not freed.
        free: that the C library holds; those that it has given back are among them and not resident.
    """

    resident: int
    used: int
    free: int


def heap() -> Heap | None:
    """None where the system does not tell it: another than Linux, another C library, one of before 2.33."""
    info = getattr(_C, "mallinfo2", None)
    if info is None:
        return None
    info.restype = _Info
    with suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        told = info()
        return Heap(resident=pages * os.sysconf("SC_PAGE_SIZE"), used=told.uordblks + told.hblkhd, free=told.fordblks)
    return None


def share_one_arena() -> None:
    """Have all threads allocate from one arena, where the C library has several: to be called before there are any.

    A thread's gaps are then filled by the others' arrays. Whoever sets ``MALLOC_ARENA_MAX`` has decided otherwise.
    """
    if "MALLOC_ARENA_MAX" not in os.environ and (mallopt := getattr(_C, "mallopt", None)) is not None:
        mallopt(_ARENA_MAX, 1)


class Trim:
    """Has the C library give pages that are free to the system, where it can, as often as it is called; but for at most
    a twentieth of the time, however long a large heap takes."""

    _SHARE = 20

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self) -> None:
        trim = getattr(_C, "malloc_trim", None)
        if trim is None or (begun := time.monotonic()) < self._next:
            return
        trim(0)
        ended = time.monotonic()
        self._next = ended + self._SHARE * (ended - begun)

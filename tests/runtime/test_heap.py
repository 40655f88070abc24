"""The heap of a process that runs for days, as glibc itself tells of it (``malloc_info``)."""

import gc
import subprocess
import sys

import numpy as np
import pytest

from rehyat_jax.runtime import heap as heap_module
from rehyat_jax.runtime.heap import Trim, heap


@pytest.fixture(autouse=True)
def no_garbage():
    """Nothing of other tests is freed meanwhile."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


pytestmark = pytest.mark.skipif(heap() is None, reason="needs Linux and glibc 2.33")

#: Sixteen threads allocate at once; glibc says how many arenas there are then.
ARENAS = """
import ctypes, os, threading
from rehyat_jax.runtime.heap import share_one_arena
share_one_arena()
together, blocks = threading.Barrier(16), []
def allocate():
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    together.wait()
    blocks.append(libc.malloc(100_000))
    together.wait()
threads = [threading.Thread(target=allocate) for _ in range(16)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, file)
libc.fflush(file)
"""


@pytest.mark.parametrize("environment", [{}, {"MALLOC_ARENA_MAX": "3"}], ids=["ours", "users"])
def test_threads_share_an_arena_unless_the_user_decided_otherwise(environment, monkeypatch):
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    told = subprocess.run([sys.executable, "-c", ARENAS], check=True, capture_output=True, text=True).stdout
    assert told.count("<heap nr=") == int(environment.get("MALLOC_ARENA_MAX", 1))


def test_what_is_in_use_is_told():
    """An array of 50 MB, and no more than a megabyte beside it."""
    before = heap()
    array = np.ones(50_000_000, np.uint8)
    during = heap()
    assert abs(during.used - before.used - array.nbytes) < 1e6
    assert abs(during.resident - before.resident - array.nbytes) < 1e6
    del array
    assert abs(heap().used - before.used) < 1e6


def test_gaps_are_given_back():
    """Every other of 2,000 arrays of 40 KB is freed: 40 MB of gaps, of which a page each may stay."""
    arrays = [np.ones(40_000, np.uint8) for _ in range(2_000)]
    before = heap().resident
    del arrays[::2]
    Trim()()
    assert before - heap().resident > 40e6 * 0.85


def test_a_twentieth_of_the_time_at_most(monkeypatch):
    """Each takes a second of a clock of ours, which is asked every second for ten minutes."""
    now, trimmed = [0.0], []

    class Library:
        @staticmethod
        def malloc_trim(pad):
            trimmed.append(now[0])
            now[0] += 1.0

    monkeypatch.setattr(heap_module, "_C", Library)
    monkeypatch.setattr(heap_module.time, "monotonic", lambda: now[0])
    trim = Trim()
    while now[0] < 600:
        trim()
        now[0] += 1.0
    assert 600 / 22 - 1 < len(trimmed) <= 600 / 21 + 1

"""Jobs by several processes that share the GPUs of a machine: one compiles while another steps."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

#: The share of a GPU's memory that its workers have together; the rest is for what CUDA itself keeps.
_MEMORY = 0.88

Job = TypeVar("Job")
Line = TypeVar("Line")


def run(
    function: Callable[[Job], Line],
    jobs: Sequence[Job],
    write: Callable[[Line], None],
    *,
    died: Callable[[Job, str], Line],
    workers: int,
    gpus: int,
    seconds: float,
    logs: Path,
) -> None:
    """``function`` of all jobs in their order, each result to ``write`` as soon as it is known.

    Args:
        function: picklable, as its jobs and results are.
        died: a result for a job whose process ended under it; the process is started again.
        workers: processes, each on one of the GPUs in turn. A single one without GPUs to choose from is this process.
        gpus: 0: whatever JAX finds.
        seconds: after these no job is begun.
        logs: folder of what the workers print.
    """
    end, lock = time.monotonic() + seconds, threading.Lock()
    waiting = iter(jobs)

    def jobs_in_time() -> Iterator[Job]:
        while True:
            with lock:
                job = next(waiting, None)
            if job is None or time.monotonic() >= end:
                return
            yield job

    if workers == 1 and not gpus:
        for job in jobs_in_time():
            write(function(job))
        return

    def work(number: int) -> None:
        pool = None
        for job in jobs_in_time():
            pool = pool or _process(number, workers=workers, gpus=gpus, logs=logs)
            try:
                line = pool.submit(function, job).result()
            except BrokenProcessPool as error:  # out of memory, most likely
                pool, line = None, died(job, f"the worker ended: {error}")
            with lock:
                write(line)
        if pool is not None:
            pool.shutdown()

    with ThreadPoolExecutor(workers) as threads:
        list(threads.map(work, range(workers)))


def _process(number: int, *, workers: int, gpus: int, logs: Path) -> ProcessPoolExecutor:
    """A worker that has not begun."""
    environment: dict[str, str] = {}
    if gpus:
        names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        gpu = number % gpus
        beside = len(range(gpu, workers, gpus))
        environment = {
            "CUDA_VISIBLE_DEVICES": names[gpu] if gpu < len(names) and names[gpu] else str(gpu),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "true",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{_MEMORY / beside:.3f}",
        }
    logs.mkdir(parents=True, exist_ok=True)
    return ProcessPoolExecutor(
        1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(environment, logs / f"worker-{number}.log", os.getpid()),
    )


def _begin(environment: dict[str, str], log: Path, parent: int) -> None:
    """In a new process, before it asks JAX for devices. It ends when its parent does."""
    os.environ |= environment
    with log.open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

"""The loop every stage shares: compile, advance, log, checkpoint, stop when asked to, resume."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Int
from rich.console import Console

from rehyat_jax.errors import RehyatError
from train.checkpoint import Checkpoints
from train.progress import TrainingDisplay


@runtime_checkable
class Stepping(Protocol):
    """What a run carries: a pytree with a count of its steps, as `train.optimizer.TrainState`."""

    @property
    def step(self) -> Int[Array, ""]: ...


State = TypeVar("State", bound=Stepping)
#: From the state and its step: the state some optimiser steps later, and device values to log.
Advance = Callable[[State, int], tuple[State, dict[str, Any]]]


class Stopped(Exception):
    """A signal asked the run to stop. Its state is in a checkpoint, and the same call continues it."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped at step {step}")
        self.signal_number, self.step = signal_number, step


def compile_all(lowerings: Sequence[Callable[[], jax.stages.Lowered]]) -> list[jax.stages.Compiled]:
    """Compile several programs side by side: XLA compiles outside Python's lock."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(lambda lower: lower().compile(), lowerings))


def run(
    state: State,
    advance: Advance[State],
    *,
    steps: int,
    steps_per_advance: int,
    folder: Path,
    checkpoint_seconds: float = 60.0,
    log_seconds: float = 5.0,
    console: Console | None = None,
) -> State:
    """Advance ``state`` to ``steps`` steps or just beyond; continue from ``folder``'s newest checkpoint if it has one.

    The host prepares the next round while the device works on this one. Values to log go, with the step, the rate, the
    seconds of this process so far and the step it began at, to ``metrics.jsonl`` in ``folder``, and with the time left
    to the console.

    Raises:
        RehyatError: a logged value is no longer finite. No checkpoint has such a state.
        CheckpointError: the folder's checkpoints are of another model, or one cannot be written.
        Stopped: SIGINT (Ctrl-C) or SIGTERM came; the round under way was finished and saved. A second one interrupts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (
        TrainingDisplay(steps, console=console) as display,
        Checkpoints(folder / "checkpoints") as checkpoints,
        (folder / "metrics.jsonl").open("a", encoding="utf-8") as log,
        _stop_signals() as signals,
    ):
        if (restored := checkpoints.restore(state, report=display.note)) is not None:
            state = restored
            display.note(f"resumed from step {int(state.step)}")
        step = first = logged = int(state.step)
        begun = last_log = last_save = time.monotonic()
        previous: dict[str, Any] = {}
        while step < steps:
            state, metrics = advance(state, step)
            step += steps_per_advance
            # At most one round waits on the device, so that the clock below is the device's.
            jax.block_until_ready(previous)
            now, stop = time.monotonic(), signals[:1]
            saves = stop or step >= steps or now - last_save >= checkpoint_seconds
            if saves or now - last_log >= log_seconds:
                values = {name: float(np.mean(value)) for name, value in jax.device_get(metrics).items()}
                if not all(math.isfinite(value) for value in values.values()):
                    raise RehyatError(
                        f"training diverged: a loss is not finite at step {step}; lower the learning rate"
                    )
                now = time.monotonic()
                rate = (step - logged) / (now - last_log)
                entry = {"step": step, **values, "steps_per_s": rate, "seconds": now - begun, "from_step": first}
                log.write(json.dumps(entry) + "\n")
                log.flush()
                left = (steps - step) * (now - begun) / (step - first)
                display.step(step, values, per_second=rate, seconds_left=left)
                last_log, logged = now, step
            if saves:
                checkpoints.save(step, state)
                last_save = time.monotonic()
            if stop:
                raise Stopped(stop[0], step)
            previous = metrics
    return state


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """The SIGINTs and SIGTERMs that came: the first waits for the loop to see it, a second interrupts at once."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread alone
        yield came
        return

    def receive(number: int, _: object) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""The loop every stage shares: compile, advance, log, checkpoint, resume."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from rehyat_jax.errors import RehyatError
from train.checkpoint import Checkpoints
from train.optimizer import TrainState

#: From the state and its step: the state some optimiser steps later, and device values to log.
Advance = Callable[[TrainState, int], tuple[TrainState, dict[str, Any]]]


def compile_all(lowerings: Sequence[Callable[[], jax.stages.Lowered]]) -> list[jax.stages.Compiled]:
    """Compile several programs side by side: XLA compiles outside Python's lock."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(lambda lower: lower().compile(), lowerings))


def run(
    state: TrainState,
    advance: Advance,
    *,
    steps: int,
    steps_per_advance: int,
    folder: Path,
    checkpoint_seconds: float = 60.0,
    log_seconds: float = 5.0,
    console: Console | None = None,
) -> TrainState:
    """Advance ``state`` to ``steps`` steps or just beyond; continue from ``folder``'s newest checkpoint if it has one.

    The host prepares the next round while the device works on this one. Values to log go, with the step, the rate and
    the seconds of this process so far, to ``metrics.jsonl`` in ``folder``, and as a line with the time left to the
    console.

    Raises:
        RehyatError: a logged value is no longer finite.
        CheckpointError: the folder's checkpoints are of a run with other settings.
    """
    console = console or Console(soft_wrap=True)
    folder.mkdir(parents=True, exist_ok=True)
    with Checkpoints(folder / "checkpoints") as checkpoints, (folder / "metrics.jsonl").open("a") as log:
        if (restored := checkpoints.restore(state)) is not None:
            state = restored
            console.print(f"resumed from step {int(state.step)}")
        step = first = logged = int(state.step)
        begun = last_log = last_save = time.monotonic()
        previous: dict[str, Any] = {}
        while step < steps:
            state, metrics = advance(state, step)
            step += steps_per_advance
            # At most one round waits on the device, so that the clock below is the device's.
            jax.block_until_ready(previous)
            now = time.monotonic()
            if now - last_log >= log_seconds or step >= steps:
                values = {name: float(np.mean(value)) for name, value in jax.device_get(metrics).items()}
                now = time.monotonic()
                rate = (step - logged) / (now - last_log)
                log.write(json.dumps({"step": step, **values, "steps_per_s": rate, "seconds": now - begun}) + "\n")
                log.flush()
                shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
                left = _clock((steps - step) * (now - begun) / (step - first))
                console.print(f"step {step}/{steps}  {shown}  {rate:.2f} steps/s  {left} left", highlight=False)
                if not all(math.isfinite(value) for value in values.values()):
                    raise RehyatError(
                        f"training diverged: a loss is not finite at step {step}; lower the learning rate"
                    )
                last_log, logged = now, step
            if now - last_save >= checkpoint_seconds or step >= steps:
                checkpoints.save(step, state)
                last_save = now
            previous = metrics
    return state


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(max(int(seconds), 0), 60)
    return f"{minutes}:{seconds:02d}"

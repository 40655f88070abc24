"""The loop every stage shares: advance, log, checkpoint, resume."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from rehyat_jax.errors import RehyatError
from train.checkpoint import Checkpoints
from train.optimizer import TrainState

Advance = Callable[[TrainState], tuple[TrainState, dict[str, Any]]]


def run(
    state: TrainState,
    advance: Advance,
    *,
    steps: int,
    folder: Path,
    checkpoint_seconds: float = 120.0,
    log_seconds: float = 5.0,
    console: Console | None = None,
) -> TrainState:
    """Advance ``state`` until its step reaches ``steps``; continue from ``folder``'s newest checkpoint if it has one.

    ``advance`` makes one or several optimiser steps and returns device scalars to log. They go, with the step, the
    rate and the seconds of training so far, to ``metrics.jsonl`` in ``folder``, and as a line with the time left to
    the console.

    Raises:
        RehyatError: the loss is no longer finite.
        CheckpointError: the folder's checkpoints are of a run with other settings.
    """
    console = console or Console()
    folder.mkdir(parents=True, exist_ok=True)
    with Checkpoints(folder / "checkpoints") as checkpoints, (folder / "metrics.jsonl").open("a") as log:
        if (restored := checkpoints.restore(state)) is not None:
            state = restored
            console.print(f"resumed from step {int(state.step)}")
        begun = last_log = last_save = time.monotonic()
        first_step = logged_step = int(state.step)
        while int(state.step) < steps:
            state, metrics = advance(state)
            step, now = int(state.step), time.monotonic()
            if now - last_log >= log_seconds or step >= steps:
                values = {name: float(np.mean(value)) for name, value in jax.device_get(metrics).items()}
                rate = (step - logged_step) / (now - last_log)
                log.write(json.dumps({"step": step, **values, "steps_per_s": rate, "seconds": now - begun}) + "\n")
                log.flush()
                left = (steps - step) / max((step - first_step) / (now - begun), 1e-9)
                shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
                console.print(f"step {step}/{steps}  {shown}  {rate:.2f} steps/s  {_clock(left)} left", highlight=False)
                if not all(math.isfinite(value) for value in values.values()):
                    raise RehyatError(f"the loss is no longer finite at step {step}; lower the learning rate")
                last_log, logged_step = now, step
            if now - last_save >= checkpoint_seconds or step >= steps:
                checkpoints.save(step, state)
                last_save = now
    return state


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes}:{seconds:02d}"

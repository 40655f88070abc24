"""The loop every stage shares: compile, advance, log, checkpoint, stop when asked to, resume."""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Int
from rich.console import Console

from rehyat_jax.errors import RehyatError
from rehyat_jax.runtime.devices import Agreement, first_process
from train.engine.arithmetic import PEAK_TFLOPS
from train.engine.checkpoint import Checkpoints
from train.engine.folder import RunFolder
from train.engine.metrics import Metrics, all_finite, joined, mean_of_finite
from train.engine.optimizer import Skipped
from train.engine.progress import TrainingDisplay


@runtime_checkable
class Stepping(Protocol):
    """What a run carries: a pytree that counts its steps, as `train.engine.optimizer.TrainState`."""

    @property
    def step(self) -> Int[Array, ""]: ...

    @property
    def skipped(self) -> Skipped | Mapping[str, Skipped]: ...


State = TypeVar("State", bound=Stepping)
#: From the state and its step: the state some optimiser steps later, and device values to log.
Advance = Callable[[State, int], tuple[State, dict[str, Any]]]
#: Values to log that are measured now and then, from the state and its step.
Validate = Callable[[State, int], dict[str, float]]


class Stopped(Exception):
    """A signal asked the run to stop. Its state is in a checkpoint, and the same call continues it."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped at step {step}")
        self.signal_number, self.step = signal_number, step


class Work(NamedTuple):
    """What rounds do."""

    clips: int = 0
    tokens: int = 0
    flops: float = 0.0

    def plus(self, other: Work) -> Work:
        return Work(self.clips + other.clips, self.tokens + other.tokens, self.flops + other.flops)

    def rates(self, seconds: float) -> dict[str, float]:
        """Of what is known, by the names that lines have."""
        rates = {"clips_per_s": self.clips, "tokens_per_s": self.tokens, "tflops_per_s": self.flops / 1e12}
        return {name: amount / seconds for name, amount in rates.items() if amount}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rhythm:
    """How long a run is, and how often it does what.

    Attributes:
        steps: of the optimiser; a call of ``advance`` makes ``steps_per_advance`` of them.
        most_skipped: so many steps in a row may have no finite gradients, which changes nothing but their count.
        validate_steps: the round that reaches a multiple of them is followed by a validation, and so is the last; 0:
            none is.
        validate_first: and before the first step of all, when its values are not logged.
        keep_last: so many of the newest checkpoints are kept.
        keep_every: the first checkpoint of each so many steps is kept for good, and made when it is due; 0: none is.
    """

    steps: int
    steps_per_advance: int
    checkpoint_seconds: float = 60.0
    log_seconds: float = 5.0
    most_skipped: int = 20
    validate_steps: int = 0
    validate_first: bool = False
    keep_last: int = 2
    keep_every: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lines:
    """What a run's lines say beside what was measured.

    Attributes:
        work: what the round that begins at a step does: clips, tokens and floating-point operations, each shown as a
            rate, and the last as a share of the devices' peak where that is known
            (`train.engine.arithmetic.PEAK_TFLOPS`).
        told: values to log at a step that are not measured.
        devices: how many are at work; none: all.
    """

    work: Callable[[int], Work] | None = None
    told: Callable[[int], dict[str, float]] = lambda step: {}
    devices: int | None = None


def run(
    state: State,
    advance: Advance[State],
    rhythm: Rhythm,
    *,
    folder: Path,
    validate: Validate[State] | None = None,
    lines: Lines = Lines(),
    console: Console | None = None,
) -> State:
    """Advance ``state`` to the rhythm's steps or just beyond; continue from ``folder``'s newest checkpoint if there is.

    The host prepares the next round while the device works on this one. Several processes save, log and stop after the
    same round, which a signal to one of them decides for all. Values to log go, with the step, the rate, the
    seconds of this process so far and the step it began at, to ``metrics.jsonl`` and TensorBoard in ``folder``, and
    with the time left to the console.

    Args:
        validate: called as the rhythm says.

    Raises:
        RehyatError: too many steps in a row were skipped, or a value is not finite although gradients are.
        CheckpointError: the folder's checkpoints are of another model, or one cannot be written.
        Stopped: SIGINT (Ctrl-C) or SIGTERM came; the round under way was finished and saved. A second one interrupts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    steps, steps_per_advance, work = rhythm.steps, rhythm.steps_per_advance, lines.work
    keep_every, every = rhythm.keep_every, rhythm.validate_steps
    with (
        TrainingDisplay(steps, console=console if first_process() else Console(quiet=True)) as display,
        Checkpoints(
            RunFolder(folder).checkpoints,
            keep=rhythm.keep_last,
            always=lambda step: bool(keep_every) and step % keep_every < steps_per_advance,
        ) as checkpoints,
        _stop_signals() as signals,
    ):
        if (restored := checkpoints.restore(state, report=display.note)) is not None:
            state = restored
            display.note(f"resumed from step {int(state.step)}")
        step = first = logged = int(state.step)
        agreement = Agreement()
        peak = _peak_flops(lines.devices, display.note) if work and step < steps and work(step).flops else None
        if validate and rhythm.validate_first and not step:
            validate(state, step)
        with Metrics(RunFolder(folder), first_step=first) as log:
            begun = last_log = last_save = time.monotonic()
            previous: dict[str, Any] = {}
            skipped, done = _skipped(jax.device_get(state.skipped))[0], Work()
            rounds: list[dict[str, Any]] = []  # measured since the last line
            while step < steps:
                done = done.plus(work(step)) if work else done
                state, metrics = advance(state, step)
                rounds.append(metrics)
                step += steps_per_advance
                # At most one round waits on the device, so that the clock below is the device's.
                jax.block_until_ready(previous)
                now = time.monotonic()
                stop, due, logs = agreement.of(
                    max(signals[:1], default=0),
                    now - last_save >= rhythm.checkpoint_seconds,
                    now - last_log >= rhythm.log_seconds,
                )
                keeps = keep_every and step % keep_every < steps_per_advance
                saves = stop or step >= steps or due or keeps
                validates = validate and every and (step % every < steps_per_advance or step >= steps)
                if saves or validates or logs:
                    fetched, counts = jax.device_get((rounds, state.skipped))
                    measured, rounds = joined(fetched), []
                    values = {name: mean_of_finite(value) for name, value in measured.items()}
                    total, in_a_row = _skipped(counts)
                    if in_a_row >= rhythm.most_skipped:
                        raise RehyatError(
                            f"training diverged: the last {in_a_row} steps before step {step} had no finite gradients; "
                            "lower the learning rate"
                        )
                    if total == skipped and not all(map(all_finite, measured.values())):
                        raise RehyatError(
                            f"training diverged: a loss is not finite at step {step}; lower the learning rate"
                        )
                    if total > skipped:
                        display.note(f"steps skipped so far, for gradients that are not finite: {total}")
                        skipped = total
                    now = time.monotonic()
                    rate = (step - logged) / (now - last_log)
                    values |= done.rates(now - last_log)
                    if peak:
                        values["utilisation"] = done.flops / (now - last_log) / peak
                    values |= lines.told(step)
                    left = (steps - step) * (now - begun) / (step - first)
                    if validates and validate:
                        values |= validate(state, step)
                    entry = values | {"skipped": total, "steps_per_s": rate}
                    log.write(step, entry | {"seconds": now - begun, "from_step": first})
                    display.step(step, values, per_second=rate, seconds_left=left)
                    last_log, logged, done = time.monotonic(), step, Work()
                if saves:
                    checkpoints.save(step, state)
                    last_save = time.monotonic()
                if stop:
                    raise Stopped(stop, step)
                previous = metrics
    return state


def _skipped(counts: Skipped | Mapping[str, Skipped]) -> tuple[int, int]:
    """In all, and the most in a row, of one learner or several."""
    each = [counts] if isinstance(counts, Skipped) else list(counts.values())
    return sum(int(np.sum(x.total)) for x in each), max(int(np.max(x.in_a_row)) for x in each)


def _peak_flops(devices: int | None, note: Callable[[str], None]) -> float | None:
    """Of all devices together; None, and said, where it is not known."""
    kind = jax.devices()[0].device_kind
    if kind not in PEAK_TFLOPS:
        note(f"the peak arithmetic of a device {kind!r} is not known here: its utilisation is not shown")
        return None
    return PEAK_TFLOPS[kind] * 1e12 * (devices or jax.device_count())


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

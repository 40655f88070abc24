"""What a run measures, on disk: a line of JSON each time in ``metrics.jsonl``, and the same for TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from rehyat_jax.runtime.files import whole_file
from train.engine.folder import RunFolder


class Metrics:
    """The measurements of one run, in its folder; a context manager. Of several processes the first alone writes."""

    def __init__(self, folder: RunFolder, *, first_step: int) -> None:
        """
        Args:
            first_step: that this process begins at; what an earlier one wrote of later steps is forgotten.
        """
        self._writes = jax.process_index() == 0
        if self._writes:
            _forget(folder.metrics, after=first_step)
            self._lines = folder.metrics.open("a", encoding="utf-8")
            purge = {"purge_step": first_step + 1} if first_step else {}
            # Here: it imports torch where that is installed, two seconds of a command that may not train at all.
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(folder.tensorboard), **purge)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Both, on the disk when this returns; a value that is not finite is null in JSON and left out of the other."""
        if not self._writes:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._lines.write(json.dumps({"step": step, **finite}) + "\n")
        self._lines.flush()
        for name, value in finite.items():
            if value is not None:
                self._board.add_scalar(name, value, step)
        self._board.flush()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writes:
            self._lines.close()
            self._board.close()


def _forget(path: Path, *, after: int) -> None:
    """Leave out lines of later steps, which a process wrote that was killed before its next checkpoint, and a line that
    was cut short: what is left has every step once, in order."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    kept = [line for line in lines if (step := _step_of(line)) is not None and step <= after]
    if kept != [line for line in lines if line]:
        with whole_file(path) as partial:
            partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return None


def joined(rounds: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What several rounds measured, by name."""
    names = dict.fromkeys(name for measured in rounds for name in measured)
    return {name: np.concatenate([np.ravel(m[name]) for m in rounds if name in m]) for name in names}


def mean_of_finite(value: np.ndarray | float) -> float:
    """Of a value's steps; not a number where no step has a finite one."""
    value = np.asarray(value, np.float32)
    finite = value[np.isfinite(value)]
    return float(finite.mean()) if finite.size else math.nan


def all_finite(value: np.ndarray | float) -> bool:
    return bool(np.isfinite(np.asarray(value, np.float32)).all())

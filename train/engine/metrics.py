"""What a run measures, on disk: a line of JSON each time in ``metrics.jsonl``, and the same for TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import jax
import numpy as np
from tensorboardX import SummaryWriter

from train.engine.folder import RunFolder


class Metrics:
    """The measurements of one run, in its folder; a context manager. Of several processes the first alone writes."""

    def __init__(self, folder: RunFolder, *, first_step: int) -> None:
        """
        Args:
            first_step: that this process begins at; TensorBoard then forgets what an earlier one wrote of later steps.
        """
        self._writes = jax.process_index() == 0
        if self._writes:
            self._lines = folder.metrics.open("a", encoding="utf-8")
            purge = {"purge_step": first_step + 1} if first_step else {}
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


def mean_of_finite(value: np.ndarray | float) -> float:
    """Of a value's steps in a round; not a number where no step has a finite one."""
    value = np.asarray(value, np.float32)
    finite = value[np.isfinite(value)]
    return float(finite.mean()) if finite.size else math.nan


def all_finite(value: np.ndarray | float) -> bool:
    return bool(np.isfinite(np.asarray(value, np.float32)).all())

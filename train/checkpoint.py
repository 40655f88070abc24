"""Checkpoints of a run, by Orbax: written aside and renamed when whole, the newest few kept, restored exactly."""

from __future__ import annotations

from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from rehyat_jax.errors import CheckpointError


class Checkpoints:
    """The checkpoints of one run, in ``folder``; a context manager that waits for the last write."""

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self._manager = ocp.CheckpointManager(
            folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        )

    def restore(self, template: PyTree) -> PyTree | None:
        """The newest checkpoint in the shapes and dtypes of ``template``, or None where there is none.

        Raises:
            CheckpointError: the checkpoint is of another model or run.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self._manager.directory} holds checkpoints of a run with other settings; choose another --out"
            ) from error

    def save(self, step: int, state: PyTree) -> None:
        self._manager.save(step, args=ocp.args.StandardSave(state))

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

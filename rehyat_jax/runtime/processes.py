"""One program in several processes, as a configuration or a command line has it."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext

from rehyat_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """One program in several processes, each with devices of its own: the same command, once for each."""

    distributed: bool = False
    """Find the others: TPU slices, Slurm and Open MPI say where they are, if nothing below does."""
    coordinator: str | None = None
    """Address and port of the first process."""
    count: int | None = None
    """How many processes there are."""
    index: int | None = None
    """Which of them this is, from 0 on."""

    def join(self) -> None:
        """Before anything asks JAX for devices; once.

        Raises:
            ConfigError: the settings do not fit together, or the others cannot be found.
        """
        given = [x is not None for x in (self.coordinator, self.count, self.index)]
        if not self.distributed:
            if any(given):
                raise ConfigError("processes' coordinator, count and index need processes.distributed")
            return
        if any(given) != all(given):
            raise ConfigError("processes' coordinator, count and index go together, or all are left out")
        if self.count is not None and not 0 <= (self.index or 0) < self.count:
            raise ConfigError(f"processes.index must be 0 to {self.count - 1}, not {self.index}")
        import jax

        if jax.distributed.is_initialized():
            return
        try:
            jax.distributed.initialize(self.coordinator, self.count, self.index)
        except (RuntimeError, ValueError) as error:
            why = str(error).strip().split("\n")[0][:200]
            raise ConfigError(f"the processes of this run cannot find each other: {why}") from error

    @property
    def first(self) -> bool:
        """Whether this process, once it has joined, writes what all have."""
        if not self.distributed:
            return True
        import jax

        return jax.process_index() == 0

    def watched(self) -> AbstractContextManager[None]:
        """In which this process ends, with a sentence, when another one of the run is gone; once it has joined."""
        from rehyat_jax.runtime.peers import watched

        return watched(self.coordinator) if self.distributed else nullcontext()

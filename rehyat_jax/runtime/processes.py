"""One program in several processes, as a configuration or a command line has it."""

from __future__ import annotations

import dataclasses

from rehyat_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """One program in several processes, each with devices of its own: the same command, once for each."""

    #: Find the others: TPU slices, Slurm and Open MPI say where they are, if nothing below does.
    distributed: bool = False
    #: Address and port of the first process.
    coordinator: str | None = None
    #: How many processes there are, and which of them this is.
    count: int | None = None
    index: int | None = None

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

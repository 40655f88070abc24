"""A run: its configuration, its folder, and all of it from the newest checkpoint to the result."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from pathlib import Path

from rehyat_jax.errors import ConfigError, RehyatError, RehyatWarning
from rehyat_jax.runtime.arguments import seed_number
from rehyat_jax.runtime.devices import first_process, wait_for_all
from rehyat_jax.runtime.memory import Need, check_memory
from rehyat_jax.runtime.mesh_config import MeshConfig
from rehyat_jax.runtime.processes import Processes
from rehyat_jax.runtime.record import Phases
from train.engine import loop
from train.engine.checkpoint import Checkpoints
from train.engine.engine import Engine, averages_of
from train.engine.folder import RunFolder
from train.engine.identity import compare, identity_of, keep
from train.engine.stage import Stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What a run of any stage has: its fields are what a user may set."""

    out: Path
    #: Optimiser steps.
    steps: int
    seed: int = 0
    #: So many steps in a row without finite gradients end the run; fewer are skipped.
    most_skipped: int = 20
    #: Between two checkpoints; 0 saves after every round.
    checkpoint_seconds: float = 60.0
    #: Checkpoints that are kept: so many of the newest; and the first of each so many steps, for good (0: none).
    keep_last: int = 2
    keep_every: int = 0
    #: Devices along each axis; by default one device is used.
    mesh: MeshConfig = MeshConfig(fsdp=1)
    processes: Processes = Processes()

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("most_skipped", 1), ("keep_last", 1), ("keep_every", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}")
        seed_number(self.seed)  # JAX would take 2**32 for 0

    @property
    def result(self) -> Path:
        """The folder that stands when the run is done, and not before."""
        return self.out

    @property
    def train_folder(self) -> Path:
        """Checkpoints and metrics, beside the result."""
        return self.out.with_name(f"{self.out.name}-train")

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.train_folder)

    def stage(self) -> Stage:
        """The stage that this configures. Nothing is read yet."""
        raise NotImplementedError

    def memory_need(self) -> Need | None:
        """What a round takes on one device, from sizes alone; None: nobody has counted it.

        Raises:
            CheckpointError, ConfigError: there are no such models or data.
        """
        return None

    def check_result(self) -> None:
        """
        Raises:
            RehyatError: there is a result already.
        """
        if self.result.exists():
            raise RehyatError(f"{self.result} is there already; choose another --out")

    def run(self, phases: Phases | None = None, *, change: bool = False, force: bool = False) -> None:
        """Train, or continue a run that was stopped or, with ``change``, go on with one that is done.

        Args:
            phases: takes times and memory.
            change: settings of `train.engine.identity.CHANGEABLE` may be others than the run's so far; a run that is
                done may have more steps, and its result of before stays under another name.
            force: begin although memory is estimated to be too small.

        Raises:
            RehyatError: there is a result already; the folder is of a run with other settings; training diverged.
            CheckpointError: a model cannot be read; checkpoints of another model; a full disk.
            ConfigError: settings do not fit the models, the data or the devices.
            Stopped: by a signal; see `train.engine.loop.run`.
        """
        step = self.folder.newest_step()
        more = change and step is not None and step < self.steps
        if not more:
            self.check_result()
        now = identity_of(self)
        if step is not None:
            for said in compare(self.train_folder, now, change=change):
                warnings.warn(f"{said}, from step {step} on", RehyatWarning, stacklevel=2)
        if (need := self.memory_need()) is not None:
            check_memory(need, what="its rounds", force=force)
        phases, stage = phases or Phases(), self.stage()
        engine = Engine(stage, steps=self.steps)
        with phases.measure("compile"):
            engine.compile()

        def validate(state, step: int) -> dict[str, float]:
            results, averages = engine.measure(state), functools.partial(engine.averages, state)
            return stage.report(results, averages, step=step, folder=self.folder)

        if first_process():
            keep(self.train_folder, now, step=step)
        rhythm = loop.Rhythm(
            steps=self.steps,
            steps_per_advance=stage.steps_per_round,
            checkpoint_seconds=self.checkpoint_seconds,
            most_skipped=self.most_skipped,
            validate_steps=stage.validate_every,
            validate_first=stage.validate_first,
            keep_last=self.keep_last,
            keep_every=self.keep_every,
        )
        with phases.measure("train"):
            state = loop.run(
                engine.state,
                engine.advance,
                rhythm,
                folder=self.train_folder,
                validate=validate if stage.validate_every else None,
                lines=loop.Lines(work=engine.work, told=engine.told, devices=engine.devices.count),
            )
        with phases.measure("save"):
            averages = engine.averages(state)
            if first_process():
                if self.result.exists():
                    self.result.rename(self.result.with_name(f"{self.result.name}-{step}-steps"))
                stage.export(averages, self.result)
            wait_for_all("result")

    def export(self, folder: Path, *, step: int | None = None) -> None:
        """Write the result of a checkpoint of this run, of ``step`` or the newest, as `run` writes it.

        Raises:
            CheckpointError: there is no such checkpoint, it is of another model, or ``folder`` cannot be written.
        """
        stage = self.stage()
        with Checkpoints(self.folder.checkpoints) as checkpoints:
            averages = averages_of(stage.networks, checkpoints, step=step)
        stage.export(averages, folder)

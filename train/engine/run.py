"""A run: its configuration, its folder, and all of it from the newest checkpoint to the result."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.runtime.record import Phases
from train.engine import loop
from train.engine.checkpoint import Checkpoints
from train.engine.engine import Engine, averages_of
from train.engine.folder import RunFolder
from train.engine.stage import Stage
from train.parallel.devices import Processes, first_process, wait_for_all
from train.parallel.sharding import MeshConfig


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
    #: Devices along each axis; by default one device is used.
    mesh: MeshConfig = MeshConfig(fsdp=1)
    processes: Processes = Processes()

    def __post_init__(self) -> None:
        for name in ("steps", "most_skipped"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")

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

    def check_result(self) -> None:
        """
        Raises:
            RehyatError: there is a result already.
        """
        if self.result.exists():
            raise RehyatError(f"{self.result} is there already; choose another --out")

    def run(self, phases: Phases | None = None) -> None:
        """Train, or continue a run that was stopped; ``phases`` takes times and memory.

        Raises:
            RehyatError: there is a result already, or training diverged.
            CheckpointError: a model cannot be read; checkpoints of another model; a full disk.
            ConfigError: settings do not fit the models, the data or the devices.
            Stopped: by a signal; see `train.engine.loop.run`.
        """
        self.check_result()
        phases, stage = phases or Phases(), self.stage()
        engine = Engine(stage, steps=self.steps)
        with phases.measure("compile"):
            engine.compile()

        def validate(state, step: int) -> dict[str, float]:
            results, averages = engine.measure(state), functools.partial(engine.averages, state)
            return stage.report(results, averages, step=step, folder=self.folder)

        with phases.measure("train"):
            state = loop.run(
                engine.state,
                engine.advance,
                steps=self.steps,
                steps_per_advance=stage.steps_per_round,
                folder=self.train_folder,
                checkpoint_seconds=self.checkpoint_seconds,
                most_skipped=self.most_skipped,
                validate=validate if stage.validate_every else None,
                validate_steps=stage.validate_every,
                validate_first=stage.validate_first,
                flops=engine.flops if engine.knows_flops else None,
                devices=engine.devices.count,
            )
        with phases.measure("save"):
            averages = engine.averages(state)
            if first_process():
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

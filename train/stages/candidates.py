"""The run before a distillation whose mixers are chosen: every candidate learns in every block, and is measured.

Its result is a file, the choice. What the candidates have learned is kept in its checkpoints and nowhere else: the
distillation that follows starts from the beginning, at the learning rates of its own length.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rehyat_jax.mixers import BlockMixers
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.runtime.record import Phases
from train.engine.run import RunConfig
from train.stages.choice import Choice, Everywhere, choose, mixer_milliseconds
from train.stages.distill import DistillTraining
from train.stages.distill_stage import DistillStage


@dataclasses.dataclass(frozen=True, kw_only=True)
class CandidatesTraining(DistillTraining):
    """As `DistillTraining`, of every candidate in every block."""

    @classmethod
    def of(cls, training: DistillTraining) -> CandidatesTraining:
        """The run that makes the choice of ``training``, in its folder."""
        choice = _of(training)
        fields = {field.name: getattr(training, field.name) for field in dataclasses.fields(training)}
        # A mesh is judged by the candidates' chunks and features.
        mixers = BlockMixers(choice.candidates)
        return cls(**fields | {"out": training.choice_file.with_suffix(""), "hybrid": mixers, "steps": choice.steps})

    @property
    def result(self) -> Path:
        return self.out.with_suffix(".json")

    def run(self, phases: Phases | None = None, *, change: bool = False, force: bool = False) -> None:
        RunConfig.run(self, phases, change=change, force=force)

    def stage(self) -> CandidatesStage:
        return CandidatesStage(self)

    def mixing(self, model: WanConfig) -> Everywhere:
        return Everywhere(_of(self).candidates, model.num_layers)


class CandidatesStage(DistillStage):
    """Every candidate learns in every block, on one pass of the teacher."""

    def export(self, averages: Mapping[str, Any], folder: Path) -> None:
        """The choice, by the errors of the last validation and times taken now."""
        choice, groups = _of(self.training), zip(self.learner.roles, self.blocks, strict=True)
        errors = self._measured({role: averages.get(role, blocks) for role, blocks in groups})
        frames, rows, columns, _ = max(self.shapes, key=math.prod)
        milliseconds = [
            mixer_milliseconds(mixer, self.model, shape=(frames, rows, columns), dtype=self.dtype)
            for mixer in choice.all
        ]
        with_softmax = np.concatenate([np.zeros((len(errors), 1)), errors], axis=1)
        choose(choice, with_softmax, milliseconds).write(folder)


def _of(training: DistillTraining) -> Choice:
    assert training.choice is not None
    return training.choice

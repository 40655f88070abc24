"""Where a run keeps what, in its folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The folder of a run's checkpoints and measurements, beside its result."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """A JSON object a line."""
        return self.path / "metrics.jsonl"

    def newest_step(self) -> int | None:
        """Of its checkpoints, whole or not; None: there are none."""
        steps = [int(path.name) for path in self.checkpoints.glob("*") if path.name.isdecimal()]
        return max(steps, default=None)

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def blocks(self) -> Path:
        """Of distillation, each block's figures: a JSON object a line."""
        return self.path / "blocks.jsonl"

    def videos(self, step: int) -> Path:
        """Of a validation."""
        return self.path / "videos" / f"step-{step:06d}"

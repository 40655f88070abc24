"""Train a model from nothing, as a configuration file says.

The file defines ``config``, a `train.stages.vae.VAETraining` or a `train.stages.diffusion.DiffusionTraining`.
"""

from __future__ import annotations

from train.cli.command import run_training


def main(argv: list[str]) -> int:
    """``rehyat pretrain CONFIG [--field value …]``; see `run_training`."""
    return run_training("pretrain", argv, about=__doc__ or "", kinds=_kinds)


def _kinds() -> tuple[type, ...]:
    from train.stages.diffusion import DiffusionTraining
    from train.stages.vae import VAETraining

    return VAETraining, DiffusionTraining

"""``rehyat distill``."""

from __future__ import annotations

from train.cli.command import run_training


def main(argv: list[str]) -> int:
    """``rehyat distill CONFIG [--field value …]``; see `run_training`."""
    from train.stages import distill

    return run_training("distill", argv, about=distill.__doc__ or "", kinds=lambda: (distill.DistillTraining,))

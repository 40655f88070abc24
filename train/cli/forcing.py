"""``rehyat forcing``."""

from __future__ import annotations

from train.cli.command import run_training


def main(argv: list[str]) -> int:
    """``rehyat forcing CONFIG [--field value …]``; see `run_training`."""
    from train.stages import forcing

    return run_training("forcing", argv, about=forcing.__doc__ or "", kinds=lambda: (forcing.ForcingTraining,))

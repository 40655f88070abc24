"""``rehyat finetune``."""

from __future__ import annotations

from train.cli.command import run_training


def main(argv: list[str]) -> int:
    """``rehyat finetune CONFIG [--field value …]``; see `run_training`."""
    from train.stages import finetune, forced

    kinds = finetune.FinetuneTraining, forced.ForcedTraining
    return run_training("finetune", argv, about=finetune.__doc__ or "", kinds=lambda: kinds)

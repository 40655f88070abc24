"""Write the model of a checkpoint in the diffusers layout: of pretraining a transformer, distillation or finetuning."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from rehyat_jax.cli.arguments import parse_options
from rehyat_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write the model of a run's checkpoint, its averaged weights, as a folder in the diffusers layout.

    The run need not be at its end, and may go on meanwhile. Fields that the run was given (--out, …) follow after --.
    """

    config: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="CONFIG")]]
    """The run's configuration: a name, or the path of a Python file, which is executed."""

    destination: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DST")]]
    """The folder to make; it must be new or empty."""

    step: int | None = None
    """Of the checkpoint; the newest when not given."""


def main(argv: list[str]) -> None:
    """``rehyat export CONFIG DST [--step N] [-- --field value …]``.

    Raises:
        RehyatError: a mistake in the file or a field; there is no such checkpoint; the folder cannot be written.
    """
    cut = argv.index("--") if "--" in argv else len(argv)
    options = parse_options(Export, argv[:cut], command="export")
    from train.cli.command import parse
    from train.stages.diffusion import DiffusionTraining
    from train.stages.distill import DistillTraining
    from train.stages.finetune import FinetuneTraining

    kinds = DiffusionTraining, DistillTraining, FinetuneTraining
    training: Any = parse("export", options.config, argv[cut + 1 :], kinds=kinds)
    if not (training.train_folder / "checkpoints").is_dir():
        raise ConfigError(f"there are no checkpoints in {training.train_folder}: name the run's --out after --")
    training.export(options.destination, step=options.step)
    print(options.destination)

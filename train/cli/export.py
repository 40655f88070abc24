"""Write the result of a checkpoint of any stage, as its run writes it at its end."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from rehyat_jax.cli.arguments import parse_options
from rehyat_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write the result of a run's checkpoint, of its averaged weights: a model in the diffusers layout.

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
    from train.engine.run import RunConfig

    training = parse("export", options.config, argv[cut + 1 :], kinds=(RunConfig,))
    if not training.folder.checkpoints.is_dir():
        raise ConfigError(f"there are no checkpoints in {training.train_folder}: name the run's --out after --")
    training.export(options.destination, step=options.step)
    print(options.destination)

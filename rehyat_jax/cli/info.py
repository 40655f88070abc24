"""Tell what a checkpoint holds: dialect, sizes, tensors, bytes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from rehyat_jax.cli.arguments import parse_options


@dataclasses.dataclass(frozen=True)
class Info:
    """Tell what a checkpoint holds: dialect, sizes, tensors, bytes. No tensor is read."""

    path: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="PATH|NAME")]]
    """A checkpoint's folder, a component's folder, or a file; a LoRA; or a bundled model's name."""


def main(argv: list[str]) -> None:
    options = parse_options(Info, argv, command="info")
    from rehyat_jax.models.checkpoints import describe
    from rehyat_jax.models.folder import find_checkpoint

    print(describe(find_checkpoint(options.path)))

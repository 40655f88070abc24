"""Write a checkpoint of any dialect anew in the diffusers layout."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rehyat_jax.cli.arguments import parse_options
from rehyat_jax.cli.progress import ProgressDisplay
from rehyat_jax.runtime.files import check_writable, real_path, remove_leftovers
from rehyat_jax.runtime.outputs import check_ours, locked


@dataclasses.dataclass(frozen=True)
class Convert:
    """Write a checkpoint of any dialect anew in the diffusers layout; a record of the run stands beside it (.json)."""

    source: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SRC")]]
    """A checkpoint's folder, a component's folder, or a file."""

    destination: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DST")]]
    """The folder to make; it must be new or empty."""

    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, tyro.conf.arg(metavar="float32|bfloat16|float16")
    ] = None
    """Number format of the weights; each tensor's own when not given."""

    teacher: Annotated[str | None, tyro.conf.arg(metavar="NAME|DIR")] = None
    """Of a student that was finetuned: the model it was converted from, to be kept beside it. The result is the teacher
    for diffusers, and here the student, whose own weights are in its rehyat part."""

    lora: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="FILE[:STRENGTH]")] = ()
    """A LoRA file or folder of any dialect, merged into the transformer's weights for good. Again for another."""


def main(argv: list[str]) -> None:
    options = parse_options(Convert, argv, command="convert")
    destination = real_path(options.destination.expanduser())
    record = destination.parent / f"{destination.name}.json"
    check_writable(record)
    from rehyat_jax.models.checkpoints import convert
    from rehyat_jax.models.folder import find_checkpoint, find_model
    from rehyat_jax.runtime.record import Phases, write_record

    phases = Phases()
    with (
        locked(destination, command="rehyat convert"),
        ProgressDisplay() as display,
        phases.measure("convert"),
    ):
        check_ours(destination, beside=(record,))
        remove_leftovers(destination)
        convert(
            find_checkpoint(options.source),
            destination,
            dtype=options.dtype,
            teacher=None if options.teacher is None else find_model(options.teacher),
            loras=options.lora,
            progress=lambda done, total: display("MB", math.ceil(done / 1e6), math.ceil(total / 1e6)),
        )
    write_record(
        record,
        command="rehyat convert",
        settings=dataclasses.asdict(options),
        phases=phases,
        output=destination,
    )
    print(options.destination)

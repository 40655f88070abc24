"""Write a checkpoint of any dialect anew in the diffusers layout."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rehyat_jax.cli.arguments import parse_options
from rehyat_jax.cli.progress import ProgressDisplay
from rehyat_jax.errors import RehyatError
from rehyat_jax.runtime.eight_bits import named
from rehyat_jax.runtime.files import real_path
from rehyat_jax.runtime.outputs import owned_output


@dataclasses.dataclass(frozen=True)
class Convert:
    """Write a checkpoint of any dialect anew in the diffusers layout; a record of the run stands beside it (.json)."""

    source: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SRC")]]
    """A checkpoint's folder, a component's folder, or a file."""

    destination: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DST")]]
    """The folder to make; it must be new or empty. With --only-conversion the file to make."""

    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, tyro.conf.arg(metavar="float32|bfloat16|float16")
    ] = None
    """Number format of the weights; each tensor's own when not given."""

    teacher: Annotated[str | None, tyro.conf.arg(metavar="NAME|DIR")] = None
    """Of a student that was finetuned: the model it was converted from, to be kept beside it. The result is the teacher
    for diffusers, and here the student, whose own weights are in its rehyat part."""

    lora: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="FILE[:STRENGTH]")] = ()
    """A LoRA file or folder of any dialect, merged into the transformer's weights for good. Again for another.
    Of two experts it is merged into both, with high: or
    low: before FILE into one."""

    quantize: Annotated[Literal["fp8", "int8"] | None, tyro.conf.arg(metavar="fp8|int8")] = None
    """Write the matrices of the transformer's and the text encoder's blocks in eight bits, a scale for each row."""

    quantize_except: Annotated[tuple[str, ...], tyro.conf.arg(metavar="LAYER …")] = ()
    """Layers of the transformer that --quantize leaves as they are in every block: attn1.to_q, or attn2 for all that is
    in it."""

    conversion: Annotated[Path | None, tyro.conf.arg(name="with", metavar="FILE")] = None
    """A conversion in one small file, of which SRC is the base: the result is the student."""

    only_conversion: Annotated[str | None, tyro.conf.arg(metavar="BASE")] = None
    """Write what SRC, a student, has beyond its base: one small .safetensors file, which --with puts over BASE again. A
    student that was finetuned as a whole is refused; a finetuning of adapters (--lora.rank) writes such a file."""


def main(argv: list[str]) -> None:
    options = parse_options(Convert, argv, command="convert")
    destination = real_path(options.destination.expanduser())
    record = destination.parent / f"{destination.name}.json"
    from rehyat_jax.models.checkpoints import convert, save_conversion
    from rehyat_jax.models.folder import find_checkpoint, find_model
    from rehyat_jax.runtime.record import Phases, write_record

    phases = Phases()
    alone = options.only_conversion
    eight_bits = named(options.quantize, options.quantize_except)
    if alone is not None:
        if destination.suffix != ".safetensors" or destination.exists():
            what = "exists" if destination.exists() else "does not end in .safetensors"
            raise RehyatError(f"{options.destination} {what}: --only-conversion makes a new .safetensors file")
        if options.lora or options.conversion or options.teacher or options.dtype or options.quantize:
            raise RehyatError("--only-conversion is alone: it takes no other option")
    with (
        owned_output(destination, command="rehyat convert", beside=(record,), is_folder=True),
        ProgressDisplay() as display,
        phases.measure("convert"),
    ):
        if alone is not None:
            save_conversion(find_checkpoint(options.source), destination, base=find_checkpoint(alone))
        else:
            convert(
                find_checkpoint(options.source),
                destination,
                dtype=options.dtype,
                teacher=None if options.teacher is None else find_model(options.teacher),
                loras=options.lora,
                conversion=options.conversion,
                quantize=eight_bits,
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

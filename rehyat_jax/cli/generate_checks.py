"""What of ``rehyat generate``'s options does not go together, and whose its files are: known before a model is read."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from rehyat_jax.cli.generate_stream import Outputs, check_outputs
from rehyat_jax.errors import RehyatError
from rehyat_jax.runtime.files import check_new_folder
from rehyat_jax.runtime.outputs import owned_output

if TYPE_CHECKING:
    from rehyat_jax.cli.generate_options import Generate
    from rehyat_jax.video.formats import Format

#: Videos of one prompt in a batch.
_MOST_OF_EACH = 1000


def check_combination(options: Generate) -> Format:
    """What kind of output is asked for.

    Raises:
        RehyatError: options that do not go together.
    """
    given = [
        name
        for name, value in (
            ("PROMPT", options.prompt),
            ("--timeline", options.timeline),
            ("--prompts", options.prompts),
        )
        if value is not None
    ]
    if len(given) != 1:
        raise RehyatError(f"give one of PROMPT, --timeline and --prompts, not {' and '.join(given) or 'none'}")
    if options.beginning is not None and options.image is not None:
        raise RehyatError("a video goes on --from a clip or from an --image, not from both")
    if options.sweep == "per-step":
        if options.resume:
            raise RehyatError("--resume goes on with a per-chunk sweep; a per-step one leaves nothing to go on with")
        if options.remember is not None:
            raise RehyatError(
                "--remember is of a per-chunk sweep: in a per-step one chunks see each other as they stand"
            )
        for name in ("timeline", "beginning"):
            if getattr(options, name) is not None:
                shown = "from" if name == "beginning" else name
                raise RehyatError(f"--{shown} is of a per-chunk sweep: in a per-step one all frames are made together")
    if not 1 <= options.count <= _MOST_OF_EACH or (options.count > 1 and options.prompts is None):
        raise RehyatError(f"--count is of --prompts, from 1 to {_MOST_OF_EACH}, not {options.count}")
    from rehyat_jax.video.formats import format_of

    try:
        kind = format_of(options.out)
    except RehyatError as error:
        raise RehyatError(f"--{error}") from None
    if options.prompts is not None:
        if kind != "png":
            raise RehyatError(f"--out is a folder with --prompts, not {options.out.name!r}")
        if options.resume or options.overwrite or options.beginning or options.image or options.last_image:
            raise RehyatError(
                "--prompts goes on by itself, and has no --resume, --overwrite, --from, --image or --last-image"
            )
    elif kind != "mp4" and options.resume:
        raise RehyatError(f"--resume goes on with an mp4, not with {options.out.name!r}")
    if options.processes.distributed:
        if kind != "mp4" or options.steps == "auto":
            raise RehyatError("several processes make one mp4 together, with a number of --steps")
        if options.mesh.single:
            raise RehyatError("several processes need a mesh over the devices of all, as --mesh.automatic")
        if options.vae_devices is not None:
            raise RehyatError("--vae-devices is for one process, not for --processes.distributed")
    if kind == "raw" and sys.stdout.isatty():
        raise RehyatError("--out - writes raw frames: pipe them into a program, as ffmpeg or mpv")
    return kind


def outputs_of(out: Path, kind: Format) -> Outputs:
    """The files of a run."""
    folder = kind == "png"
    return Outputs(
        video=out,
        sheet=out.with_suffix(".png"),
        record=out.with_name(f"{out.name}.json") if folder else out.with_suffix(".json"),
    )


def owned_files(options: Generate, out: Path, kind: Format) -> tuple[Outputs, AbstractContextManager[None]]:
    """The files of the run, and their ownership.

    Raises:
        RehyatError: the run cannot begin.
    """
    folder, outputs = kind == "png", outputs_of(out, kind)
    if kind == "raw":
        return outputs, nullcontext()
    if options.prompts is not None:
        return outputs, owned_output(out, command="rehyat generate", is_folder=True)
    if folder:
        check_new_folder(out)
    owned = owned_output(
        out,
        command="rehyat generate",
        beside=[outputs.sheet, outputs.record] if kind == "mp4" else [outputs.record],
        overwrite=options.overwrite,
        resume=options.resume,
        otherwise=", --resume goes on with it" if kind == "mp4" and outputs.saved() else "",
        is_folder=folder,
    )
    if kind == "mp4":
        check_outputs(outputs, resume=options.resume)
    return outputs, owned

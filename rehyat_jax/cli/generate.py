"""Make a video from a sentence."""

from __future__ import annotations

import dataclasses
import re
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from rehyat_jax.cli.progress import ProgressDisplay
from rehyat_jax.errors import RehyatError
from rehyat_jax.files import check_writable, whole_file

if TYPE_CHECKING:
    from rehyat_jax.sampling import FlowSchedule, Solver


@dataclasses.dataclass(frozen=True)
class Generate:
    """Make a video from a sentence: an mp4, and beside it a contact sheet (.png) and a record of the run (.json).

    What is not given is the model's own advice.
    """

    prompt: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="PROMPT")]]
    """What to show."""

    model: Annotated[str, tyro.conf.arg(metavar="NAME|DIR")] = "mini-sprites"
    """A bundled model's name, or the folder of a Wan2.1 checkpoint (diffusers or original layout)."""

    out: Annotated[Path, tyro.conf.arg(metavar="FILE.mp4")] = Path("video.mp4")
    """Where the video is to stand."""

    frames: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Number of frames, 4k + 1."""

    size: Annotated[str | None, tyro.conf.arg(metavar="WxH")] = None
    """Width and height in pixels, as 832x480."""

    steps: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Number of denoising steps."""

    guidance: Annotated[float | None, tyro.conf.arg(metavar="G")] = None
    """How strongly the prompt guides; 1 or less: without guidance, in half the time."""

    negative: Annotated[str, tyro.conf.arg(metavar="TEXT")] = ""
    """What not to show."""

    seed: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """The same seed and settings make the same video."""

    solver: Annotated[Literal["unipc", "euler"] | None, tyro.conf.arg(metavar="unipc|euler")] = None
    """Solver of the flow."""

    grid: Annotated[
        Literal["diffusers", "diffusers-euler", "official"] | None,
        tyro.conf.arg(metavar="diffusers|diffusers-euler|official"),
    ] = None
    """Whose noise levels."""

    shift: Annotated[float | None, tyro.conf.arg(metavar="X")] = None
    """Shift of the noise levels: the larger the video, the larger."""

    dtype: Annotated[Literal["float32", "bfloat16"], tyro.conf.arg(metavar="float32|bfloat16")] = "float32"
    """Number format of the transformer and the text encoder; the autoencoder stays in float32."""

    cache_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of compiled programs and prompt embeddings (else $REHYAT_CACHE_DIR, else the user's cache folder)."""


def main(argv: list[str]) -> None:
    options = tyro.cli(Generate, args=argv, prog="rehyat generate")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = _note
            _run(options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was written") from None


def _run(options: Generate) -> None:
    width, height = _parse_size(options.size)
    if options.out.suffix.lower() != ".mp4":
        raise RehyatError(f"--out must end in .mp4, not {options.out.name!r}")
    # Now, not after minutes of work.
    paths = [options.out, options.out.with_suffix(".png"), options.out.with_suffix(".json")]
    for path in paths:
        check_writable(path)

    with ProgressDisplay() as display, ExitStack() as outputs:
        display("load", 0, 1)
        from rehyat_jax.record import Phases, write_record

        phases = Phases()
        with phases.measure("load"):
            import jax.numpy as jnp

            from rehyat_jax.pipeline import TextToVideo
            from rehyat_jax.video import contact_sheet, write_video

            pipe = TextToVideo.from_pretrained(
                options.model, dtype=jnp.dtype(options.dtype), cache_dir=options.cache_dir
            )
            settings = pipe.settings(
                num_frames=options.frames,
                height=height,
                width=width,
                num_inference_steps=options.steps,
                guidance_scale=options.guidance,
                schedule=_schedule(options, pipe.schedule),
                solver=_solver(options, pipe.solver),
            )
        display("load", 1, 1)
        frames = pipe.run(
            options.prompt,
            settings,
            negative_prompt=options.negative,
            seed=options.seed,
            on_step=display,
            phases=phases,
        )
        video, sheet, record = (outputs.enter_context(whole_file(path)) for path in paths)
        display("write", 0, 1)
        with phases.measure("write"):
            write_video(video, frames, fps=pipe.fps)
            contact_sheet(sheet, frames)
        asked = {name: getattr(options, name) for name in ("prompt", "negative", "model", "seed", "dtype", "out")}
        resolved = dataclasses.asdict(settings) | {"solver": str(settings.solver)}
        write_record(record, command="rehyat generate", settings=asked | resolved, phases=phases)
        display("write", 1, 1)
    seconds = len(frames) / pipe.fps
    print(f"{paths[0]}: {len(frames)} frames of {settings.width}x{settings.height}, {seconds:.1f} s (see also "
          f"{paths[1].name}, {paths[2].name})")  # fmt: skip


def _parse_size(size: str | None) -> tuple[int | None, int | None]:
    """Width and height."""
    if size is None:
        return None, None
    match = re.fullmatch(r"(\d{1,6})[xX×*](\d{1,6})", size.strip(), flags=re.ASCII)
    if not match:
        raise RehyatError(f"--size must be a width and a height as 832x480, not {size!r}")
    return int(match[1]), int(match[2])


def _schedule(options: Generate, default: FlowSchedule) -> FlowSchedule:
    return dataclasses.replace(
        default,
        grid=default.grid if options.grid is None else options.grid,
        shift=default.shift if options.shift is None else options.shift,
    )


def _solver(options: Generate, default: Solver) -> Solver:
    from rehyat_jax.sampling import Euler, UniPC

    solvers: dict[str | None, Solver] = {"unipc": UniPC(), "euler": Euler(), None: default}
    return solvers[options.solver]


def _note(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"rehyat: {message}", file=sys.stderr)

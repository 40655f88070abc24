"""Make a video from a sentence."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from rehyat_jax.cli.arguments import parse_options
from rehyat_jax.cli.generate_stream import Outputs, Request, check_outputs, described, stream_video
from rehyat_jax.cli.progress import ProgressDisplay
from rehyat_jax.errors import RehyatError
from rehyat_jax.runtime.files import whole_file
from rehyat_jax.runtime.outputs import owned_output

if TYPE_CHECKING:
    from rehyat_jax.mixers.config import HybridConfig
    from rehyat_jax.pipeline import TextToVideo
    from rehyat_jax.runtime.record import Phases
    from rehyat_jax.sampling import FlowSchedule, Solver
    from rehyat_jax.sampling.rollout import ContextNoise
    from rehyat_jax.sampling.settings import Settings


@dataclasses.dataclass(frozen=True)
class Generate:
    """Make a video from a sentence: an mp4, and beside it a contact sheet (.png) and a record of the run (.json).

    What is not given is the model's own advice.
    """

    prompt: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="PROMPT")]]
    """What to show."""

    model: Annotated[str, tyro.conf.arg(metavar="NAME|DIR")] = "mini-sprites"
    """A bundled model's name, or the folder of a Wan2.1 checkpoint (diffusers or original layout)."""

    lora: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="FILE[:STRENGTH]")] = ()
    """A LoRA file or folder of any dialect, merged into the transformer's weights; 1 as it was trained. Again for
    another."""

    image: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """What the video begins with, for models that take images; cropped to the video's shape."""

    last_image: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """What the video ends with, for models that take two images."""

    out: Annotated[Path, tyro.conf.arg(metavar="FILE.mp4")] = Path("video.mp4")
    """Where the video is to stand."""

    frames: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Number of frames: any in a per-chunk sweep, 4k + 1 else."""

    sweep: Annotated[Literal["per-step", "per-chunk"] | None, tyro.conf.arg(metavar="per-step|per-chunk")] = None
    """per-step: all frames at each step; any model. per-chunk: all steps at each chunk of frames, in memory that does
    not grow, written while it is made; a model whose blocks are all converted. When not given: per-chunk where the
    model can, else per-step. The video is the same, but for a last chunk that is cut and for --remember."""

    remember: Annotated[str | None, tyro.conf.arg(metavar="steps|LEVEL")] = None
    """What the later chunks of a per-chunk sweep see of one. steps: what it was at their own noise level, so that the
    video is that of a per-step sweep. A noise level from 0 to below 1: the finished chunk with so much noise, in the
    memory of one step; for a model that was trained so. When not given: as the model was trained."""

    resume: bool = False
    """Go on with a per-chunk video that was interrupted or killed, from FILE.mp4.state: the same command with
    --resume. With another prompt, the rest shows that."""

    overwrite: bool = False
    """Replace FILE.mp4 if there is one."""

    hybrid: Annotated[str | None, tyro.conf.arg(metavar="CHUNK+OVERLAP")] = None
    """Convert every block on loading, as 3+1: chunks of 3 latent frames that see 1 before them. The feature maps are
    untrained: this shows that a model streams, not how well."""

    size: Annotated[str | None, tyro.conf.arg(metavar="WxH")] = None
    """Width and height in pixels, as 832x480."""

    steps: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Number of denoising steps."""

    guidance: Annotated[float | None, tyro.conf.arg(metavar="G")] = None
    """How strongly the prompt guides; 1 or less: without guidance, in half the time."""

    guidance_2: Annotated[float | None, tyro.conf.arg(metavar="G")] = None
    """Guidance of the low-noise expert, for models of two (Wan2.2's A14B); as --guidance when that alone is given."""

    negative: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """What not to show; the model's own when not given."""

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

    repair_prompts: bool = True
    """Repair the prompts' text (curly quotes, full-width letters, mistaken encodings), as Wan's own code does."""

    cache_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of compiled programs and prompt embeddings (else $REHYAT_CACHE_DIR, else the user's cache folder)."""

    force: bool = False
    """Begin although the memory of this machine is estimated to be too small."""


#: What the record has of the options beside the settings.
_ASKED = ("prompt", "model", "lora", "image", "last_image", "hybrid", "seed", "dtype", "out")


def main(argv: list[str]) -> None:
    options = parse_options(Generate, argv, command="generate")
    try:
        _run(options)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(*(interrupt.args or ["nothing was written"])) from None


def _run(options: Generate) -> None:
    width, height = _parse_size(options.size)
    if options.out.suffix.lower() != ".mp4":
        raise RehyatError(f"--out must end in .mp4, not {options.out.name!r}")
    if options.resume and options.sweep == "per-step":
        raise RehyatError("--resume goes on with a per-chunk sweep; a per-step one leaves nothing to go on with")
    if options.remember is not None and options.sweep == "per-step":
        raise RehyatError("--remember is of a per-chunk sweep: in a per-step one chunks see each other as they stand")
    remember = parse_remember(options.remember)
    hybrid = _parse_hybrid(options.hybrid)
    from rehyat_jax.video.images import Images

    # Now, not after minutes of work.
    images = Images.read(options.image, options.last_image)
    out = options.out.expanduser()
    outputs = Outputs(video=out, sheet=out.with_suffix(".png"), record=out.with_suffix(".json"))
    owned = owned_output(
        outputs.video,
        command="rehyat generate",
        beside=[outputs.sheet, outputs.record],
        overwrite=options.overwrite,
        resume=options.resume,
        otherwise=", --resume goes on with it" if outputs.saved() else "",
    )
    check_outputs(outputs, resume=options.resume)
    with owned, ProgressDisplay() as display:
        display("load", 0, 1)
        from rehyat_jax.runtime.record import Phases

        phases = Phases()
        with phases.measure("load"):
            import jax.numpy as jnp

            from rehyat_jax.pipeline import TextToVideo

            _check_room(options, hybrid, remember)
            pipe = TextToVideo.from_pretrained(
                options.model,
                dtype=jnp.dtype(options.dtype),
                hybrid=hybrid,
                cache_dir=options.cache_dir,
                repair_prompts=options.repair_prompts,
                loras=options.lora,
            )
        if options.hybrid is not None:
            _note(
                f"all {pipe.transformer.config.num_layers} blocks were converted on loading, with feature maps that "
                "are untrained: expect a worse picture than the model's own"
            )
        display("load", 1, 1)
        request = Request(
            prompt=options.prompt,
            negative_prompt=pipe.defaults.negative_prompt if options.negative is None else options.negative,
            seed=options.seed,
            frames=pipe.defaults.num_frames if options.frames is None else options.frames,
            images=images,
            sampling={
                "height": height,
                "width": width,
                "num_inference_steps": options.steps,
                "guidance_scale": options.guidance,
                **({} if options.guidance_2 is None else {"guidance_scale_2": options.guidance_2}),
                "schedule": _schedule(options, pipe.schedule_at(height=height, width=width)),
                "solver": _solver(options, pipe.solver),
                "remember": remember,
            },
        )
        asked = {name: getattr(options, name) for name in _ASKED} | {"negative": request.negative_prompt}
        streams = pipe.transformer.why_not_stream() is None
        if options.sweep == "per-chunk" or options.resume or (options.sweep is None and streams):
            settings = stream_video(
                pipe, request, outputs, resume=options.resume, display=display, phases=phases, record=asked
            )
            count = request.frames
        else:
            settings = _whole_video(pipe, request, outputs, display=display, phases=phases, record=asked)
            count = settings.num_frames
    print(
        f"{outputs.video}: {count} frames of {settings.width}x{settings.height}, {count / pipe.fps:.1f} s "
        f"(see also {outputs.sheet.name}, {outputs.record.name})"
    )


def _whole_video(
    pipe: TextToVideo,
    request: Request,
    outputs: Outputs,
    *,
    display: ProgressDisplay,
    phases: Phases,
    record: Mapping[str, Any],
) -> Settings:
    """The per-step sweep: the video is made, then written; nothing is left of one that is not whole."""
    from rehyat_jax.runtime.record import write_record
    from rehyat_jax.video.io import check_video_room, contact_sheet, write_video

    settings = pipe.settings(num_frames=request.frames, **request.sampling)
    check_video_room(outputs.video, settings.num_frames, height=settings.height, width=settings.width)
    frames = pipe.run(
        request.prompt,
        settings,
        negative_prompt=request.negative_prompt,
        seed=request.seed,
        images=request.images,
        on_step=display,
        phases=phases,
    )
    with ExitStack() as files:
        video, sheet, record_file = (
            files.enter_context(whole_file(path)) for path in (outputs.video, outputs.sheet, outputs.record)
        )
        display("write", 0, 1)
        made_by = described(request, settings, model=str(record["model"]), loras=pipe.loras)
        with phases.measure("write"):
            write_video(video, frames, fps=pipe.fps, metadata=made_by)
            contact_sheet(sheet, frames, output=outputs.video)
        made = dataclasses.asdict(settings) | {"solver": str(settings.solver), "sweep": "per-step"}
        write_record(
            record_file,
            command="rehyat generate",
            settings=dict(record) | made,
            phases=phases,
            output=outputs.video,
        )
        display("write", 1, 1)
    return settings


def _check_room(options: Generate, hybrid: HybridConfig | Literal["auto"], remember: ContextNoise | None) -> None:
    """
    Raises:
        ConfigError: this machine has no room for the video.
    """
    from rehyat_jax.models.folder import find_model, read_defaults
    from rehyat_jax.models.memory import VideoShape, fitting_size, size_unit, student_config, video_need
    from rehyat_jax.pipeline import LARGEST_SIDE, MOST_TOKENS
    from rehyat_jax.runtime.memory import Need, check_memory

    folder = find_model(options.model)
    defaults, converted = read_defaults(folder), student_config(folder) if hybrid == "auto" else hybrid
    width, height = _parse_size(options.size)
    guidance = defaults.guidance_scale if options.guidance is None else options.guidance
    shape = VideoShape(
        frames=defaults.num_frames if options.frames is None else options.frames,
        height=height or defaults.height,
        width=width or defaults.width,
        steps=defaults.num_inference_steps if options.steps is None else options.steps,
        guided=guidance > 1,
    )
    if max(shape.height, shape.width) > LARGEST_SIDE or shape.frames > 4 * MOST_TOKENS:
        return  # of no machine: the pipeline says so

    def need(height: int, width: int) -> Need:
        sized = dataclasses.replace(shape, height=height, width=width)
        past = defaults.remember if remember is None else remember
        return video_need(
            folder, sized, dtype=options.dtype, hybrid=converted, streams=options.sweep != "per-step", remember=past
        )

    check_memory(
        need(shape.height, shape.width),
        what=str(shape),
        smaller=lambda: fitting_size(need, height=shape.height, width=shape.width, multiple=size_unit(folder)),
        force=options.force,
    )


def _parse_hybrid(text: str | None) -> HybridConfig | Literal["auto"]:
    """Of a chunk and an overlap; the folder's own where there is none."""
    if text is None:
        return "auto"
    match = re.fullmatch(r"(\d{1,6})\+(\d{1,6})", text.strip(), flags=re.ASCII)
    if not match:
        raise RehyatError(f"--hybrid must be a chunk and an overlap in latent frames as 3+1, not {text!r}")
    from rehyat_jax.mixers.config import HybridConfig

    return HybridConfig(chunk_frames=int(match[1]), overlap_frames=int(match[2]))


def parse_remember(text: str | None) -> ContextNoise | None:
    if text is None or text == "steps":
        return text  # type: ignore[return-value]
    try:
        return float(text)
    except ValueError:
        raise RehyatError(f"--remember must be steps or a noise level from 0 to below 1, not {text[:80]!r}") from None


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

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

from rehyat_jax.cli.arguments import parse_options, parse_steps
from rehyat_jax.cli.generate_checks import check_combination, owned_files
from rehyat_jax.cli.generate_other import make_batch, read_batch, write_other
from rehyat_jax.cli.generate_stream import Outputs, Request, described, stream_video
from rehyat_jax.cli.progress import ProgressDisplay
from rehyat_jax.errors import RehyatError
from rehyat_jax.runtime.eight_bits import Kind, named
from rehyat_jax.runtime.files import whole_file
from rehyat_jax.runtime.mesh_config import MeshConfig

if TYPE_CHECKING:
    from rehyat_jax.mixers.config import HybridConfig
    from rehyat_jax.pipeline import TextToVideo
    from rehyat_jax.runtime.record import Phases
    from rehyat_jax.sampling import FlowSchedule, Solver
    from rehyat_jax.sampling.rollout import ContextNoise
    from rehyat_jax.sampling.settings import Settings
    from rehyat_jax.streams.timeline import Timeline


@dataclasses.dataclass(frozen=True)
class Generate:
    """Make a video from a sentence: an mp4, and beside it a contact sheet (.png) and a record of the run (.json).

    Or from sentences by second (--timeline), or a video for each line of a file (--prompts).

    What is not given is the model's own advice.
    """

    prompt: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="PROMPT")]] = None
    """What to show."""

    timeline: Annotated[Path | None, tyro.conf.arg(metavar="FILE.toml")] = None
    """Sentences by second, one a line, in the place of PROMPT: 0 = "a koala …", then 4.5 = "a lemon …". A chunk shows
    the sentence that counts at its first frame."""

    prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A video for each line, in the place of PROMPT, in the folder --out: {prompt}-{i}.mp4. The same command goes on
    with what is missing."""

    count: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Of --prompts: videos of each line, with the noise of the seeds from --seed on."""

    beginning: Annotated[Path | None, tyro.conf.arg(name="from", metavar="CLIP")] = None
    """Go on from a video: its last frames, scaled and cropped to the size, come first and count. Per-chunk."""

    model: Annotated[str, tyro.conf.arg(metavar="NAME|DIR")] = "mini-sprites"
    """A bundled model's name, or the folder of a Wan2.1 checkpoint (diffusers or original layout)."""

    lora: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="FILE[:STRENGTH]")] = ()
    """A LoRA file or folder of any dialect, merged into the transformer's weights; 1 as it was trained. Again for
    another. Of two experts it is merged into both, with high: or
    low: before FILE into one."""

    image: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """What the video begins with, scaled and cropped to its size; for models that take images, and for those that make
    a video chunk by chunk."""

    last_image: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """What the video ends with, for models that take two images."""

    out: Annotated[Path, tyro.conf.arg(metavar="FILE|DIR|-")] = Path("video.mp4")
    """Where the video is to stand: .mp4, .webp or .gif; a new folder of numbered PNGs; - for raw frames (rows of RGB)
    to a pipe."""

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

    offload: bool = False
    """For a device with little memory: the transformer's blocks stay in the host's memory and are fetched one at a
    time, and the text encoder leaves the device once a prompt is embedded. Slower."""

    vae_tile: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
    """For little memory as well: frames are decoded by tiles of so many pixels a side (256), with blended seams."""

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

    steps: Annotated[str | None, tyro.conf.arg(metavar="N|auto")] = None
    """Number of denoising steps. auto: the most of the model's list with which this machine makes frames as fast as
    they are shown; measured first."""

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

    quantize: Annotated[Kind | None, tyro.conf.arg(metavar="int8|int8-weights|fp8")] = None
    """Keep the matrices of the transformer's and the text encoder's blocks in eight bits on the device: half of what
    bfloat16 takes. int8: the transformer's products are made in int8 as well, as accelerators are fast at.
    int8-weights: products stay as they are, nearer to the model's own. fp8: so too, and files in fp8 are kept as they
    are."""

    quantize_except: Annotated[tuple[str, ...], tyro.conf.arg(metavar="LAYER …")] = ()
    """Layers that --quantize leaves as they are in every block: attn1.to_q, or attn2 for all that is in it."""

    repair_prompts: bool = True
    """Repair the prompts' text (curly quotes, full-width letters, mistaken encodings), as Wan's own code does."""

    mesh: MeshConfig = MeshConfig(fsdp=1)
    """Devices to generate on, over which the model is divided; one when not given."""

    cache_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of compiled programs and prompt embeddings (else $REHYAT_CACHE_DIR, else the user's cache folder)."""

    force: bool = False
    """Begin although the memory of this machine is estimated to be too small."""


#: What the record has of the options beside the settings.
_ASKED = (
    *("prompt", "timeline", "beginning", "image", "last_image"),
    *("model", "lora", "hybrid", "seed", "dtype", "quantize", "quantize_except", "mesh", "offload", "vae_tile", "out"),
)


def main(argv: list[str]) -> None:
    options = parse_options(Generate, argv, command="generate")
    try:
        _run(options)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(*(interrupt.args or ["nothing was written"])) from None


def _run(options: Generate) -> None:
    width, height = _parse_size(options.size)
    kind = check_combination(options)
    remember, steps = parse_remember(options.remember), parse_steps(options.steps)
    hybrid = _parse_hybrid(options.hybrid)
    timeline = _read_timeline(options.timeline)
    if options.beginning is not None and not options.beginning.expanduser().is_file():
        raise RehyatError(f"--from: there is no file {options.beginning}")
    from rehyat_jax.video.images import Images

    # Now, not after minutes of work.
    images = Images.read(options.image, options.last_image)
    out = options.out.expanduser()
    batch = None if options.prompts is None else read_batch(options.prompts.expanduser(), out, count=options.count)
    outputs, owned = owned_files(options, out, kind)
    with owned, ProgressDisplay() as display:
        display("load", 0, 1)
        from rehyat_jax.runtime.record import Phases

        phases = Phases()
        with phases.measure("load"):
            import jax.numpy as jnp

            from rehyat_jax.pipeline import TextToVideo

            mesh = _check_room(options, hybrid, remember, steps)
            pipe = TextToVideo.from_pretrained(
                options.model,
                dtype=jnp.dtype(options.dtype),
                hybrid=hybrid,
                cache_dir=options.cache_dir,
                repair_prompts=options.repair_prompts,
                loras=options.lora,
                quantize=named(options.quantize, options.quantize_except),
                mesh=mesh,
                offload=options.offload,
                vae_tile=options.vae_tile,
            )
        if options.hybrid is not None:
            _note(
                f"all {pipe.transformer.config.num_layers} blocks were converted on loading, with feature maps that "
                "are untrained: expect a worse picture than the model's own"
            )
        display("load", 1, 1)
        request = Request(
            prompt=timeline.at(0) if timeline is not None else options.prompt or "",
            negative_prompt=pipe.defaults.negative_prompt if options.negative is None else options.negative,
            seed=options.seed,
            frames=pipe.defaults.num_frames if options.frames is None else options.frames,
            images=images,
            sampling={
                "height": height,
                "width": width,
                "num_inference_steps": None if steps == "auto" else steps,
                "guidance_scale": options.guidance,
                **({} if options.guidance_2 is None else {"guidance_scale_2": options.guidance_2}),
                "schedule": _schedule(options, pipe.own_settings.schedule_at(height=height, width=width)),
                "solver": _solver(options, pipe.solver),
                "remember": remember,
            },
            timeline=timeline,
            beginning=options.beginning,
        )
        asked = {name: getattr(options, name) for name in _ASKED} | {"negative": request.negative_prompt}
        streams = _streams(options, pipe)
        if steps == "auto":
            request = _with_most_steps(pipe, request, display)
        how: Any = {"streams": streams, "display": display, "phases": phases}
        if batch is not None:
            made = make_batch(pipe, request, batch, model=options.model, **how)
            print(f"{out}: {len(batch)} videos, {made} of them made now")
            return
        if kind != "mp4":
            record = None if kind == "raw" else outputs.record
            settings = write_other(pipe, request, out, record, record=asked, **how)
            count = request.frames
        elif streams:
            settings = stream_video(
                pipe, request, outputs, resume=options.resume, display=display, phases=phases, record=asked
            )
            count = request.frames
        else:
            settings = _whole_video(pipe, request, outputs, display=display, phases=phases, record=asked)
            count = settings.num_frames
    beside = {"mp4": f" (see also {outputs.sheet.name}, {outputs.record.name})", "raw": ""}
    print(
        f"{outputs.video}: {count} frames of {settings.width}x{settings.height}, {count / pipe.fps:.1f} s"
        + beside.get(kind, f" (see also {outputs.record.name})"),
        file=sys.stderr if kind == "raw" else sys.stdout,
    )


def _streams(options: Generate, pipe: TextToVideo) -> bool:
    """Whether the video is made chunk by chunk: as asked for, else where the model can."""
    wanted = options.resume or options.timeline or options.beginning
    if options.sweep == "per-chunk" or wanted:
        return True
    return options.sweep is None and pipe.why_not_stream() is None


def _with_most_steps(pipe: TextToVideo, request: Request, display: ProgressDisplay) -> Request:
    """The request with as many steps as the machine takes at the video's rate, and a word about it."""
    display("measure", 0, 1)
    options = {name: value for name, value in request.sampling.items() if name != "num_inference_steps"}
    options["image"] = request.images.first
    measured = pipe.real_time_steps(request.prompt, **options)
    display("measure", 1, 1)
    slower = "" if measured.real_time else f", fewer than the {pipe.fps} that are shown, and no fewer steps are offered"
    _note(f"{measured.steps} steps make {measured.frames_per_second:.1f} frames a second here{slower}")
    return dataclasses.replace(request, sampling=dict(request.sampling) | {"num_inference_steps": measured.steps})


def _read_timeline(path: Path | None) -> Timeline | None:
    if path is None:
        return None
    from rehyat_jax.streams.timeline import Timeline

    return Timeline.read(path.expanduser())


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


def _check_room(
    options: Generate,
    hybrid: HybridConfig | Literal["auto"],
    remember: ContextNoise | None,
    steps: int | Literal["auto"] | None,
) -> MeshConfig | None:
    """
    Returns:
        The mesh to generate on, as it is or as it is chosen for this video.

    Raises:
        ConfigError: this machine has no room for the video, or the mesh does not divide it.
    """
    import jax

    from rehyat_jax.models.folder import find_model, read_defaults
    from rehyat_jax.models.memory import VideoShape, fitting_size, size_unit, student_config, video_need
    from rehyat_jax.models.own_settings import LARGEST_SIDE, MOST_TOKENS
    from rehyat_jax.models.wan.sharding import mesh_for_video
    from rehyat_jax.runtime.memory import Need, check_memory

    folder = find_model(options.model)
    defaults = read_defaults(folder, student=hybrid == "auto")
    converted = student_config(folder) if hybrid == "auto" else hybrid
    width, height = _parse_size(options.size)
    guidance = defaults.guidance_scale if options.guidance is None else options.guidance
    shape = VideoShape(
        frames=defaults.num_frames if options.frames is None else options.frames,
        height=height or defaults.height,
        width=width or defaults.width,
        steps=steps if isinstance(steps, int) else max([defaults.num_inference_steps, *defaults.offered_steps]),
        guided=guidance > 1,
    )
    if max(shape.height, shape.width) > LARGEST_SIDE or shape.frames > 4 * MOST_TOKENS:
        return None  # of no machine: the pipeline says so
    streams, mesh = options.sweep != "per-step", None
    if not options.mesh.single:
        mesh = mesh_for_video(
            options.mesh,
            folder,
            hybrid=converted,
            frames=shape.frames,
            guided=shape.guided,
            streams=streams,
            devices=jax.device_count(),
        )

    def need(height: int, width: int) -> Need:
        sized = dataclasses.replace(shape, height=height, width=width)
        past = defaults.remember if remember is None else remember
        return video_need(
            folder,
            sized,
            dtype=options.dtype,
            hybrid=converted,
            streams=streams,
            remember=past,
            eight_bits=options.quantize is not None and not options.quantize_except,
            mesh=mesh,
            offload=options.offload,
            vae_tile=options.vae_tile,
        )

    check_memory(
        need(shape.height, shape.width),
        what=str(shape),
        smaller=lambda: fitting_size(need, height=shape.height, width=shape.width, multiple=size_unit(folder)),
        force=options.force,
    )
    return mesh


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

"""Make a video from a sentence."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rehyat_jax.cli.arguments import parse_options, parse_steps
from rehyat_jax.cli.generate_checks import check_combination, outputs_of, owned_files
from rehyat_jax.cli.generate_options import Generate, parse_hybrid, parse_remember, parse_size, parse_vae_devices
from rehyat_jax.cli.generate_other import make_batch, read_batch, write_other
from rehyat_jax.cli.generate_stream import Outputs, Request, described, follow_video, stream_video
from rehyat_jax.cli.progress import ProgressDisplay
from rehyat_jax.errors import RehyatError
from rehyat_jax.runtime.eight_bits import named
from rehyat_jax.runtime.files import whole_file
from rehyat_jax.runtime.mesh_config import MeshConfig, devices_left

if TYPE_CHECKING:
    from rehyat_jax.mixers.config import HybridConfig
    from rehyat_jax.pipeline import TextToVideo
    from rehyat_jax.runtime.record import Phases
    from rehyat_jax.sampling import FlowSchedule, Solver
    from rehyat_jax.sampling.rollout import ContextNoise
    from rehyat_jax.sampling.settings import Settings
    from rehyat_jax.streams.timeline import Timeline
    from rehyat_jax.video.formats import Format


#: What the record has of the options beside the settings.
_ASKED = (
    *("prompt", "timeline", "beginning", "image", "last_image"),
    *("model", "lora", "hybrid", "seed", "dtype", "quantize", "quantize_except"),
    *("mesh", "offload", "vae_tile", "vae_devices", "decoder", "out"),
)


def main(argv: list[str]) -> None:
    options = parse_options(Generate, argv, command="generate")
    kind = check_combination(options)
    options.processes.join()
    try:
        with options.processes.watched():
            _run(options, kind)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(*(interrupt.args or ["nothing was written"])) from None


def _run(options: Generate, kind: Format) -> None:
    width, height = parse_size(options.size)
    remember, steps = parse_remember(options.remember), parse_steps(options.steps)
    hybrid = parse_hybrid(options.hybrid)
    timeline = _read_timeline(options.timeline)
    for name, file in (("from", options.beginning), ("decoder", options.decoder)):
        if file is not None and not file.expanduser().exists():
            raise RehyatError(f"--{name}: there is no file {file}")
    from rehyat_jax.video.images import Images

    # Now, not after minutes of work.
    images = Images.read(options.image, options.last_image)
    out = options.out.expanduser()
    batch = None if options.prompts is None else read_batch(options.prompts.expanduser(), out, count=options.count)
    first = options.processes.first
    outputs, owned = owned_files(options, out, kind) if first else (outputs_of(out, kind), nullcontext())
    with owned, ProgressDisplay(quiet=not first) as display:
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
                decoder=options.decoder,
                vae_devices=parse_vae_devices(options.vae_devices),
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
        if not first:
            if streams:
                follow_video(pipe, request, outputs)
            else:
                pipe.run(
                    request.prompt,
                    pipe.settings(num_frames=request.frames, **request.sampling),
                    negative_prompt=request.negative_prompt,
                    seed=request.seed,
                    images=request.images,
                )
            return
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
    from rehyat_jax.models.memory import (
        Making,
        VideoShape,
        fitting_size,
        preview_config,
        size_unit,
        student_config,
        video_need,
    )
    from rehyat_jax.models.own_settings import LARGEST_SIDE, MOST_TOKENS
    from rehyat_jax.models.wan.sharding import check_picture, mesh_for_video
    from rehyat_jax.runtime.memory import Need, check_memory

    folder = find_model(options.model)
    defaults = read_defaults(folder, student=hybrid == "auto")
    converted = student_config(folder) if hybrid == "auto" else hybrid
    width, height = parse_size(options.size)
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
    streams, mesh, vae = options.sweep != "per-step", None, parse_vae_devices(options.vae_devices)
    left = devices_left(vae, options.mesh, found=jax.device_count())
    if not options.mesh.single:
        mesh = mesh_for_video(
            options.mesh,
            folder,
            hybrid=converted,
            frames=shape.frames,
            guided=shape.guided,
            streams=streams,
            devices=left,
        )
    check_picture(vae, mesh, folder, height=shape.height, width=shape.width)

    def need(height: int, width: int) -> Need:
        sized = dataclasses.replace(shape, height=height, width=width)
        past = defaults.remember if remember is None else remember
        making = Making(
            hybrid=converted,
            streams=streams,
            remember=past,
            mesh=mesh,
            offload=options.offload,
            vae_tile=options.vae_tile,
            vae_devices=vae,
            preview=preview_config(options.decoder),
        )
        eight_bits = options.quantize is not None and not options.quantize_except
        return video_need(folder, sized, making, dtype=options.dtype, eight_bits=eight_bits)

    check_memory(
        need(shape.height, shape.width),
        what=str(shape),
        smaller=lambda: fitting_size(need, height=shape.height, width=shape.width, multiple=size_unit(folder)),
        force=options.force,
    )
    return mesh


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

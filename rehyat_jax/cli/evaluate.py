"""Measure a model of MovingSprites: prompts never seen, with controls and ceilings."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from rehyat_jax.cli.arguments import parse_options
from rehyat_jax.cli.generate_options import parse_remember
from rehyat_jax.cli.progress import ProgressDisplay
from rehyat_jax.errors import RehyatError
from rehyat_jax.runtime.eight_bits import Kind, named
from rehyat_jax.runtime.mesh_config import MeshConfig
from rehyat_jax.runtime.outputs import owned_output

if TYPE_CHECKING:
    from rehyat_jax.pipeline import TextToVideo
    from rehyat_jax.sprites.evaluation import Sample

_FIRST_SEED = 2026


@dataclasses.dataclass(frozen=True)
class _Default:
    clips: int
    waits: tuple[int, ...]
    #: Clips side by side: a CPU gains nothing, an accelerator much.
    batch: int


#: A sample of every part for ten minutes of two cores, and what makes the figures firm.
_ON_CPU = _Default(clips=4, waits=(48,), batch=4)
_ON_ACCELERATOR = _Default(clips=256, waits=(0, 16, 48, 96), batch=64)


@dataclasses.dataclass(frozen=True)
class Sprites:
    """Measure a model of MovingSprites by the prompts that no training sees, print the tables, and write all figures
    as JSON.

    At training length by the per-step sweep and, where the model streams, by the per-chunk one; at eight times the
    longest training length, streamed; and what comes out from behind a pillar, made from a sentence, and going on with
    true clips, so that it is known what went in. Beside the model stand its ceiling (true clips through its
    autoencoder) and controls (the first frame for the whole clip; identities swapped on the way; a stream whose memory
    of the true clip is emptied).
    """

    model: Annotated[str, tyro.conf.arg(metavar="NAME|DIR")] = "mini-sprites"
    """A bundled model's name or a checkpoint's folder."""

    teacher: Annotated[str | None, tyro.conf.arg(metavar="NAME|DIR")] = None
    """The model it was converted from, to measure beside it (its softmax part, per step)."""

    clips: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Clips of training length for each seed, and an eighth as many long ones (1 at least); 0: none. When not given:
    256 on an accelerator, and 4 on a CPU, a small sample."""

    occlusions: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Clips with a pillar for each wait, made from a sentence, and as many that go on with true ones; 0: none. When not
    given: a quarter of the clips (2 at least)."""

    seeds: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """So many times with other prompts and other noise: the tables then show the spread."""

    frames: Annotated[int, tyro.conf.arg(metavar="N")] = 65
    """The training length."""

    long: Annotated[int, tyro.conf.arg(metavar="N")] = 1053
    """Frames of the long clips; 0: none."""

    waits: Annotated[tuple[int, ...] | None, tyro.conf.arg(metavar="N …")] = None
    """Frames that the object waits behind the pillar. When not given: 0, 16, 48 and 96 on an accelerator, 48 alone on a
    CPU."""

    steps: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Number of denoising steps; the model's own when not given."""

    guidance: Annotated[float | None, tyro.conf.arg(metavar="G")] = None
    """Guidance; the model's own when not given."""

    remember: Annotated[str | None, tyro.conf.arg(metavar="steps|LEVEL")] = None
    """What later chunks of a stream see of one, as in ``rehyat generate``; as the model was trained when not given."""

    dtype: Annotated[Literal["float32", "bfloat16"], tyro.conf.arg(metavar="float32|bfloat16")] = "float32"
    """Number format of the transformer and the text encoder."""

    quantize: Annotated[Kind | None, tyro.conf.arg(metavar="int8|int8-weights|fp8")] = None
    """Measure the model in eight bits, as ``rehyat generate`` has them; the teacher stays as it is."""

    quantize_except: Annotated[tuple[str, ...], tyro.conf.arg(metavar="LAYER …")] = ()
    """Layers that --quantize leaves as they are in every block: attn1.to_q, or attn2 for all that is in it."""

    out: Annotated[Path, tyro.conf.arg(metavar="FILE.json")] = Path("sprites.json")
    """Where every figure and the record of the run are to stand; written anew whenever a subject is measured."""

    overwrite: bool = False
    """Replace FILE.json if there is one."""

    mesh: MeshConfig = MeshConfig(fsdp=1)
    """Devices to generate on, over which the model is divided; one when not given."""

    cache_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of compiled programs and prompt embeddings (else $REHYAT_CACHE_DIR, else the user's cache folder)."""


def main(argv: list[str]) -> None:
    """``rehyat eval WORLD …``; there is one world."""
    if not argv or argv[0] in ("-h", "--help"):
        print(
            "usage: rehyat eval sprites [--model NAME|DIR] …\n\nrehyat eval sprites --help tells its arguments.",
            file=sys.stdout if argv else sys.stderr,
        )
        raise SystemExit(0 if argv else 2)
    if argv[0] != "sprites":
        raise RehyatError(f"a model can be measured on sprites, not on {argv[0][:80]!r}")
    options = parse_options(Sprites, argv[1:], command="eval sprites")
    if options.out.suffix.lower() != ".json":
        raise RehyatError(f"--out must end in .json, not {options.out.name!r}")
    with owned_output(options.out, command="rehyat eval", overwrite=options.overwrite):
        _run(options)


def _run(options: Sprites) -> None:
    with ProgressDisplay() as display:
        display("load", 0, 1)
        from rich.console import Console

        from rehyat_jax.pipeline import TextToVideo
        from rehyat_jax.runtime.record import Phases, write_record
        from rehyat_jax.sprites.evaluation import Measurement, evaluate, to_dict
        from rehyat_jax.sprites.headline import headline

        phases = Phases()
        sample = _sample(options)
        with phases.measure("load"):
            how: dict[str, Any] = {
                "dtype": options.dtype,
                "cache_dir": options.cache_dir,
                "mesh": None if options.mesh.single else options.mesh,
            }
            quantize = named(options.quantize, options.quantize_except)
            pipe = TextToVideo.from_pretrained(options.model, quantize=quantize, **how)
            teacher = None
            if options.teacher is not None:
                teacher = TextToVideo.from_pretrained(options.teacher, hybrid=None, **how)
        for each in (pipe, teacher):
            _check_world(each)
        why = pipe.transformer.why_not_stream()
        if why is not None:
            print(f"rehyat: {why}; the figures of streams are left out", file=sys.stderr)
        display("load", 1, 1)
        sampling = {
            "num_inference_steps": options.steps,
            "guidance_scale": options.guidance,
            "remember": parse_remember(options.remember),
        }
        settings = pipe.settings(num_frames=sample.frames, height=64, width=64, **sampling)
        resolved = (
            dataclasses.asdict(options)
            | dataclasses.asdict(sample)
            | {
                "num_inference_steps": settings.num_inference_steps,
                "guidance_scale": settings.guidance_scale,
                "schedule": dataclasses.asdict(settings.schedule),
                "solver": str(settings.solver),
                "remember": settings.remember,
            }
        )

        def write(found: list[Measurement]) -> None:
            write_record(
                options.out,
                command="rehyat eval sprites",
                settings=resolved,
                phases=phases,
                output=options.out,
                measurements=[to_dict(each) for each in found],
            )

        with phases.measure("evaluate"):
            found = evaluate(pipe, sample, sampling=sampling, teacher=teacher, on_step=display, on_found=write)
    write(found)  # once more, with the time that it took
    console = Console()
    if not console.is_terminal:
        console.width = 120
    for table in headline(found):
        console.print(table)
    print(
        f"{options.model}: {_in_words(sample)}; {settings.num_inference_steps} steps, guidance "
        f"{settings.guidance_scale:g}, seeds {', '.join(map(str, sample.seeds))}; "
        f"all figures are in {options.out}"
    )


def _sample(options: Sprites) -> Sample:
    """
    Raises:
        RehyatError: an impossible number.
    """
    from rehyat_jax.runtime.platform import platform
    from rehyat_jax.sprites.evaluation import Sample

    default = _ON_CPU if platform() == "cpu" else _ON_ACCELERATOR
    clips = default.clips if options.clips is None else options.clips
    waits = default.waits if options.waits is None else options.waits
    occlusions = max(2, clips // 4) if options.occlusions is None else options.occlusions
    for name, value in (("clips", clips), ("occlusions", occlusions)):
        if value != 0 and not 2 <= value <= 1 << 16:
            raise RehyatError(f"--{name} must be 0, or 2 to {1 << 16}, not {value}")
    if not clips and not (occlusions and waits):
        raise RehyatError("nothing is to be measured: --clips and --occlusions (or --waits) are none")
    for name, value, least in (
        ("seeds", options.seeds, 1),
        ("frames", options.frames, 5),
        ("long", options.long, 0),
        *(("waits", wait, 0) for wait in waits),
    ):
        if not least <= value <= 1 << 16:
            raise RehyatError(f"--{name} must be {least} to {1 << 16}, not {value}")
    for name, value in (("frames", options.frames), ("long", options.long)):
        if value and value % 4 != 1:
            raise RehyatError(f"--{name} must be 4k + 1, not {value}")
    return Sample(
        clips=clips,
        long_clips=max(1, clips // 8) if options.long and clips else 0,
        occlusions=occlusions if waits else 0,
        frames=options.frames,
        long_frames=options.long,
        waits=waits,
        seeds=tuple(range(_FIRST_SEED, _FIRST_SEED + options.seeds)),
        batch=default.batch,
    )


def _in_words(sample: Sample) -> str:
    waits = ", ".join(map(str, sample.waits)) or "none"
    return f"{sample.clips} clips, {sample.long_clips} long, {sample.occlusions} for each wait ({waits})"


def _check_world(pipe: TextToVideo | None) -> None:
    """
    Raises:
        RehyatError: the model's frames or sizes cannot be the world's.
    """
    if pipe is None:
        return
    config, patch = pipe.vae.config, pipe.transformer.config.patch_size
    side = config.spatial_factor * patch[1], config.spatial_factor * patch[2]
    if config.temporal_factor != 4 or 64 % side[0] or 64 % side[1] or 96 % side[1]:
        raise RehyatError(
            "this model cannot make clips of 64x64 and 96x64 pixels with 4 frames to a latent frame, as sprites are"
        )

"""What generation asks of a TPU slice that need not be there: a step of a video, or a stream's
chunk, compiled ahead of time for it.

    rehyat plan generate --model wan_14b --topology v6e:2x4 --size 1280x720 --frames 81 --steps 50
    rehyat plan generate --model wan_14b --topology v6e:2x4 --sweep per-chunk

Memory a chip, seconds a step and a video, or a stream's first frame and its pace. All blocks are converted unless
--hybrid says otherwise; bfloat16, one video, the autoencoder in float32 on the first chip unless --vae-devices says
otherwise. What does not fit is refused, and the smallest slice of the kind that does is named. What is called a chip is
one of JAX's devices: of tpu7x half a chip. Needs the compiler, `pip install 'jax[tpu]'`; no weights are read.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax

from rehyat_jax.cli.generate_options import parse_vae_devices
from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.umt5.config import TextEncoderConfig
from rehyat_jax.models.wan.config import VAEConfig, WanConfig
from rehyat_jax.runtime.mesh_config import AXES, MeshConfig
from rehyat_jax.sampling import Euler, FlowSchedule, UniPC, rollout
from rehyat_jax.sampling.settings import Settings
from train.cli.generation_program import GIB, Asked, Plan, planned
from train.cli.plan import Slice, TooLargeError, find_slice

MODELS: dict[str, Callable[[], WanConfig]] = {
    "wan_1_3b": WanConfig.t2v_1_3b,
    "wan_14b": WanConfig.t2v_14b,
    "wan_5b": WanConfig.ti2v_5b,
    "mini_sprites": WanConfig.mini_sprites,
}
#: Slices of each kind, the smallest first.
_SLICES = {
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"),
    "tpu7x": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"),
}
#: Video frames a second that Wan is shown at.
_FPS = 16


def report(asked: Asked, plan: Plan, on: Slice, *, name: str, seconds: float) -> str:
    """A plan in words and figures."""
    gib = {key: size / GIB for key, size in plan.denoising.compiled.bytes_by_kind().items()}
    mesh = " x ".join(f"{axis} {getattr(plan.mesh, axis)}" for axis in AXES if getattr(plan.mesh, axis) != 1)
    found, decode = plan.denoising, plan.decoding.seconds
    lines = [
        f"{name}: {plan.mesh.count} chips, {mesh or 'one'}; compiled in {seconds:.0f} s",
        f"  memory a chip   {plan.bytes / GIB:.2f} of {on.chip.memory:.2f} GiB: the transformer's part and what it "
        f"keeps {found.argument_bytes / GIB:.2f}, at work {found.temporary_bytes / GIB:.2f}; the text encoder's "
        f"{plan.text_bytes / GIB:.2f}; on {_where(asked)} the VAE {plan.decoding.weights_bytes / GIB:.2f}, at work "
        f"{plan.decoding.work_bytes / GIB:.2f}",
        f"  received a chip {', '.join(f'{kind} {size:.2f} GiB' for kind, size in sorted(gib.items())) or 'nothing'}",
    ]
    what = "a chunk" if asked.streams else "a step"
    lines.append(
        f"  {what:15} {found.seconds:.3f} s: XLA {found.xla:.3f}, kernels {found.kernels:.3f}, waiting for collectives "
        f"{found.collectives:.3f}; {found.utilisation:.1%} of {on.peak / 1e12:.0f} TFLOP/s a chip"
    )
    factor, latents = asked.vae.temporal_factor, asked.shape[0]
    if asked.streams:
        apart = isinstance(asked.vae_devices, int)
        whole = max(found.seconds, latents * decode) if apart else found.seconds + latents * decode
        pace = latents * factor / whole
        lines.append(
            f"  a stream        first frame after {found.seconds + decode:.2f} s; {pace:.1f} frames a second, "
            f"{_FPS} are shown; of a chunk's {whole:.2f} s decoding, {'beside' if apart else 'after'} it, is reckoned "
            f"{latents * decode:.2f}"
        )
    else:
        denoised = asked.settings.num_inference_steps * found.seconds
        lines.append(
            f"  a video         {denoised + latents * decode:.0f} s: {asked.settings.num_inference_steps} steps "
            f"{denoised:.0f}, then decoding {latents * decode:.1f} (reckoned)"
        )
    return "\n".join(lines)


def _where(asked: Asked) -> str:
    match asked.vae_devices:
        case None:
            return "the first chip"
        case "mesh":
            return "each chip"
        case count:
            return f"{count} chips of its own"


def main(argv: list[str]) -> int:
    """``rehyat plan generate --topology NAME …``.

    Raises:
        ConfigError: an impossible model, video, mesh or slice.
        RehyatError: it does not fit.
    """
    parser = argparse.ArgumentParser(
        prog="rehyat plan generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="wan_14b", help=f"one of {', '.join(MODELS)}")
    parser.add_argument("--topology", required=True, help="a slice, as v5e:2x4, v6e:2x4, v5p:2x2x1")
    parser.add_argument("--size", default="832x480", help="WxH")
    parser.add_argument("--frames", type=int, default=81, help="of a whole video")
    parser.add_argument("--steps", type=int, help="50 of a whole video, 4 of a stream")
    parser.add_argument("--guidance", type=float, help="5 of a whole video, 1 (none) of a stream")
    parser.add_argument("--hybrid", default="3+1", help="CHUNK+OVERLAP of all blocks; none: the softmax teacher")
    parser.add_argument("--sweep", choices=("per-step", "per-chunk"), default="per-step")
    parser.add_argument(
        "--vae-tile",
        type=int,
        help="frames are decoded by tiles of so many pixels a side; what waits in the host's memory meanwhile, and its "
        "way there and back, are not counted",
    )
    parser.add_argument(
        "--vae-devices", help="N chips of the VAE's own, or mesh: decoding is reckoned to divide evenly"
    )
    parser.add_argument("--remember", help="per-chunk: steps, or a noise level; 0, one state of finished chunks")
    for axis in AXES:
        parser.add_argument(f"--mesh.{axis}", type=int, dest=axis, help="in place of an automatic mesh")
    given = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    asked = _asked(given)
    begun = time.monotonic()
    try:
        plan = planned(asked, on := find_slice(given.topology))
    except TooLargeError as error:
        raise RehyatError(f"{error}; {_smallest(asked, given.topology)}") from error
    name = f"{given.model} {given.size} on {given.topology}, {given.sweep}"
    print(report(asked, plan, on, name=name, seconds=time.monotonic() - begun), flush=True)
    return 0


def _smallest(asked: Asked, topology: str) -> str:
    """The smallest larger slice of the kind that it fits, in words."""
    kind, _, sides = topology.partition(":")
    chips = math.prod(map(int, sides.split("x")))
    larger = [each for each in _SLICES.get(kind, ()) if math.prod(map(int, each.split("x"))) > chips]
    for each in larger:
        try:
            planned(asked, find_slice(f"{kind}:{each}"))
        except (TooLargeError, ConfigError):
            continue
        return f"{kind}:{each} is the smallest that it fits"
    return (
        f"no slice of {kind} up to {larger[-1]} takes it" if larger else f"larger slices of {kind} are not tried here"
    )


def _asked(given: argparse.Namespace) -> Asked:
    """
    Raises:
        ConfigError: a value is impossible.
    """
    if given.model not in MODELS:
        raise ConfigError(f"--model must be one of {', '.join(MODELS)}, not {given.model[:80]!r}")
    model = MODELS[given.model]()
    vae = VAEConfig.published_for(model)
    if not (size := re.fullmatch(r"(\d{1,5})x(\d{1,5})", given.size)):
        raise ConfigError(f"--size is width x height, as 832x480, not {given.size[:80]!r}")
    width, height = int(size[1]), int(size[2])
    hybrid = None
    if given.hybrid != "none":
        if not (match := re.fullmatch(r"(\d{1,4})\+(\d{1,4})", given.hybrid)):
            raise ConfigError(f"--hybrid must be a chunk and an overlap as 3+1, or none, not {given.hybrid[:80]!r}")
        hybrid = HybridConfig(chunk_frames=int(match[1]), overlap_frames=int(match[2]))
    streams = given.sweep == "per-chunk"
    if streams and hybrid is None:
        raise ConfigError("the softmax teacher cannot stream: --sweep per-chunk needs converted blocks (--hybrid)")
    frames = 1 + vae.temporal_factor * (hybrid.chunk_frames - 1) if streams and hybrid else given.frames
    unit = [vae.spatial_factor * patch for patch in model.patch_size[1:]]
    if not 1 <= frames <= 1 << 14 or (frames - 1) % vae.temporal_factor:
        raise ConfigError(f"--frames must be {vae.temporal_factor}k + 1, not {frames}")
    if not height or not width or height % unit[0] or width % unit[1]:
        raise ConfigError(f"--size must be multiples of {unit[1]} and {unit[0]}, not {width}x{height}")
    least = 4 * vae.spatial_factor
    if given.vae_tile is not None and (given.vae_tile < 1 or given.vae_tile % least):
        raise ConfigError(f"--vae-tile must be a multiple of {least} pixels, not {given.vae_tile}")
    vae_devices = parse_vae_devices(given.vae_devices)
    if given.vae_tile is not None and vae_devices is not None:
        raise ConfigError(
            "--vae-tile is for one chip, and --vae-devices divide the picture themselves: give one of them"
        )
    steps, guidance = given.steps, given.guidance
    steps = (4 if streams else 50) if steps is None else steps
    if not 1 <= steps <= 1000:
        raise ConfigError(f"--steps must be 1 to 1000, not {steps}")
    remember: Any = "steps"
    if streams and given.remember != "steps":
        remember = rollout.check_context_noise(float(given.remember or 0.0))
    settings = Settings(
        num_frames=frames,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=(1.0 if streams else 5.0) if guidance is None else guidance,
        schedule=FlowSchedule(shift=5.0),
        solver=Euler() if streams else UniPC(),
        remember=remember,
    )
    own = {axis: size for axis in AXES if (size := getattr(given, axis)) is not None}
    mesh = MeshConfig(**{"fsdp": 1, **own}) if own else MeshConfig(automatic=True)
    text = TextEncoderConfig.mini_sprites() if given.model == "mini_sprites" else TextEncoderConfig.umt5_xxl()
    return Asked(
        model=model,
        vae=vae,
        text=text,
        hybrid=hybrid,
        settings=settings,
        streams=streams,
        mesh=mesh,
        vae_tile=given.vae_tile,
        vae_devices=vae_devices,
    )

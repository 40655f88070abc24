"""What generation asks of a TPU slice that need not be there: a step of a video, or a stream's
chunk, compiled ahead of time for it.

    rehyat plan generate --model wan_14b --topology v6e:2x4 --size 1280x720 --frames 81 --steps 50
    rehyat plan generate --model wan_14b --topology v6e:2x4 --sweep per-chunk

Memory a chip, seconds a step and a video, or a stream's first frame and its pace. All blocks are converted unless
--hybrid says otherwise; bfloat16, the autoencoder in float32 on the first chip, one video. What does not fit is
refused, and the smallest slice of the kind that does is named. Needs the compiler, `pip install 'jax[tpu]'`; no weights
are read.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.memory import decoder_bytes
from rehyat_jax.models.umt5.config import TextEncoderConfig
from rehyat_jax.models.umt5.encoder import UMT5Encoder
from rehyat_jax.models.wan.config import VAEConfig, WanConfig
from rehyat_jax.models.wan.sharding import generation_mesh
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.runtime.devices import Devices
from rehyat_jax.runtime.mesh import spec_of
from rehyat_jax.runtime.mesh_config import AXES, MeshConfig
from rehyat_jax.runtime.sharding import on_mesh
from rehyat_jax.sampling import Euler, FlowSchedule, UniPC, codec, programs, rollout
from rehyat_jax.sampling.codec import Codec, to_uint8
from rehyat_jax.sampling.condition import Condition
from rehyat_jax.sampling.noise import video_keys
from rehyat_jax.sampling.session import Session
from rehyat_jax.sampling.settings import Settings
from rehyat_jax.sampling.text import Padded
from rehyat_jax.text.prompt_encoder import TEXT_LENGTH
from train.cli.plan import Estimate, Program, Slice, TooLargeError, estimate, find_slice
from train.engine.arithmetic import forward_flops

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
}
GIB = 2**30
#: Of a chip's peak in bfloat16, that the decoder's convolutions are reckoned to reach: 0.37 was seen on an H200 (107
#: frames a second of 480p at 13.5 TFLOP a latent frame, docs/notebook/performance.md), none on a TPU.
DECODER_SHARE = 0.35
#: Video frames a second that Wan is shown at.
_FPS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be generated."""

    model: WanConfig
    vae: VAEConfig
    text: TextEncoderConfig
    hybrid: HybridConfig | None
    settings: Settings
    streams: bool
    mesh: MeshConfig
    vae_tile: int | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Latent frames (of a chunk, in a stream), rows and columns."""
        size, vae = self.settings, self.vae
        frames = (size.num_frames - 1) // vae.temporal_factor + 1
        return frames, size.height // vae.spatial_factor, size.width // vae.spatial_factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """Of a latent frame, on one chip."""

    seconds: float
    weights_bytes: int
    #: What it keeps of the frames before, and holds at once.
    work_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a slice does of it."""

    mesh: MeshConfig
    #: A step of a whole video, or all steps of a chunk.
    denoising: Estimate
    decoding: Decoding
    #: Of the text encoder's weights, on each chip.
    text_bytes: int

    @property
    def bytes(self) -> int:
        """Of the first chip, at its fullest: all weights stay, and one program runs at a time."""
        weights = self.denoising.argument_bytes + self.decoding.weights_bytes + self.text_bytes
        return weights + max(self.denoising.temporary_bytes, self.decoding.work_bytes)


def planned(asked: Asked, on: Slice) -> Plan:
    """Compile the transformer's program for a slice.

    Raises:
        TooLargeError: it does not fit.
        ConfigError: the model or the video do not divide by the mesh.
    """
    chosen = generation_mesh(
        asked.mesh,
        asked.model,
        hybrid=asked.hybrid,
        devices=len(on.devices),
        rows=asked.settings.guidance.evaluations,
        latent_frames=None if asked.streams else asked.shape[0],
    )
    devices = Devices(chosen.make(on.devices[: chosen.count]))
    make = partial(WanTransformer, asked.model, hybrid=asked.hybrid, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    transformer: Any = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    vae: Any = nnx.eval_shape(lambda: WanVAE(asked.vae, rngs=nnx.Rngs(0)))
    session = Session(transformer=transformer, vae=vae, settings=asked.settings, devices=devices)
    program = (_chunk if asked.streams else _step)(asked, session)
    plan = Plan(
        mesh=chosen,
        denoising=estimate(program, on._replace(devices=on.devices[: chosen.count])),
        decoding=_decoding(asked, session.codec, on),
        text_bytes=_text_bytes(asked.text, devices),
    )
    if plan.bytes / GIB > on.chip.memory:
        held = plan.decoding.work_bytes
        raise TooLargeError(
            f"it does not fit: {plan.bytes / GIB:.1f} GiB of {on.chip.memory:.1f} are needed on the first chip "
            f"({plan.text_bytes / GIB:.1f} for its part of the text encoder, {held / GIB:.1f} while it decodes"
            + (", which --vae-tile 256 makes less)" if asked.vae_tile is None else ")")
        )
    return plan


def _evaluations_flops(asked: Asked, evaluations: int) -> float:
    return float(evaluations * forward_flops(asked.model, asked.hybrid, shape=asked.shape, text_tokens=TEXT_LENGTH))


def _weights(session: Session) -> Any:
    return session.devices.described(session.weights, session.devices.parameter_shardings(session.weights))


def _replicated(session: Session, tree: Any) -> Any:
    return session.devices.described(tree, session.devices.replicated)


def _step(asked: Asked, session: Session) -> Program:
    evaluations = session.sampler.guidance.evaluations
    noise = jax.ShapeDtypeStruct((1, *session.shape), jnp.float32)
    text = jax.ShapeDtypeStruct((evaluations, 1, TEXT_LENGTH, asked.model.text_dim), jnp.float32)
    row = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, session.settings.steps().at(0)))
    state = jax.eval_shape(session.sampler.solver.init, noise)
    given = _replicated(session, (state, row, Padded(text, TEXT_LENGTH)))
    with session.computing():
        lowered = programs.denoise_step.lower(
            _weights(session), *given, Condition(), graph=session.graph, sampler=session.sampler
        )
    return Program(lowered, _evaluations_flops(asked, evaluations), 1, session.devices.shape)


def _chunk(asked: Asked, session: Session) -> Program:
    sampler, mesh, count = session.sampler, session.devices.mesh, asked.settings.num_inference_steps
    assert mesh is not None
    text = jax.ShapeDtypeStruct((sampler.guidance.evaluations, 1, TEXT_LENGTH, asked.model.text_dim), jnp.bfloat16)
    _, height, width, _ = session.shape
    model: Any = session._transformer

    def states_of() -> Any:
        return rollout.init_state(model, sampler, num_steps=count, batch=1, height=height, width=width)

    def read(weights: Any, text: Any) -> Any:
        return rollout.precompute_text_kv(nnx.merge(session.graph, weights), Padded(text, TEXT_LENGTH))

    with session.computing():
        states, text_kv = jax.eval_shape(states_of), jax.eval_shape(read, session.weights, text)
        states = session.devices.described(states, on_mesh(mesh, model.state_specs(states, leading=2)))
        by_heads = jax.tree.map(
            lambda x: NamedSharding(mesh, spec_of(x.shape, None, None, "batch", None, "heads", None)), text_kv
        )
        text_kv = session.devices.described(text_kv, by_heads)
        given = _replicated(
            session,
            jax.eval_shape(
                lambda: (
                    video_keys(0, count=1),
                    jnp.zeros((), jnp.int32),
                    jax.tree.map(jnp.asarray, session.settings.steps()),
                )
            ),
        )
        lowered = programs.denoise_chunk.lower(
            _weights(session),
            states,
            given[0],
            text_kv,
            *given[1:],
            Condition(),
            graph=session.graph,
            shape=session.chunk_shape,
            sampler=sampler,
        )
    evaluations = (count + (asked.settings.remember != "steps")) * sampler.guidance.evaluations
    return Program(lowered, _evaluations_flops(asked, evaluations), 1, session.devices.shape)


def _decoding(asked: Asked, of: Codec, on: Slice) -> Decoding:
    """Counted, not compiled: XLA takes many minutes for the decoder's program on a TPU."""
    latent = jax.ShapeDtypeStruct((1, 1, *asked.shape[1:], asked.vae.z_dim), jnp.float32)
    first = partial(codec.decode_first, graph=of.graph, pixels=to_uint8)
    _, state = jax.eval_shape(first, of.weights, latent)
    lowered = codec.decode_next.lower(of.weights, latent, state, graph=of.graph, pixels=to_uint8)
    counted: Any = lowered.cost_analysis()
    height, width, tile = asked.settings.height, asked.settings.width, asked.vae_tile
    again = 1.0
    if tile is not None and max(height, width) > tile:  # each begins three quarters of a tile after the one before
        again = math.prod(
            sum(min(tile, side - start) for start in range(0, side, 3 * tile // 4)) / side for side in (height, width)
        )
        height, width = min(tile, height), min(tile, width)
    return Decoding(
        seconds=again * counted["flops"] / on.peak / DECODER_SHARE,
        weights_bytes=sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(of.weights)),
        work_bytes=decoder_bytes(asked.vae, height=height, width=width),
    )


def _text_bytes(config: TextEncoderConfig, devices: Devices) -> int:
    encoder = nnx.eval_shape(
        lambda: UMT5Encoder(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    )
    state = nnx.state(encoder)
    shards = jax.tree.map(
        lambda x, place: math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize,
        state,
        devices.parameter_shardings(state),
    )
    return sum(jax.tree.leaves(shards))


def report(asked: Asked, plan: Plan, on: Slice, *, name: str, seconds: float) -> str:
    """A plan in words and figures."""
    gib = {key: size / GIB for key, size in plan.denoising.compiled.bytes_by_kind().items()}
    mesh = " x ".join(f"{axis} {getattr(plan.mesh, axis)}" for axis in AXES if getattr(plan.mesh, axis) != 1)
    found, decode = plan.denoising, plan.decoding.seconds
    lines = [
        f"{name}: {plan.mesh.count} chips, {mesh or 'one'}; compiled in {seconds:.0f} s",
        f"  memory a chip   {plan.bytes / GIB:.2f} of {on.chip.memory:.2f} GiB: the transformer's part and what it "
        f"keeps {found.argument_bytes / GIB:.2f}, at work {found.temporary_bytes / GIB:.2f}; the text encoder's "
        f"{plan.text_bytes / GIB:.2f}; on the first chip the VAE {plan.decoding.weights_bytes / GIB:.2f}, at work "
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
        whole = found.seconds + latents * decode
        pace = latents * factor / whole
        lines.append(
            f"  a stream        first frame after {found.seconds + decode:.2f} s; {pace:.1f} frames a second, "
            f"{_FPS} are shown; of a chunk's {whole:.2f} s decoding, after it, is reckoned {latents * decode:.2f}"
        )
    else:
        denoised = asked.settings.num_inference_steps * found.seconds
        lines.append(
            f"  a video         {denoised + latents * decode:.0f} s: {asked.settings.num_inference_steps} steps "
            f"{denoised:.0f}, then decoding {latents * decode:.1f} (reckoned)"
        )
    return "\n".join(lines)


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
    )

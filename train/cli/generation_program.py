"""The programs of generation, compiled ahead of time for a TPU slice that need not be there, and what they take."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

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
from rehyat_jax.runtime.mesh_config import MeshConfig, VaeDevices, devices_left, picture_grid
from rehyat_jax.runtime.sharding import on_mesh
from rehyat_jax.sampling import codec, programs, rollout
from rehyat_jax.sampling.codec import Codec, to_uint8
from rehyat_jax.sampling.condition import Condition
from rehyat_jax.sampling.noise import video_keys
from rehyat_jax.sampling.session import Session
from rehyat_jax.sampling.settings import Settings
from rehyat_jax.sampling.text import Padded
from rehyat_jax.text.prompt_encoder import TEXT_LENGTH
from train.cli.plan import Estimate, Program, Slice, TooLargeError, estimate
from train.engine.arithmetic import forward_flops

GIB = 2**30
#: Of a chip's peak in bfloat16, that the decoder's convolutions are reckoned to reach: 0.37 was seen on an H200 (107
#: frames a second of 480p at 13.5 TFLOP a latent frame, docs/notebook/performance.md), none on a TPU.
DECODER_SHARE = 0.35


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
    vae_devices: VaeDevices | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Latent frames (of a chunk, in a stream), rows and columns."""
        size, vae = self.settings, self.vae
        frames = (size.num_frames - 1) // vae.temporal_factor + 1
        return frames, size.height // vae.spatial_factor, size.width // vae.spatial_factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """Of a latent frame, on one chip, or on each of several."""

    #: Whether those are others than the transformer's.
    apart: bool
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
        """Of the fullest chip, which is the first, or the VAE's: all weights stay, and one program runs at a time."""
        weights = self.denoising.argument_bytes + self.text_bytes
        if self.decoding.apart:
            decoding = self.decoding.weights_bytes + self.decoding.work_bytes
            return max(weights + self.denoising.temporary_bytes, decoding)
        return weights + self.decoding.weights_bytes + max(self.denoising.temporary_bytes, self.decoding.work_bytes)


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
        devices=devices_left(asked.vae_devices, asked.mesh, found=len(on.devices)),
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
        decoding=_decoding(asked, session.codec, on, devices=chosen.count),
        text_bytes=_text_bytes(asked.text, devices),
    )
    if plan.bytes / GIB > on.chip.memory:
        held = plan.decoding.work_bytes
        raise TooLargeError(
            f"it does not fit: {plan.bytes / GIB:.1f} GiB of {on.chip.memory:.1f} are needed on the fullest chip "
            f"({plan.text_bytes / GIB:.1f} for its part of the text encoder, {held / GIB:.1f} while it decodes"
            + (
                ", which --vae-devices mesh or --vae-tile 256 makes less)"
                if asked.vae_tile is None and asked.vae_devices is None
                else ")"
            )
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


def _decoding(asked: Asked, of: Codec, on: Slice, *, devices: int) -> Decoding:
    """Counted, not compiled: XLA takes many minutes for the decoder's program on a TPU. Of several devices each is
    reckoned an equal part.

    Args:
        devices: the transformer's.

    Raises:
        ConfigError: the devices cannot have equal parts of the picture.
    """
    own = asked.vae_devices
    parts = own if isinstance(own, int) else devices if own == "mesh" else 1
    picture_grid(parts, height=asked.shape[1], width=asked.shape[2])
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
        apart=isinstance(asked.vae_devices, int),
        seconds=again * counted["flops"] / on.peak / DECODER_SHARE / parts,
        weights_bytes=sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(of.weights)),
        work_bytes=decoder_bytes(asked.vae, height=height, width=width) // parts,
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

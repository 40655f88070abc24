"""The compiled programs that a pipeline is made of: a denoising step, a text read, a chunk, a latent frame into pixels.

Each takes a module as its graph and its weights (``nnx.split``), so that one compilation serves any weights; what a
program hands on to its next call is given away (donated).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from rehyat_jax.models.wan.block import TextKV
from rehyat_jax.sampling import Guidance, Solver, Steps, guided_velocity, rollout, sampling_step


@partial(jax.jit, static_argnames=("graph", "solver", "guidance", "text_tokens"), donate_argnames="state")
def denoise_step(
    weights: Any,
    state: Any,
    step: Steps,
    text: Array,
    negative: Array | None,
    *,
    graph: Any,
    solver: Solver,
    guidance: Guidance,
    text_tokens: int | None = None,
) -> Any:
    """The per-step sweep's step: a whole video from one noise level to the next."""
    model = nnx.merge(graph, weights)
    padded = partial(model, text_tokens=text_tokens)
    velocity = guided_velocity(padded, text, negative=negative, guidance=guidance, dtype=model.dtype)
    return sampling_step(velocity, state, step=step, solver=solver)


@partial(jax.jit, static_argnames=("graph", "text_tokens"))
def read_text(
    weights: Any, text: Float[Array, "branches B L D"], *, graph: Any, text_tokens: int | None = None
) -> TextKV:
    """The prompts as `denoise_chunk` takes them: once a prompt, not once a chunk."""
    return rollout.read_text(nnx.merge(graph, weights), text, text_tokens=text_tokens)


@partial(
    jax.jit,
    static_argnames=("graph", "shape", "solver", "guidance", "text_tokens", "remember"),
    donate_argnames="states",
)
def denoise_chunk(
    weights: Any,
    states: Any,
    keys: Array,
    text: TextKV,
    first_frame: Array,
    steps: Steps,
    *,
    graph: Any,
    shape: tuple[int, int, int, int],
    solver: Solver,
    guidance: Guidance,
    text_tokens: int | None = None,
    remember: rollout.Remember = "steps",
) -> tuple[Array, Any]:
    """The per-chunk sweep's chunk, from its noise to its latents: one program for every chunk of a video."""
    noise = rollout.frame_noise(keys, shape, first_frame=first_frame)
    return rollout.denoise_chunk(
        nnx.merge(graph, weights),
        noise,
        text,
        states,
        first_frame=first_frame,
        steps=steps,
        solver=solver,
        guidance=guidance,
        text_tokens=text_tokens,
        remember=remember,
        again=rollout.memory_noise(keys, shape, first_frame=first_frame, remember=remember),
    )


@partial(jax.jit, static_argnames=("graph", "text_tokens", "remember"), donate_argnames="states")
def read_chunk(
    weights: Any,
    states: Any,
    latents: Array,
    keys: Array,
    text: TextKV,
    first_frame: Array,
    steps: Steps,
    *,
    graph: Any,
    text_tokens: int | None = None,
    remember: rollout.Remember = "steps",
) -> Any:
    """The states after a chunk of a video's beginning, which is given."""
    _, frames, height, width, channels = latents.shape
    shape = frames, height, width, channels
    return rollout.read_chunk(
        nnx.merge(graph, weights),
        latents,
        rollout.frame_noise(keys, shape, first_frame=first_frame),
        text,
        states,
        first_frame=first_frame,
        steps=steps,
        text_tokens=text_tokens,
        remember=remember,
        again=rollout.memory_noise(keys, shape, first_frame=first_frame, remember=remember),
    )


@partial(jax.jit, static_argnames=("graph", "frames_per_step"))
def encode(
    weights: Any, video: UInt8[Array, "B F H W 3"], *, graph: Any, frames_per_step: int
) -> Float[Array, "B T h w z"]:
    """A video's latents, as the transformer takes them."""
    vae = nnx.merge(graph, weights)
    latents = vae.encode(video.astype(jnp.float32) / 127.5 - 1, frames_per_step=frames_per_step)
    return vae.normalize(latents.astype(jnp.float32))


@partial(jax.jit, static_argnames=("graph", "pixels"))
def decode_first(weights: Any, latents: Array, *, graph: Any, pixels: Callable[[Array], Array]) -> tuple[Array, Any]:
    """A video's first latent frame, and what the decoder needs of it."""
    vae = nnx.merge(graph, weights)
    video, state = vae.decode_first(vae.denormalize(latents))
    return pixels(video), state


@partial(jax.jit, static_argnames=("graph", "pixels"), donate_argnames="state")
def decode_next(
    weights: Any, latents: Array, state: Any, *, graph: Any, pixels: Callable[[Array], Array]
) -> tuple[Array, Any]:
    """The next latent frame."""
    vae = nnx.merge(graph, weights)
    video, state = vae.decode_next(vae.denormalize(latents), state)
    return pixels(video), state


def decode_on(
    weights: Any,
    latents: Float[Array, "B T h w z"],
    decoder: Any,
    *,
    first: int,
    graph: Any,
    pixels: Callable[[Array], Array],
) -> tuple[list[Array], Any]:
    """Latent frames from number ``first`` of a video on into blocks of pixels, one after the other, and what the
    decoder needs of them; ``decoder``, of the frames before, is given away."""
    blocks = []
    for i in range(latents.shape[1]):
        latent = latents[:, i : i + 1]
        if first + i:
            frames, decoder = decode_next(weights, latent, decoder, graph=graph, pixels=pixels)
        else:
            frames, decoder = decode_first(weights, latent, graph=graph, pixels=pixels)
        blocks.append(frames)
    return blocks, decoder


def to_float(video: Float[Array, "B F H W 3"]) -> Float[Array, "B F H W 3"]:
    """From -1..1 to 0..1, as diffusers' ``VideoProcessor``."""
    return jnp.clip(video.astype(jnp.float32) * 0.5 + 0.5, 0.0, 1.0)


def to_uint8(video: Float[Array, "B F H W 3"]) -> UInt8[Array, "B F H W 3"]:
    return jnp.round(to_float(video) * 255.0).astype(jnp.uint8)

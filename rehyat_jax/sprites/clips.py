"""Clips to be measured: a model's, by either sweep, and true ones through its autoencoder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Shaped, UInt8

from rehyat_jax.attention.linear import LinearState
from rehyat_jax.attention.state import HybridState
from rehyat_jax.errors import RehyatError
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.pipeline import TextToVideo
from rehyat_jax.runtime.platform import precision
from rehyat_jax.sampling.programs import decode_on, denoise_chunk, read_text, to_uint8
from rehyat_jax.sampling.rollout import States, chunk_frames, video_keys
from rehyat_jax.sampling.settings import Settings
from rehyat_jax.streams.prefill import begun
from rehyat_jax.streams.state import StreamState
from rehyat_jax.text.tokenizer import trimmed

Sweep = Literal["per-step", "per-chunk"]
#: Called as (steps done, steps in all).
Progress = Callable[[int, int], None]


def generated(
    pipe: TextToVideo,
    texts: Sequence[str],
    settings: Settings,
    *,
    sweep: Sweep,
    seed: int,
    batch: int,
    progress: Progress,
    beginnings: UInt8[np.ndarray, "B G H W 3"] | None = None,
    emptied: bool = False,
) -> UInt8[np.ndarray, "B F H W 3"]:
    """A clip for each text, the i-th with the noise of ``seed + i``; ``batch`` of them side by side.

    Args:
        beginnings: what each goes on from, part of the clip; of streams alone.
        emptied: a control: after its beginning a stream has lost all but its softmax window.

    Raises:
        RehyatError: the model cannot do this sweep, or the sweep cannot go on from a beginning.
    """
    if beginnings is not None and sweep != "per-chunk":
        raise RehyatError("only a per-chunk sweep goes on from a beginning")
    parts, groups = [], range(0, len(texts), batch)
    for number, begin in enumerate(groups):

        def advanced(done: int, total: int, number: int = number) -> None:
            progress(number * total + done, len(groups) * total)

        some = list(texts[begin : begin + batch])
        if sweep == "per-step":
            parts.append(
                pipe.run(some, settings, seed=seed + begin, on_step=functools.partial(_denoise_only, advanced))
            )
        else:
            beginning = None if beginnings is None else beginnings[begin : begin + batch]
            parts.append(
                _streamed(
                    pipe, some, settings, seed=seed + begin, progress=advanced, beginning=beginning, emptied=emptied
                )
            )
    return np.concatenate(parts)


def _denoise_only(progress: Progress, phase: str, done: int, total: int) -> None:
    if phase == "denoise":
        progress(done, total)


def _streamed(
    pipe: TextToVideo,
    texts: list[str],
    settings: Settings,
    *,
    seed: int,
    progress: Progress,
    beginning: UInt8[np.ndarray, "B G H W 3"] | None,
    emptied: bool,
) -> UInt8[np.ndarray, "B F H W 3"]:
    """Several streams side by side; frames beyond ``settings.num_frames`` are cut off."""
    graph, weights = nnx.split(pipe.transformer)
    vae_graph, vae_weights = nnx.split(pipe.vae)
    chunk, plan = chunk_frames(pipe.transformer), jax.tree.map(jnp.asarray, settings.plan())
    space, time = pipe.vae.config.spatial_factor, pipe.vae.config.temporal_factor
    shape = (chunk, settings.height // space, settings.width // space, pipe.vae.config.z_dim)
    keys = video_keys(seed, count=len(texts))
    total = -(-((settings.num_frames - 1) // time + 1) // chunk)
    blocks: list[np.ndarray] = []
    with precision(pipe.transformer.dtype):
        branches = [jnp.concatenate([pipe.text(text) for text in texts])]
        if settings.guidance.needs_negative:
            branches.append(jnp.repeat(pipe.text(""), len(texts), axis=0))
        state = StreamState.zeros(pipe.transformer, pipe.vae, settings, keys=keys, text=jnp.stack(branches))
        if beginning is not None:
            state, given = begun(state, beginning, transformer=pipe.transformer, vae=pipe.vae, settings=settings)
            blocks.append(given)
        states, decoder, read = (
            state.states,
            state.decoder,
            read_text(weights, trimmed(state.text), graph=graph, text_tokens=state.text.shape[-2]),
        )
        if emptied:
            states = _emptied(states)
        for number in range(int(state.first_frame) // chunk, total):
            latents, states = denoise_chunk(
                weights,
                states,
                keys,
                read,
                jnp.asarray(number * chunk, jnp.int32),
                plan,
                graph=graph,
                shape=shape,
                solver=settings.solver,
                guidance=settings.guidance,
                text_tokens=state.text.shape[-2],
                remember=settings.remember,
            )
            frames, decoder = decode_on(
                vae_weights, latents, decoder, first=number * chunk, graph=vae_graph, pixels=to_uint8
            )
            blocks += [np.asarray(block) for block in frames]
            progress(number + 1, total)
    return np.concatenate(blocks, axis=1)[:, : settings.num_frames]


def _emptied(states: States) -> States:
    """Without what is summed over the past: of a hybrid block, its softmax window is left."""

    def block(state: Any) -> Any:
        if isinstance(state, HybridState | LinearState):
            return state._replace(s=jnp.zeros_like(state.s), z=jnp.zeros_like(state.z))
        return state

    return jax.tree.map(block, states, is_leaf=lambda x: isinstance(x, HybridState | LinearState))


def quantized(video: Float[Array, "B F H W 3"]) -> UInt8[np.ndarray, "B F H W 3"]:
    """From -1..1 to 8 bits."""
    return np.asarray(to_uint8(video))


def through_vae(vae: WanVAE, video: Shaped[np.ndarray, "B F H W 3"], *, batch: int) -> UInt8[np.ndarray, "B F H W 3"]:
    """Clips (8 bits) encoded and decoded: as good as the model's can be."""
    graph, weights = nnx.split(vae)
    parts = (video[begin : begin + batch] for begin in range(0, len(video), batch))
    return np.concatenate([np.asarray(_reconstructed(weights, jnp.asarray(part), graph=graph)) for part in parts])


@functools.partial(jax.jit, static_argnames="graph")
def _reconstructed(weights: Any, video: UInt8[Array, "B F H W 3"], *, graph: Any) -> UInt8[Array, "B F H W 3"]:
    vae = nnx.merge(graph, weights)
    floats = video.astype(jnp.float32) / 127.5 - 1
    return to_uint8(vae.decode(vae.encode(floats, frames_per_step=4), frames_per_step=4))

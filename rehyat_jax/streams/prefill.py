"""A stream that goes on from a given video: what it would carry, had it made these frames."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Shaped, UInt8

from rehyat_jax.errors import RehyatError
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.runtime.platform import precision
from rehyat_jax.sampling.programs import decode_on, encode, read_chunk, read_text, to_uint8
from rehyat_jax.sampling.rollout import chunk_frames
from rehyat_jax.sampling.settings import Settings
from rehyat_jax.streams.state import StreamState
from rehyat_jax.text.tokenizer import trimmed


def begun(
    state: StreamState,
    video: Shaped[np.ndarray, "..."],
    *,
    transformer: WanTransformer,
    vae: WanVAE,
    settings: Settings,
) -> tuple[StreamState, UInt8[np.ndarray, "B F H W 3"]]:
    """The state of a stream after these frames, and the frames as its autoencoder has them.

    They are encoded, and read a chunk at a time, remembered as chunks that the stream makes are.

    Args:
        state: before the first chunk; its arrays are given away.
        video: uint8 [B, F, H, W, 3].

    Raises:
        RehyatError: the frames are not uint8, not of the stream's size, or not whole chunks of latent frames.
    """
    if video.dtype != np.uint8 or video.ndim != 5:
        raise RehyatError(f"a beginning is uint8 [F, H, W, 3], not {video.dtype} {list(video.shape[1:])}")
    chunk, time = chunk_frames(transformer), vae.config.temporal_factor
    if video.shape[2:] != (settings.height, settings.width, 3):
        raise RehyatError(
            f"the beginning is {video.shape[3]}x{video.shape[2]}, and the video {settings.width}x{settings.height}"
        )
    latent_frames, rest = divmod(video.shape[1] - 1, time)
    if rest or (latent_frames + 1) % chunk:
        raise RehyatError(
            f"a beginning has {chunk * time}k - {time - 1} frames ({chunk * time - time + 1}, "
            f"{2 * chunk * time - time + 1}, …), not {video.shape[1]}"
        )
    graph, weights = nnx.split(transformer)
    vae_graph, vae_weights = nnx.split(vae)
    plan, states = jax.tree.map(jnp.asarray, settings.plan()), state.states
    with precision(transformer.dtype):
        read = read_text(weights, trimmed(state.text), graph=graph, text_tokens=state.text.shape[-2])
        latents = encode(vae_weights, jnp.asarray(video), graph=vae_graph, frames_per_step=chunk)
        for first in range(0, latents.shape[1], chunk):
            states = read_chunk(
                weights,
                states,
                latents[:, first : first + chunk],
                state.keys,
                read,
                jnp.asarray(first, jnp.int32),
                plan,
                graph=graph,
                text_tokens=state.text.shape[-2],
                remember=settings.remember,
            )
        blocks, decoder = decode_on(vae_weights, latents, state.decoder, first=0, graph=vae_graph, pixels=to_uint8)
    frames = np.concatenate([np.asarray(block) for block in blocks], axis=1)
    first_frame = jnp.asarray(latents.shape[1], jnp.int32)
    return StreamState(states, decoder, first_frame, state.keys, state.text), frames

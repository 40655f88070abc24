"""Prefill: a stream that goes on from a given video carries what it would, had it made these frames."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt8

from rehyat_jax.errors import RehyatError
from rehyat_jax.runtime import arguments
from rehyat_jax.sampling.session import Session
from rehyat_jax.streams.state import StreamState


def prefill(
    session: Session, state: StreamState, prefix: Shaped[np.ndarray, "..."]
) -> tuple[StreamState, UInt8[np.ndarray, "B F H W 3"]]:
    """The state of a stream after these frames, and the frames as its autoencoder has them.

    They are encoded, and committed a chunk at a time as the chunks are that the stream makes.

    Args:
        state: before the first chunk; its arrays are donated.
        prefix: uint8 [B, F, H, W, 3], one for each of the stream's videos.

    Raises:
        RehyatError: the frames are not uint8, not of the stream's size, or not whole chunks of latent frames.
    """
    chunk = session.chunk_shape[0]
    check_prefix(session, prefix, batch=len(state.keys))
    text_kv = session.precompute_text_kv(state.text, state.condition)
    latents = session.codec.encode(prefix, frames_per_step=chunk)
    states = state.states
    for first in range(0, latents.shape[1], chunk):
        part = latents[:, first : first + chunk]
        place = jnp.asarray(first, jnp.int32)
        states = session.commit_chunk(states, part, state.keys, text_kv, place, state.condition)
    decoded = list(session.codec.decode(latents, state.decoder))
    after = state._replace(states=states, decoder=decoded[-1][1], first_frame=jnp.asarray(latents.shape[1], jnp.int32))
    return after, np.concatenate([np.asarray(frames) for frames, _ in decoded], axis=1)


def rows_of(beginning: Any, *, one: bool) -> Shaped[np.ndarray, "..."]:
    """A beginning as rows: that of ``one`` prompt is a row.

    Raises:
        RehyatError: it is no array.
    """
    if not isinstance(beginning, np.ndarray | Array):
        raise arguments.wrong("beginning", beginning, "an array of frames, or a video's path")
    frames = np.asarray(beginning)
    return frames[None] if one else frames


def check_prefix(session: Session, prefix: Shaped[np.ndarray, "..."], *, batch: int) -> None:
    """
    Raises:
        RehyatError: as `prefill`.
    """
    if prefix.dtype != np.uint8 or prefix.ndim != 5:
        raise RehyatError(f"a beginning is uint8 [F, H, W, 3], not {prefix.dtype} {list(prefix.shape[1:])}")
    if len(prefix) != batch:
        raise RehyatError(f"there are {len(prefix)} beginnings for {batch} prompts")
    settings, chunk, time = session.settings, session.chunk_shape[0], session.codec.config.temporal_factor
    if prefix.shape[2:] != (settings.height, settings.width, 3):
        raise RehyatError(
            f"the beginning is {prefix.shape[3]}x{prefix.shape[2]}, and the video {settings.width}x{settings.height}"
        )
    latent_frames, rest = divmod(prefix.shape[1] - 1, time)
    if rest or (latent_frames + 1) % chunk:
        raise RehyatError(
            f"a beginning has {chunk * time}k - {time - 1} frames ({chunk * time - time + 1}, "
            f"{2 * chunk * time - time + 1}, …), not {prefix.shape[1]}"
        )

"""Clips to be measured: a model's, by either sweep, and true ones through its autoencoder."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8

from rehyat_jax.attention.linear import LinearState
from rehyat_jax.attention.state import HybridState
from rehyat_jax.errors import RehyatError
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.pipeline import TextToVideo
from rehyat_jax.sampling.codec import Codec, to_uint8
from rehyat_jax.sampling.rollout import States
from rehyat_jax.sampling.settings import Settings

Sweep = Literal["per-step", "per-chunk"]
#: Called as (steps done, steps in all).
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Past:
    """What each of some streamed clips goes on from, part of the clip."""

    frames: UInt8[np.ndarray, "B G H W 3"]
    #: A control: after it the stream has lost all but its softmax window.
    emptied: bool = False

    def of(self, rows: slice) -> Past:
        """That of some of the clips."""
        return dataclasses.replace(self, frames=self.frames[rows])


def generated(
    pipe: TextToVideo,
    texts: Sequence[str],
    settings: Settings,
    *,
    sweep: Sweep,
    seed: int,
    batch: int,
    progress: Progress,
    past: Past | None = None,
) -> UInt8[np.ndarray, "B F H W 3"]:
    """A clip for each text, the i-th with the noise of ``seed + i``; ``batch`` of them side by side.

    Raises:
        RehyatError: the model cannot do this sweep, or the sweep cannot go on from a beginning.
    """
    if past is not None and sweep != "per-chunk":
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
            before = None if past is None else past.of(slice(begin, begin + batch))
            parts.append(_streamed(pipe, some, settings, seed=seed + begin, progress=advanced, past=before))
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
    past: Past | None,
) -> UInt8[np.ndarray, "B F H W 3"]:
    """Several streams side by side; frames beyond ``settings.num_frames`` are cut off."""
    stream = pipe.start_stream(texts, settings, seed=seed, beginning=None if past is None else past.frames)
    if past is not None and past.emptied:
        stream.state = stream.state._replace(states=_emptied(stream.state.states))
    blocks: list[np.ndarray] = [] if stream.beginning is None else [stream.beginning]
    chunk = pipe.transformer.chunk_frames() * pipe.vae.config.temporal_factor
    total = -(-(settings.num_frames + pipe.vae.config.temporal_factor - 1) // chunk)
    while stream.frames_done < settings.num_frames:
        blocks.append(next(stream))
        progress(-(-stream.frames_done // chunk), total)
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
    codec, parts = Codec(vae), []
    for begin in range(0, len(video), batch):
        latents = codec.encode(video[begin : begin + batch], frames_per_step=4)
        parts.append(np.concatenate([np.asarray(frames) for frames, _ in codec.decode(latents)], axis=1))
    return np.concatenate(parts)

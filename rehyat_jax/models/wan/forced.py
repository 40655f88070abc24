"""One forward pass of teacher forcing: noisy chunks read the state that another past has written.

Teacher forcing on clips, the replay of a rollout and the reading of a prefix are this function with another past: the
clip, the finished chunks of the rollout, the prefix. Its result on a past that is the noisy video itself is
`WanTransformer.stream` with a time for each frame.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.models.wan.block import TextKV
from rehyat_jax.models.wan.transformer import WanTransformer


class Forced(NamedTuple):
    """What `forced` gives."""

    #: Of the noisy frames; in the compute dtype.
    velocity: Float[Array, "B T h w z"]
    #: After the past's last frame.
    state: Any


def forced(
    model: WanTransformer,
    noisy: Float[Array, "B T h w z"],
    times: Float[Array, "B T"],
    text: TextKV,
    state: Any,
    *,
    past: Float[Array, "B T h w z"],
    past_times: Float[Array, "B T"],
    first_frame: int | Int[Array, ""] = 0,
    text_tokens: int | None = None,
    stop: int = 0,
    remat: bool = True,
) -> Forced:
    """The velocity of every noisy chunk, given ``past``'s chunks before it, and the state after all of ``past``.

    A scan over chunks. In each, the noisy chunk and the past's go through the model side by side, from the one state of
    the past before them; the state after the past's goes on.

    Args:
        noisy, past: latents of the same frames, whole chunks but for a shorter last one.
        times, past_times: diffusion time of each latent frame, 0…1000.
        text: `WanTransformer.read_text`'s.
        state: of the frames before: `WanTransformer.init_stream`'s, or what an earlier call returned.
        first_frame: the first of these latent frames, counted from the video's beginning.
        text_tokens: what `read_text` was told.
        stop: gradients stop at the state after every so many chunks; 0: nowhere, 1: at each, as with a detached cache.
        remat: keep the states between chunks alone for the backward pass, and compute each chunk again there: memory
            then grows by the states' own size for each chunk.

    Raises:
        RehyatError: the model cannot stream.
        ConfigError: ``stop`` is below 0.
    """
    why = model.why_not_stream()
    if why is not None or model.hybrid is None:
        raise RehyatError(why or "")
    if stop < 0:
        raise ConfigError(f"stop must be a number of chunks, or 0 for no stop, not {stop}")
    chunk = model.hybrid.chunk_frames * model.config.patch_size[0]
    count, rest = divmod(noisy.shape[1], chunk)
    rows = noisy.shape[0]
    first_frame = jnp.asarray(first_frame, jnp.int32)
    both = jax.tree.map(partial(_twice, axis=1), text)
    latents = jnp.concatenate([noisy.astype(model.dtype), past.astype(model.dtype)])
    levels = jnp.concatenate([times, past_times]).astype(jnp.float32)

    def one(state: Any, x: tuple[Array, Array, Int[Array, ""]]) -> tuple[Any, Array]:
        latents, levels, number = x
        if stop:
            stopped = jax.lax.stop_gradient(state)
            here = number % stop == 0
            state = jax.tree.map(lambda s, d: jnp.where(here, d, s), state, stopped)
        velocity, after = model.stream(
            latents,
            levels,
            both,
            jax.tree.map(partial(_twice, axis=1), state),
            first_frame=first_frame + number * chunk,
            text_tokens=text_tokens,
        )
        return jax.tree.map(lambda a: a[:, rows:] if a.ndim > 1 else a, after), velocity[:rows]

    step = jax.checkpoint(one) if remat else one

    def chunks(x: Array) -> Array:
        """A leading axis of chunks."""
        whole = x[:, : count * chunk]
        return jnp.moveaxis(whole.reshape(x.shape[0], count, chunk, *x.shape[2:]), 1, 0)

    numbers = jnp.arange(count, dtype=jnp.int32)
    state, velocity = jax.lax.scan(step, state, (chunks(latents), chunks(levels), numbers))
    velocity = jnp.moveaxis(velocity, 0, 1).reshape(rows, count * chunk, *velocity.shape[3:])
    if rest:
        end = latents[:, count * chunk :], levels[:, count * chunk :], jnp.asarray(count, jnp.int32)
        state, last = step(state, end)
        velocity = jnp.concatenate([velocity, last], axis=1)
    return Forced(velocity, state)


def _twice(x: Any, *, axis: int) -> Any:
    """Two times the rows; what is no row's own (the tokens seen so far, a number a layer) as it is."""
    return jnp.concatenate([x, x], axis=axis) if x.ndim > 1 else x

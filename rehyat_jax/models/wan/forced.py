"""One forward pass of teacher forcing: noisy chunks read the state that another past has written.

Teacher forcing on clips, the replay of a rollout and the reading of a prefix are this function with another past: the
clip, the finished chunks of the rollout, the prefix. Its result on a past that is the noisy video itself is
`WanTransformer.stream` with a time for each frame.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.mixers.base import Mixer
from rehyat_jax.models.wan.block import TextKV
from rehyat_jax.models.wan.remat import Keeps
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
    remat: Keeps | None = "nothing",
) -> Forced:
    """The velocity of every noisy chunk, given ``past``'s chunks before it, and the state after all of ``past``.

    One pass over the blocks, on all frames of both side by side. In a block's self-attention a scan over chunks: the
    noisy chunk and the past's read the one state of the past before them, and the state after the past's goes on.

    Args:
        noisy, past: latents of the same frames, whole chunks but for a shorter last one.
        times, past_times: diffusion time of each latent frame, 0…1000.
        text: `WanTransformer.precompute_text_kv`'s.
        state: of the frames before: `WanTransformer.init_state`'s, or what an earlier call returned.
        first_frame: the first of these latent frames, counted from the video's beginning.
        text_tokens: what `precompute_text_kv` was told.
        stop: gradients stop at the state after every so many chunks; 0: nowhere, 1: at each, as with a detached cache.
        remat: compute each block again in the backward pass, from its input and what is named.

    Raises:
        RehyatError: the model cannot stream.
        ConfigError: ``stop`` is below 0.
    """
    why = model.why_not_stream()
    if why is not None or model.hybrid is None:
        raise RehyatError(why or "")
    if stop < 0:
        raise ConfigError(f"stop must be a number of chunks, or 0 for no stop, not {stop}")
    dtype, patch = model.dtype, model.config.patch_size[0]
    latents = beside(noisy.astype(dtype), past.astype(dtype))
    levels = beside(times.astype(jnp.float32), past_times.astype(jnp.float32))
    inputs = model.embed(latents, levels, first_frame=first_frame)
    _, height, width = inputs.grid
    first, chunk = jnp.asarray(first_frame, jnp.int32) // patch, model.mixing.chunk_frames

    def attend(mixer: Mixer, state: Any, q: Array, k: Array, v: Array) -> tuple[Array, Any]:
        return attend_forced(mixer, state, q, k, v, frame=height * width, chunk=chunk, first=first, stop=stop)

    x, state = model.recur(inputs, text, state, attend, text_tokens=text_tokens, text_rows=_twice, remat=remat)
    return Forced(model.unembed(x, inputs)[0::2], state)


def attend_forced(
    mixer: Mixer,
    state: Any,
    q: Float[Array, "R N H D"],
    k: Float[Array, "R N H D"],
    v: Float[Array, "R N H D"],
    *,
    frame: int,
    chunk: int,
    first: int | Int[Array, ""] = 0,
    stop: int = 0,
) -> tuple[Float[Array, "R N H D"], Any]:
    """A block's self-attention on rows that lie side by side (`beside`), and the state after the past's.

    Args:
        state: of the rows of one of the two.
        frame: tokens of one.
        chunk: frames of one.
        first: number of the first frame.
        stop: as of `forced`.
    """
    count, rest = divmod(q.shape[1] // frame, chunk)

    def one(state: Any, x: tuple[tuple[Array, Array, Array], Int[Array, ""]]) -> tuple[Any, Array]:
        qkv, number = x
        if stop:
            here = number % stop == 0
            state = jax.tree.map(lambda s: jnp.where(here, jax.lax.stop_gradient(s), s), state)
        both = mixer.sharded(jax.tree.map(_twice, mixer.sharded(state)))
        y, after = mixer.step(*qkv, both, frame=frame, first=first + number * chunk)
        return jax.tree.map(lambda a: a[1::2] if a.ndim else a, after), y

    def chunks(x: Array) -> Array:
        """A leading axis of chunks."""
        whole = x[:, : count * chunk * frame]
        return jnp.moveaxis(whole.reshape(x.shape[0], count, chunk * frame, *x.shape[2:]), 1, 0)

    parts = []
    if count:
        numbers = jnp.arange(count, dtype=jnp.int32)
        state, y = jax.lax.scan(one, state, ((chunks(q), chunks(k), chunks(v)), numbers))
        parts.append(jnp.moveaxis(y, 0, 1).reshape(q.shape[0], -1, *v.shape[2:]))
    if rest:
        end = q[:, -rest * frame :], k[:, -rest * frame :], v[:, -rest * frame :]
        state, y = one(state, (end, jnp.asarray(count, jnp.int32)))
        parts.append(y)
    return jnp.concatenate(parts, axis=1), state


def beside(noisy: Any, past: Any) -> Any:
    """Rows in turn, so that over devices a row's two are on one."""
    return jnp.stack([noisy, past], axis=1).reshape(2 * len(noisy), *noisy.shape[1:])


def _twice(x: Any) -> Any:
    """Each row two times; what is no row's own (the tokens seen so far) as it is."""
    return beside(x, x) if x.ndim else x

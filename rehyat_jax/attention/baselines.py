"""What hybrid attention is compared with: its softmax window alone, and its linear part alone.

The same walk over chunks, conventions and dtypes; states are pytrees, and calls may be cut at any chunk boundary.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from rehyat_jax.attention.scan import Sums, attend, decayed, empty_sums, enter, over_chunks, ratio, read, window
from rehyat_jax.attention.state import empty_places
from rehyat_jax.errors import ConfigError, RehyatError


class WindowState(NamedTuple):
    """The tokens that the next chunk's window begins with, and the stream's first ones. A pytree."""

    #: The last ``overlap`` tokens, the newest last.
    k: Float[Array, "B O H D"]
    v: Float[Array, "B O H D"]
    #: The first ``sink`` tokens, filled as they leave the window.
    sink_k: Float[Array, "B S H D"]
    sink_v: Float[Array, "B S H D"]
    #: Tokens seen so far, counted no further than overlap + sink.
    seen: Int[Array, ""]

    @classmethod
    def zeros(
        cls, batch: int, *, heads: int, head_dim: int, overlap: int, sink: int = 0, dtype: DTypeLike = jnp.float32
    ) -> WindowState:
        """Nothing seen yet: the same as ``initial_state=None``."""
        last, first = (jnp.zeros((batch, count, heads, head_dim), dtype) for count in (overlap, sink))
        return cls(last, last, first, first, jnp.zeros((), jnp.int32))


@overload
def window_attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    *,
    chunk: int,
    overlap: int,
    sink: int = ...,
    initial_state: WindowState | None = ...,
    return_state: Literal[False] = ...,
) -> Float[Array, "B N H D"]: ...


@overload
def window_attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    *,
    chunk: int,
    overlap: int,
    sink: int = ...,
    initial_state: WindowState | None = ...,
    return_state: Literal[True],
) -> tuple[Float[Array, "B N H D"], WindowState]: ...


def window_attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    *,
    chunk: int,
    overlap: int,
    sink: int = 0,
    initial_state: WindowState | None = None,
    return_state: bool = False,
) -> Float[Array, "B N H D"] | tuple[Float[Array, "B N H D"], WindowState]:
    """Softmax over the query's chunk, the ``overlap`` tokens before it and the stream's first ``sink`` (LongLive,
    arXiv 2509.22622), those among them that are not after the chunk. Forgets the rest.

    Raises:
        ConfigError: an impossible setting.
        RehyatError: arrays or a state that do not fit one another.
    """
    for name, value, least in [("chunk", chunk, 1), ("overlap", overlap, 0), ("sink", sink, 0)]:
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, not {value}")
    _check_alike(q=q, k=k, v=v)
    places = (empty_places(k, overlap), empty_places(v, overlap), empty_places(k, sink), empty_places(v, sink))
    empty = WindowState(*places, seen=jnp.zeros((), jnp.int32))
    _check_state(initial_state, empty)

    def step(state: WindowState, x: Any) -> tuple[WindowState, Array]:
        q, k, v = x
        new, left = q.shape[1], state.seen - overlap
        place = jnp.arange(sink, dtype=jnp.int32)
        keys, values = (jnp.concatenate(pair, axis=1) for pair in [(state.k, k), (state.v, v)])
        softmax = attend(
            q,
            jnp.concatenate([state.sink_k, keys], axis=1),
            jnp.concatenate([state.sink_v, values], axis=1),
            jnp.concatenate([place < left, window(state.seen, overlap, new)]),
        )
        # Of the tokens that leave the window now, place j of the sink takes number j of the stream.
        leaving = place - left
        takes = ((leaving >= 0) & (leaving < new))[None, :, None, None]
        taken = jnp.clip(leaving, 0, new - 1)
        after = WindowState(
            keys[:, new:],
            values[:, new:],
            jnp.where(takes, keys[:, taken], state.sink_k),
            jnp.where(takes, values[:, taken], state.sink_v),
            jnp.minimum(state.seen + new, overlap + sink),
        )
        return after, ratio(softmax.a, softmax.n).astype(v.dtype)

    state, out = over_chunks(step, empty if initial_state is None else initial_state, (q, k, v), chunk)
    return (out, state) if return_state else out


@overload
def linear_attention(
    features_q: Float[Array, "B N H F"],
    features_k: Float[Array, "B N H F"],
    v: Float[Array, "B N H D"],
    *,
    chunk: int,
    causal: bool = ...,
    decay: Float[Array, " H"] | None = ...,
    initial_state: Sums | None = ...,
    return_state: Literal[False] = ...,
) -> Float[Array, "B N H D"]: ...


@overload
def linear_attention(
    features_q: Float[Array, "B N H F"],
    features_k: Float[Array, "B N H F"],
    v: Float[Array, "B N H D"],
    *,
    chunk: int,
    causal: bool = ...,
    decay: Float[Array, " H"] | None = ...,
    initial_state: Sums | None = ...,
    return_state: Literal[True],
) -> tuple[Float[Array, "B N H D"], Sums]: ...


def linear_attention(
    features_q: Float[Array, "B N H F"],
    features_k: Float[Array, "B N H F"],
    v: Float[Array, "B N H D"],
    *,
    chunk: int,
    causal: bool = True,
    decay: Float[Array, " H"] | None = None,
    initial_state: Sums | None = None,
    return_state: bool = False,
) -> Float[Array, "B N H D"] | tuple[Float[Array, "B N H D"], Sums]:
    """``φ_q Σ φ_k vᵀ / φ_q Σ φ_k`` over every token of the query's chunk and those before it, or of all (not causal).

    ``decay`` as in ``hybrid_attention``: the state is multiplied by γ of its head before a chunk is added.

    Raises:
        ConfigError: an impossible setting, or a state or decay where ``causal`` is False.
        RehyatError: arrays or a state that do not fit one another.
    """
    if chunk < 1:
        raise ConfigError(f"chunk must be at least 1, not {chunk}")
    if not causal and (return_state or initial_state is not None or decay is not None):
        raise ConfigError("non-causal linear attention has no past to carry: a state or decay needs causal=True")
    _check_alike(features_q=features_q, features_k=features_k)
    if v.ndim != 4 or v.shape[:3] != features_k.shape[:3]:
        raise RehyatError(f"v is {v.shape} where [batch, tokens, heads] of {features_k.shape} were expected")
    if decay is not None and decay.shape != v.shape[2:3]:
        raise RehyatError(f"decay is {decay.shape} where one number for each of {v.shape[2]} heads was expected")
    empty = empty_sums(features_k, v)
    _check_state(initial_state, empty)

    def step(sums: Sums, x: Any) -> tuple[Sums, Array]:
        features_q, features_k, v = x
        if decay is not None:
            sums = decayed(sums, decay.astype(sums.s.dtype))
        sums = enter(sums, features_k, v)
        return sums, ratio(*read(sums, features_q)).astype(v.dtype)

    state, out = over_chunks(
        step,
        empty if initial_state is None else initial_state,
        (features_q, features_k, v),
        chunk if causal else v.shape[1],
    )
    return (out, state) if return_state else out


def _check_alike(**arrays: jax.Array) -> None:
    (first, like), *others = arrays.items()
    if like.ndim != 4 or like.shape[1] < 1:
        raise RehyatError(f"{first} must be [batch, tokens, heads, width] with at least one token, not {like.shape}")
    for name, array in others:
        if array.shape != like.shape:
            raise RehyatError(f"{name} is {array.shape} where {first} is {like.shape}")


def _check_state(state: Any, empty: Any) -> None:
    if state is None:
        return
    for name, got, want in zip(empty._fields, state, empty, strict=True):
        if (got.shape, got.dtype) != (want.shape, want.dtype):
            raise RehyatError(
                f"the state's {name} is {got.dtype}{list(got.shape)} where {want.dtype}{list(want.shape)} was expected"
            )

"""Attention as a scan over chunks, in plain XLA: one chunk's scores at a time, forward and backward.

The pieces (softmax over a window, the scan itself) are shared with the other mixers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.merge import shares, stabilizer_of
from pallas_kernels.options import Stabilizer
from rehyat_jax.attention.linear import LinearState, product
from rehyat_jax.attention.state import HybridState


class Partial(NamedTuple):
    """Attention over some of the keys, as `pallas_kernels.merge` has it: a and n are to be multiplied by ``e^m``."""

    a: Float[Array, "B H C D"]
    n: Float[Array, "B H C"]
    m: Float[Array, "B H C"]


def scan(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    features_q: Float[Array, "B N H F"],
    features_k: Float[Array, "B N H F"],
    *,
    chunk: int,
    overlap: int,
    causal: bool,
    stabilizer: Stabilizer,
    decay: Float[Array, " H"],
    state: HybridState,
) -> tuple[Float[Array, "B N H D"], HybridState]:
    """Arguments and results of ``reference``, in memory that, beside them, holds one chunk's scores."""

    def later(linear: LinearState, x: Any) -> tuple[LinearState, tuple[Array, Array]]:
        features_q, features_k, v = x
        return linear.update(features_k, v), jax.tree.map(_swapped, linear.read_out(features_q))

    def step(state: HybridState, x: Any) -> tuple[HybridState, Array]:
        (q, k, v, features_q, features_k), after = x
        new = q.shape[1]
        keys, values, features = (
            jnp.concatenate([past, now], axis=1)
            for past, now in [(state.k, k), (state.v, v), (state.features_k, features_k)]
        )
        linear = LinearState(state.s, state.z)
        a, n = linear.read_out(features_q)
        if after is not None:
            a, n = a + _swapped(after[0]), n + _swapped(after[1])
        softmax = attend(q, keys, values, window(state.seen, overlap, new))
        c = stabilizer_of(stabilizer, softmax.m, lambda: softmax.m + stop_gradient(jnp.log(softmax.n)))
        y = merged(softmax, Partial(a, n, c)).astype(v.dtype)
        # Only tokens that leave the window now enter the state; empty places have zero features and add nothing.
        linear = linear.decayed(decay).update(features[:, :new], values[:, :new])
        seen = jnp.minimum(state.seen + new, overlap)
        return HybridState(*linear, keys[:, new:], values[:, new:], features[:, new:], seen), y

    # Once, not in every chunk: an empty place's content would enter the state, and have a gradient.
    held = window(state.seen, overlap, 0)[None, :, None, None]
    state = state._replace(features_k=jnp.where(held, state.features_k, 0))
    after = None
    if not causal:
        # Summed from the end, for "total minus window" would cancel.
        _, after = over_chunks(later, LinearState(state.s, state.z), (features_q, features_k, v), chunk, reverse=True)
    state, y = over_chunks(step, state, ((q, k, v, features_q, features_k), after), chunk)
    return y, state


def over_chunks(
    step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, tokens: Any, chunk: int, *, reverse: bool = False
) -> tuple[Any, Any]:
    """``jax.lax.scan`` of ``step`` over chunks of [B, N, …] arrays, the last one possibly shorter.

    Backward, a chunk is computed again from the carry it began with: those are kept, its scores are not.
    """
    batch, length = jax.tree.leaves(tokens)[0].shape[:2]
    whole = length - length % chunk
    rest = None

    def short(carry: Any) -> tuple[Any, Any]:
        return jax.checkpoint(step)(carry, jax.tree.map(lambda x: x[:, whole:], tokens))

    # [B, N, …] to [chunks, B, chunk, …]; a batch of one is left out, for XLA would copy where nothing moves.
    one = batch == 1

    def cut(x: Array) -> Array:
        parts = x[:, :whole].reshape(batch, -1, chunk, *x.shape[2:])
        return parts[0] if one else parts.swapaxes(0, 1)

    # Around the reshaping: what is kept for the way back is then the scanned arrays themselves, not copies of them.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one_step(carry: Any, x: Any) -> tuple[Any, Any]:
        carry, out = step(carry, jax.tree.map(lambda y: y[None] if one else y, x))
        return carry, jax.tree.map(lambda y: y[0] if one else y, out)

    def joined(x: Array) -> Array:
        parts = x[None] if one else x.swapaxes(0, 1)
        return parts.reshape(batch, whole, *parts.shape[3:])

    if reverse and whole < length:
        carry, rest = short(carry)
    out = None
    if whole:
        carry, out = jax.lax.scan(one_step, carry, jax.tree.map(cut, tokens), reverse=reverse)
        out = jax.tree.map(joined, out)
    if not reverse and whole < length:
        carry, rest = short(carry)
    if out is None or rest is None:
        return carry, rest if out is None else out
    return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), out, rest)


def window(seen: Int[Array, ""], overlap: int, new: int) -> Bool[Array, " W"]:
    """Which of the overlap's places, then the chunk's, hold a token."""
    return jnp.arange(overlap + new, dtype=jnp.int32) >= overlap - seen


def attend(
    q: Float[Array, "B C H D"],
    k: Float[Array, "B W H D"],
    v: Float[Array, "B W H D"],
    visible: Bool[Array, " W"],
) -> Partial:
    """The softmax part."""
    scores = product("bchd,bwhd->bhcw", q, k) * q.shape[-1] ** -0.5
    scores = jnp.where(visible[None, None, None], scores, -jnp.inf)
    m = stop_gradient(scores.max(axis=-1))
    weights = jnp.exp(scores - m[..., None])
    a = product("bhcw,bwhd->bhcd", weights.astype(v.dtype), v)
    return Partial(a, weights.sum(axis=-1), m)


def merged(softmax: Partial, linear: Partial) -> Float[Array, "B C H D"]:
    """One ratio of both parts' numerators and denominators."""
    share = shares(softmax.m, linear.m, linear.n)
    a = softmax.a * share.softmax[..., None] + linear.a * share.linear[..., None]
    return ratio(a, softmax.n * share.softmax + linear.n * share.linear)


def ratio(a: Float[Array, "B H C D"], n: Float[Array, "B H C"]) -> Float[Array, "B C H D"]:
    """a / n, tokens first again."""
    return _swapped(a / n[..., None])


def _swapped(x: Array) -> Array:
    return x.swapaxes(1, 2)

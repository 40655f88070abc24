"""Attention as a walk over chunks, in plain XLA: one chunk's scores at a time, forward and backward.

The pieces are shared with the baselines: softmax over a window, sums of what has left it, and one rule to merge both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float, Int

from rehyat_jax.attention.reference import Stabilizer
from rehyat_jax.attention.state import HybridState, accumulator


class Partial(NamedTuple):
    """Attention over some of the keys: weighted values a and the weights' sum n, both to be multiplied by ``e^m``."""

    a: Float[Array, "B H C D"]
    n: Float[Array, "B H C"]
    m: Float[Array, "B H C"]


class Sums(NamedTuple):
    """The linear part's memory: Σ φ_k(k) vᵀ and Σ φ_k(k)."""

    s: Float[Array, "B H F D"]
    z: Float[Array, "B H F"]


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

    def later(sums: Sums, x: Any) -> tuple[Sums, tuple[Array, Array]]:
        features_q, features_k, v = x
        return enter(sums, features_k, v), jax.tree.map(_swapped, read(sums, features_q))

    def step(state: HybridState, x: Any) -> tuple[HybridState, Array]:
        (q, k, v, features_q, features_k), after = x
        new = q.shape[1]
        keys, values, features = (
            jnp.concatenate([past, now], axis=1)
            for past, now in [(state.k, k), (state.v, v), (state.features_k, features_k)]
        )
        sums = Sums(state.s, state.z)
        a, n = read(sums, features_q)
        if after is not None:
            a, n = a + _swapped(after[0]), n + _swapped(after[1])
        softmax = attend(q, keys, values, window(state.seen, overlap, new))
        y = merged(softmax, stabilized(softmax, a, n, stabilizer)).astype(v.dtype)
        # Only what leaves the window now enters the sums; places still empty have zero features and add nothing.
        sums = enter(decayed(sums, decay), features[:, :new], values[:, :new])
        seen = jnp.minimum(state.seen + new, overlap)
        return HybridState(*sums, keys[:, new:], values[:, new:], features[:, new:], seen), y

    # Once, not in every chunk: what an empty place holds would enter the sums, and have a gradient.
    held = window(state.seen, overlap, 0)[None, :, None, None]
    state = state._replace(features_k=jnp.where(held, state.features_k, 0))
    after = None
    if not causal:
        # Summed from the end, for "total minus window" would cancel.
        _, after = over_chunks(later, Sums(state.s, state.z), (features_q, features_k, v), chunk, reverse=True)
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
    scores = _product("bchd,bwhd->bhcw", q, k) * q.shape[-1] ** -0.5
    scores = jnp.where(visible[None, None, None], scores, -jnp.inf)
    m = stop_gradient(scores.max(axis=-1))
    weights = jnp.exp(scores - m[..., None])
    a = _product("bhcw,bwhd->bhcd", weights.astype(v.dtype), v)
    return Partial(a, weights.sum(axis=-1), m)


def read(sums: Sums, features_q: Float[Array, "B C H F"]) -> tuple[Float[Array, "B H C D"], Float[Array, "B H C"]]:
    """a_L and n_L of queries."""
    return _product("bchf,bhfd->bhcd", features_q, sums.s), _product("bchf,bhf->bhc", features_q, sums.z)


def enter(sums: Sums, features_k: Float[Array, "B C H F"], v: Float[Array, "B C H D"]) -> Sums:
    """The sums with more tokens."""
    # In this order XLA's CPU product takes half the time.
    added = _product("bchd,bchf->bhdf", v, features_k).swapaxes(2, 3)
    return Sums(sums.s + added, sums.z + features_k.sum(axis=1, dtype=sums.z.dtype))


def empty_sums(features_k: Float[Array, "B N H F"], v: Float[Array, "B N H D"]) -> Sums:
    """Sums over no token, sharded as these are."""
    wide = accumulator(features_k.dtype, v.dtype)
    # No number is beyond infinity: zeros, but not to the compiler. XLA's CPU backend reads beyond a product's operand
    # that it knows to be one constant everywhere (docs/notebook/decisions.md).
    z, values = ((x[:, 0] > jnp.inf).astype(wide) for x in (features_k, v))
    return Sums(z[..., None] + values[:, :, None, :], z)


def decayed(sums: Sums, decay: Float[Array, " H"]) -> Sums:
    """The sums, γ of each head times."""
    return Sums(sums.s * decay[None, :, None, None], sums.z * decay[None, :, None])


def stabilized(
    softmax: Partial,
    a: Float[Array, "B H C D"],
    n: Float[Array, "B H C"],
    stabilizer: Stabilizer,
) -> Partial:
    """The linear part beside a softmax part: the stabiliser c is the m that it is said to have."""
    match stabilizer:
        case "row_max":
            m = softmax.m
        case "lse":
            m = softmax.m + stop_gradient(jnp.log(softmax.n))
        case "none":
            m = jnp.zeros_like(softmax.m)
    return Partial(a, n, m)


def merged(softmax: Partial, linear: Partial) -> Float[Array, "B C H D"]:
    """One ratio of both parts' numerators and denominators."""
    # An empty linear part has no say in the common factor, beside which small scores could vanish: 0 / 0.
    common = jnp.where(linear.n == 0, softmax.m, jnp.maximum(softmax.m, linear.m))
    local = jnp.exp(softmax.m - common)
    # With an empty linear part the difference is not bounded by 0, and e to it is multiplied by 0.
    past = jnp.exp(jnp.minimum(linear.m - common, 80))
    a = softmax.a * local[..., None] + linear.a * past[..., None]
    return ratio(a, softmax.n * local + linear.n * past)


def ratio(a: Float[Array, "B H C D"], n: Float[Array, "B H C"]) -> Float[Array, "B C H D"]:
    """a / n, tokens first again."""
    return _swapped(a / n[..., None])


def _swapped(x: Array) -> Array:
    return x.swapaxes(1, 2)


def _product(spec: str, a: Array, b: Array) -> Array:
    wide = accumulator(a.dtype, b.dtype)

    def widened(a: Array, b: Array) -> Array:
        return jnp.einsum(spec, a.astype(wide), b.astype(wide))

    if a.dtype != b.dtype or a.dtype == wide:
        return widened(a, b)
    # XLA's CPU backend has no product of bfloat16 with a float32 sum in every place where one may stand.
    return jax.lax.platform_dependent(
        a, b, cpu=widened, default=lambda a, b: jnp.einsum(spec, a, b, preferred_element_type=wide)
    )

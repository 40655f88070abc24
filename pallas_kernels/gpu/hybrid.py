"""Hybrid attention on GPU: softmax windows by kernels, the sums and their reading by XLA's matrix products."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.gpu.windows import Kernels, Windows, attend
from pallas_kernels.options import Stabilizer

#: Σ φ vᵀ [B, H, T, F, D] and Σ φ [B, H, T, F] of chunks; of one, without T. All products here have a head's tokens
#: together, as the kernel of φ writes features: no pass over memory turns them.
LinearState = tuple[Array, Array]


def hybrid(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    features_q: Float[Array, "B N H F"],
    features_k: Float[Array, "B N H F"],
    *,
    s: Float[Array, "B H F D"],
    z: Float[Array, "B H F"],
    past_k: Float[Array, "B O H D"],
    past_v: Float[Array, "B O H D"],
    past_features_k: Float[Array, "B O H F"],
    seen: Int[Array, ""],
    decay: Float[Array, " H"],
    chunk: int,
    causal: bool,
    stabilizer: Stabilizer,
    kernels: Kernels,
    begins: bool = False,
) -> tuple[Float[Array, "B N H D"], Float[Array, "B H F D"], Float[Array, "B H F"]]:
    """Outputs of v's shape and dtype, and the sums after the last token, float32 as ``s`` and ``z`` are.

    Softmax over the query's ``chunk`` tokens and the O before them, φ_q·φ_k over the tokens before those (and after
    the chunk, without ``causal``), one normaliser. The O tokens before the first are given: the last ``seen`` of their
    places hold one. ``s`` and ``z`` hold what came before them, and fade by ``decay`` with every chunk.
    ``begins``: there is nothing before the first token, whatever is given; no key is then copied.
    Gradients reach every floating argument; the stabiliser has none.

    ReHyAt (arXiv 2601.04342), with the recurrence as it has to be: what leaves the window enters the state.
    """
    overlap, length = past_k.shape[1], q.shape[1]
    windows = Windows(chunk=chunk, overlap=overlap, past=0 if begins else overlap, length=length)
    keys, values = (k, v) if begins else (jnp.concatenate(x, axis=1) for x in ((past_k, k), (past_v, v)))

    # Features of empty places are nothing, and have no gradient.
    held = jnp.arange(overlap, dtype=jnp.int32) >= (overlap if begins else overlap - seen)
    past_features_k = jnp.where(held[None, :, None, None], past_features_k, jnp.zeros_like(past_features_k))
    entering = [_by_chunk(chunk, *x, length=length) for x in ((past_features_k, features_k), (past_v, v))]
    states, last = _states((s, z), _sums(*entering), decay)
    if not causal:
        states = _added(states, _after(_sums(_by_chunk(chunk, features_k), _by_chunk(chunk, v))))
    asked = _by_chunk(chunk, features_q)
    # In the features' dtype, and so backward: else the products there would be of float32.
    a = jnp.einsum("bhtcf,bhtfd->bhtcd", asked, states[0].astype(asked.dtype), precision=_exact(asked))
    n = (asked.astype(jnp.float32) * states[1][:, :, :, None]).sum(axis=4)
    a, n = (x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :length].swapaxes(1, 2) for x in (a, n))

    y = attend(kernels, windows, stabilizer, q, keys, values, jnp.zeros_like(seen) if begins else seen, a, n)
    return y, *last


def _states(first: LinearState, entering: LinearState, decay: Array) -> tuple[LinearState, LinearState]:
    """The sums that each chunk reads, and those after the last: after a chunk they fade, and what left enters."""
    each = [jnp.concatenate([x[:, :, None], y], axis=2) for x, y in zip(first, entering, strict=True)]
    s, z = _faded((each[0], each[1]), decay)
    return (s[:, :, :-1], z[:, :, :-1]), (s[:, :, -1], z[:, :, -1])


@jax.custom_vjp
def _faded(entering: LinearState, decay: Array) -> LinearState:
    """y_t = decay · y_{t-1} + x_t of every chunk t; its gradient is the same sum from the end."""
    return _prefix_sums(entering, decay)


def _prefix_sums(entering: LinearState, decay: Array, *, reverse: bool = False) -> LinearState:
    """In log₂ steps over all chunks.

    Not by `jax.lax.associative_scan`, which makes empty arrays of what depends on no input (the fades): a scan over
    layers computes those once, and as arguments of its body's ``shard_map`` over several devices they break the
    partitioner of JAX 0.11.2 (a segmentation fault in Shardy).
    """
    (s, z), fade, distance = entering, decay, 1

    def before(x: Array) -> Array:
        after = (0, distance) if reverse else (distance, 0)
        kept = x[:, :, distance:] if reverse else x[:, :, :-distance]
        return jnp.pad(kept, ((0, 0), (0, 0), after, *[(0, 0)] * (x.ndim - 3)))

    while distance < s.shape[2]:
        s = s + fade[None, :, None, None, None] * before(s)
        z = z + fade[None, :, None, None] * before(z)
        fade, distance = fade * fade, 2 * distance
    return s, z


def _faded_forward(entering: LinearState, decay: Array) -> tuple[LinearState, Any]:
    sums = _prefix_sums(entering, decay)
    return sums, (sums, decay)


def _faded_backward(kept: tuple[LinearState, Array], cotangents: LinearState) -> tuple[LinearState, Array]:
    sums, decay = kept
    s, z = _prefix_sums(cotangents, decay, reverse=True)
    d_decay = (s[:, :, 1:] * sums[0][:, :, :-1]).sum((0, 2, 3, 4)) + (z[:, :, 1:] * sums[1][:, :, :-1]).sum((0, 2, 3))
    return (s, z), d_decay.astype(decay.dtype)


_faded.defvjp(_faded_forward, _faded_backward)


def _after(own: LinearState) -> LinearState:
    """Of each chunk, the sums of all after it: summed from the end, for "total minus window" would cancel."""

    def after(x: Array) -> Array:
        total = jax.lax.cumsum(x, axis=2, reverse=True)
        return jnp.concatenate([total[:, :, 1:], jnp.zeros_like(x[:, :, :1])], axis=2)

    return after(own[0]), after(own[1])


@jax.custom_vjp
def _sums(features: Float[Array, "B H T C F"], v: Float[Array, "B H T C D"]) -> LinearState:
    """Of each chunk, in float32."""
    return _sums_forward(features, v)[0]


def _sums_forward(features: Array, v: Array) -> tuple[LinearState, Any]:
    return (_product("bhtcf,bhtcd->bhtfd", features, v), features.sum(axis=3, dtype=jnp.float32)), (features, v)


def _sums_backward(kept: tuple[Array, Array], cotangents: LinearState) -> tuple[Array, Array]:
    # With the sums' gradient, and the products, as coarse as the inputs: else they would be of float32.
    features, v = kept
    ds, dz = cotangents
    d_features = jnp.einsum("bhtcd,bhtfd->bhtcf", v, ds.astype(v.dtype), precision=_exact(v))
    d_features = d_features.astype(jnp.float32) + dz[:, :, :, None]
    dv = jnp.einsum("bhtcf,bhtfd->bhtcd", features, ds.astype(features.dtype), precision=_exact(v))
    return d_features.astype(features.dtype), dv.astype(v.dtype)


_sums.defvjp(_sums_forward, _sums_backward)


def _product(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, precision=_exact(a), preferred_element_type=jnp.float32)


def _exact(x: Array) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _added(x: LinearState, y: LinearState) -> LinearState:
    return x[0] + y[0], x[1] + y[1]


def _by_chunk(chunk: int, *parts: Array, length: int | None = None) -> Array:
    """Parts [B, N, H, …], one after the other, to [B, H, chunks, chunk, …]: the first ``length`` tokens, then zeros."""
    x = jnp.concatenate([part.swapaxes(1, 2) for part in parts], axis=2)[:, :, :length]
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % chunk), (0, 0)))
    return x.reshape(*x.shape[:2], -1, chunk, x.shape[3])

"""Full softmax attention, by the best kernel at hand: what an unconverted Wan block does."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rehyat_jax.runtime.platform import platform

#: Query rows whose scores are held at once on the plain XLA path: bounds its memory at any length.
_QUERY_BLOCK = 1024


def softmax_attention(
    query: Float[Array, "B N H D"], key: Float[Array, "B M H D"], value: Float[Array, "B M H D"], *, repeats: int = 1
) -> Float[Array, "B N H D"]:
    """``softmax(query·key / √D) value`` per head, without mask; scores and sums in float32.

    On a GPU in half precision this is cuDNN's flash attention; elsewhere plain XLA over blocks of queries, so that
    memory grows with N and not with N².

    Args:
        repeats: of the last key and value, which stand for so many that are alike: their score gains log ``repeats``.
    """
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    # cuDNN refuses very short key sequences.
    if half and platform() == "gpu" and query.shape[-1] <= 128 and key.shape[1] + repeats > 64:
        if repeats > 1:  # Its scores take a bias in half precision alone, too coarse for a logarithm.
            last = ((0, 0), (0, repeats - 1), (0, 0), (0, 0))
            key, value = (jnp.pad(x, last, mode="edge") for x in (key, value))
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    blocks, rest = divmod(query.shape[1], _QUERY_BLOCK)
    if blocks == 0 or (blocks == 1 and rest == 0):
        return _attend(query, key, value, repeats)
    padded = jnp.pad(query, ((0, 0), (0, -query.shape[1] % _QUERY_BLOCK), (0, 0), (0, 0)))
    stacked = padded.reshape(query.shape[0], -1, _QUERY_BLOCK, *query.shape[2:]).swapaxes(0, 1)
    out = jax.lax.map(jax.checkpoint(lambda q: _attend(q, key, value, repeats)), stacked)
    return out.swapaxes(0, 1).reshape(padded.shape)[:, : query.shape[1]]


def _attend(
    query: Float[Array, "B N H D"], key: Float[Array, "B M H D"], value: Float[Array, "B M H D"], repeats: int
) -> Float[Array, "B N H D"]:
    wide = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
    scores = jnp.einsum("bnhd,bmhd->bhnm", query, key, preferred_element_type=wide) * query.shape[-1] ** -0.5
    if repeats > 1:
        last = np.arange(key.shape[1]) == key.shape[1] - 1
        scores += jnp.asarray(math.log(repeats) * last, wide)[None, None, None]
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, value, preferred_element_type=wide).astype(query.dtype)

"""Hybrid attention on TPU: the arrays laid out by chunk, the states of all chunks at once, then the kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.tpu import attend, sums
from pallas_kernels.tpu.blocks import Blocks, divided

#: Σ v φᵀ [B, H, D, F] and Σ φ [B, H, 1, F]; of all chunks, [B, H, T, …].
Sums = tuple[Array, Array]

# Rows of a block: a tile of 8 holds rows of 32 bits, or pairs of 16 bits, so 16 suit both.
_ROWS = 16
# Queries are columns of the scores.
_COLUMNS = 128


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
    stabilizer: attend.Stabilizer,
    blocks: Blocks,
    interpret: bool = False,
) -> tuple[Float[Array, "B N H D"], Float[Array, "B H F D"], Float[Array, "B H F"]]:
    """Outputs of v's shape and dtype, and the sums after the last token, float32 as ``s`` and ``z`` are.

    Softmax over the query's ``chunk`` tokens and the O before them, φ_q·φ_k over the tokens before those (and after
    the chunk, without ``causal``), one normaliser. The O tokens before the first are given: the last ``seen`` of their
    places hold one. ``s`` and ``z`` hold what came before them, and fade by ``decay`` with every chunk.
    Gradients reach every floating argument; the stabiliser has none. Windows are laid out one after the other: the
    keys and values take (O + chunk) / chunk times their memory, rounded up to whole blocks.

    ReHyAt (arXiv 2601.04342), with the recurrence as it has to be: what leaves the window enters the state.
    """
    overlap, length = past_k.shape[1], q.shape[1]
    chunks, window = -(-length // chunk), overlap + chunk
    held = jnp.arange(overlap, dtype=jnp.int32) >= overlap - seen
    past_features_k = jnp.where(held[None, :, None, None], past_features_k, 0)

    queries, query_size = divided(chunk, blocks.queries, _COLUMNS)
    queries_backward, size_backward = divided(queries * query_size, blocks.queries_backward, _COLUMNS)
    if queries_backward * size_backward != queries * query_size:
        size_backward = query_size
    key_blocks, key_size = divided(window, blocks.keys, _ROWS)
    residents = -(-key_blocks * key_size // blocks.resident)
    in_resident = -(-key_blocks // residents)
    plan = attend.Plan(
        stabilizer=stabilizer, queries=query_size, queries_backward=size_backward, keys=key_size,
        resident=in_resident * key_size, vmem=blocks.vmem, interpret=interpret,
    )  # fmt: skip
    token_blocks, token_size = divided(chunk, blocks.tokens, _ROWS)
    sums_plan = sums.Plan(tokens=token_size, vmem=blocks.vmem, interpret=interpret)

    def by_chunk(x: Array, size: int) -> Array:
        x = _padded(x.swapaxes(1, 2), 2, chunks * chunk)
        return _padded(x.reshape(*x.shape[:2], chunks, chunk, x.shape[3]), 3, size)

    def summed(features: Array, v: Array) -> tuple[Array, Array]:
        return sums.sums(sums_plan, *(by_chunk(x, token_blocks * token_size) for x in (features, v)))

    keys, values, features = (
        jnp.concatenate([past, new], axis=1) for past, new in [(past_k, k), (past_v, v), (past_features_k, features_k)]
    )
    leaving = summed(features[:, :length], values[:, :length])
    states, (s, z) = _states((s.swapaxes(2, 3), z[:, :, None]), leaving, decay)
    if not causal:
        # Summed from the end, for "total minus window" would cancel.
        added = jax.tree.map(lambda x: jnp.flip(x, axis=2), summed(features_k, v))
        after, _ = _states(jax.tree.map(lambda x: jnp.zeros_like(x[:, :, 0]), added), added, jnp.ones_like(decay))
        states = jax.tree.map(lambda x, y: x + jnp.flip(y, axis=2), states, after)

    first = jnp.arange(chunks, dtype=jnp.int32) * chunk
    bounds = jnp.stack([jnp.maximum(overlap - seen - first, 0), jnp.minimum(overlap + length - first, window)], axis=1)
    keys, values = (
        _windows(x.swapaxes(1, 2), chunk, overlap, chunks, residents * plan.resident) for x in (keys, values)
    )
    out = attend.attend(
        plan, by_chunk(q, queries * query_size), keys, values, by_chunk(features_q, queries * query_size), *states,
        bounds,
    )  # fmt: skip
    out = out[:, :, :, :chunk].reshape(*out.shape[:2], chunks * chunk, out.shape[4])[:, :, :length].swapaxes(1, 2)
    return out, s.swapaxes(2, 3), z[:, :, 0]


def _states(first: Sums, added: Sums, decay: Array) -> tuple[Sums, Sums]:
    """The sums that each chunk reads, of those before the first and what leaves the window with each; and the last."""

    def step(sums: Sums, added: Sums) -> tuple[Sums, Sums]:
        return jax.tree.map(lambda x, y: decay[None, :, None, None] * x + y, sums, added), sums

    last, each = jax.lax.scan(step, first, jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), added))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), each), last


def _windows(x: Array, chunk: int, overlap: int, chunks: int, size: int) -> Array:
    """[B, H, O + N, …] to [B, H, chunks, size, …]: the O tokens before each chunk, the chunk, and zeros."""
    before = -(-overlap // chunk)
    x = jnp.pad(x, ((0, 0), (0, 0), (before * chunk - overlap, 0), (0, 0)))
    x = _padded(x, 2, (before + chunks) * chunk)
    x = x.reshape(*x.shape[:2], before + chunks, chunk, x.shape[3])
    x = jnp.concatenate([x[:, :, i : i + chunks] for i in range(before + 1)], axis=3)
    return _padded(x[:, :, :, before * chunk - overlap :], 3, size)


def _padded(x: Array, axis: int, size: int) -> Array:
    return jnp.pad(x, [(0, size - x.shape[i] if i == axis else 0) for i in range(x.ndim)])

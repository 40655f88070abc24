"""Hybrid attention on TPU: the arrays split by chunk without copies, the states of all chunks at once, the kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.options import Stabilizer
from pallas_kernels.tpu import attend, sums
from pallas_kernels.tpu.blocks import Blocks, divided
from pallas_kernels.tpu.call import TILE

#: Σ v φᵀ [B, H, D, F] and Σ φ [B, H, 1, F]; of all chunks, [B, H, T, …].
LinearState = tuple[Array, Array]

_LANES = 128


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
    blocks: Blocks,
    interpret: bool = False,
) -> tuple[Float[Array, "B N H D"], Float[Array, "B H F D"], Float[Array, "B H F"]]:
    """Outputs of v's shape and dtype, and the sums after the last token, float32 as ``s`` and ``z`` are.

    Softmax over the query's ``chunk`` tokens and the O before them, φ_q·φ_k over the tokens before those (and after
    the chunk, without ``causal``), one normaliser. The O tokens before the first are given: the last ``seen`` of their
    places hold one. ``s`` and ``z`` hold what came before them, and fade by ``decay`` with every chunk.
    Gradients reach every floating argument; the stabiliser has none. Of keys and values, the O tokens before each
    chunk are copied; where the number of tokens is a multiple of ``chunk``, nothing else is.

    ReHyAt (arXiv 2601.04342), with the recurrence as it has to be: what leaves the window enters the state.
    """
    overlap, length = past_k.shape[1], q.shape[1]
    chunks = -(-length // chunk)
    held = jnp.arange(overlap, dtype=jnp.int32) >= overlap - seen
    past_features_k = jnp.where(held[None, :, None, None], past_features_k, 0)
    past_k, past_v, past_features_k = (x.swapaxes(1, 2) for x in (past_k, past_v, past_features_k))
    q, k, v, features_q, features_k = (_by_chunk(x.swapaxes(1, 2), chunk) for x in (q, k, v, features_q, features_k))

    states, last = _states(
        (s.swapaxes(2, 3), z[:, :, None]),
        (past_features_k, past_v),
        (features_k, v),
        decay=decay,
        length=length,
        causal=causal,
        blocks=blocks,
        interpret=interpret,
    )
    first = jnp.arange(chunks, dtype=jnp.int32) * chunk
    segments = [(k, v)]
    if overlap:
        segments += [(_before(past_k, k), _before(past_v, v))]
    # A window that is small enough is put together in VMEM, from tiles; else it is copied here.
    aligned = -(-chunk // TILE) * TILE
    starts: tuple[int, ...] = (0, aligned)[: len(segments)]
    if aligned + overlap > blocks.resident:
        keys, values = (jnp.concatenate(x, axis=3) for x in zip(*segments, strict=True))
        segments, starts, aligned = [(keys, values)], (), chunk
    window = aligned + overlap
    plan = attend.Plan(
        stabilizer=stabilizer,
        starts=starts,
        vmem=blocks.vmem,
        interpret=interpret,
        forward=_sizes(chunk, window, blocks.queries * 2 // q.dtype.itemsize, blocks.keys, blocks.resident),
        backward=_sizes(chunk, window, blocks.queries_backward, blocks.keys_backward, blocks.resident),
    )
    visible = [
        jnp.zeros_like(first),
        jnp.minimum(length - first, chunk),
        aligned + jnp.maximum(overlap - seen - first, 0),
        jnp.full_like(first, window),
    ]
    out = attend.attend(plan, q, tuple(segments), features_q, *states, jnp.stack(visible, axis=1))
    out = out.reshape(*out.shape[:2], -1, out.shape[4])[:, :, :length].swapaxes(1, 2)
    return out, last[0].swapaxes(2, 3), last[1][:, :, 0]


def _sizes(chunk: int, window: int, queries: int, keys: int, resident: int) -> attend.Sizes:
    keys = divided(window, min(keys, resident), TILE)
    blocks = -(-window // keys)
    return attend.Sizes(
        queries=divided(chunk, queries, _LANES), keys=keys, resident=keys * min(blocks, max(resident // keys, 1))
    )


def _states(
    first: LinearState,
    past: tuple[Array, Array],
    tokens: tuple[Array, Array],
    *,
    decay: Array,
    length: int,
    causal: bool,
    blocks: Blocks,
    interpret: bool,
) -> tuple[LinearState, LinearState]:
    """The sums that each chunk reads, and those after the last, of features and values.

    After a chunk the sums fade, and what leaves the window enters: with O = m·chunk + r, the last r tokens of one chunk
    and all but the last r of the next. These are summed apart; of the past, as of chunks before the first.
    """
    overlap, (chunks, chunk) = past[0].shape[2], tokens[0].shape[2:4]
    whole, rest = divmod(overlap, chunk)
    # Not the window's of the last chunk: nothing reads their sums. Everything is "after" some chunk otherwise.
    summed = max(chunks - 1 - whole, 0) if causal else chunks
    plan = sums.Plan(
        chunks=summed,
        split=chunk - rest,
        tokens=divided(chunk, blocks.tokens, TILE),
        vmem=blocks.vmem,
        interpret=interpret,
    )
    parts = sums.sums(plan, *tokens) if summed else ()

    def faded(sums: LinearState) -> LinearState:
        return jax.tree.map(lambda x: decay[None, :, None, None] * x, sums)

    def step(sums: LinearState, entering: LinearState) -> tuple[LinearState, LinearState]:
        return _added(faded(sums), entering), sums

    each, before_last = _chunk(first), first
    if chunks > 1:
        starts = [_chunk(_sum(past, begin, begin + chunk - rest)) for begin in range(rest, overlap, chunk)]
        ends = [_chunk(_sum(past, end - rest, end)) for end in range(rest, overlap + 1, chunk)]
        if parts:
            starts = [*starts, (parts[0][:, :, :, 0], parts[1][:, :, :, 0])]
            ends = [*ends, (parts[0][:, :, :, 1], parts[1][:, :, :, 1])]
        entering = jax.tree.map(
            lambda x, y: jnp.moveaxis(x[:, :, : chunks - 1] + y[:, :, : chunks - 1], 2, 0),
            _joined(starts),
            _joined(ends),
        )
        before_last, each = jax.lax.scan(step, first, entering)
        each = _joined([jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), each), _chunk(before_last)])
    features, v = (x.reshape(*x.shape[:2], chunks * chunk, x.shape[4]) for x in tokens)
    begin = (chunks - 1) * chunk
    last = _added(faded(before_last), _sum(past, min(begin, overlap), min(length, overlap)))
    last = _added(last, _sum((features, v), max(begin - overlap, 0), max(length - overlap, 0)))
    if not causal:
        # Summed from the end, for "total minus window" would cancel.
        own = jax.tree.map(lambda x: jnp.moveaxis(x.sum(axis=3), 2, 0), parts)
        none = jax.tree.map(lambda x: jnp.zeros_like(x[0]), own)
        _, after = jax.lax.scan(lambda sums, own: (_added(sums, own), sums), none, own, reverse=True)
        each = jax.tree.map(lambda x, y: x + jnp.moveaxis(y, 0, 2), each, after)
    return each, last


def _sum(tokens: tuple[Array, Array], begin: int, end: int) -> LinearState:
    """Of a few tokens [B, H, N, …], by XLA: nothing is done where nothing reads it."""
    exact = jax.lax.Precision.HIGHEST if jnp.float32 in [x.dtype for x in tokens] else None
    features, v = (x[:, :, begin:end].astype(jnp.float32) for x in tokens)
    return jnp.einsum("bhnd,bhnf->bhdf", v, features, precision=exact), features.sum(axis=2, keepdims=True)


def _chunk(x: LinearState) -> LinearState:
    return x[0][:, :, None], x[1][:, :, None]


def _joined(x: list[LinearState]) -> LinearState:
    s, z = zip(*x, strict=True)
    return jnp.concatenate(s, axis=2), jnp.concatenate(z, axis=2)


def _added(x: LinearState, y: LinearState) -> LinearState:
    return x[0] + y[0], x[1] + y[1]


def _by_chunk(x: Array, chunk: int) -> Array:
    """[B, H, N, …] to [B, H, chunks, chunk, …], with zeros at the end."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % chunk), (0, 0)))
    return x.reshape(*x.shape[:2], -1, chunk, x.shape[3])


def _before(past: Array, x: Array) -> Array:
    """The O tokens before each chunk: the end of one, then whole ones. ``past`` are those before the first."""
    chunks, chunk = x.shape[2:4]
    whole, rest = divmod(past.shape[2], chunk)
    past = _by_chunk(jnp.pad(past, ((0, 0), (0, 0), (chunk - rest, 0), (0, 0))), chunk)
    pieces = []
    for i in range(0 if rest else 1, whole + 1):
        rows = slice(chunk - rest if i == 0 else 0, chunk)
        earlier, later = past[:, :, i : i + chunks, rows], x[:, :, : max(chunks - (whole + 1 - i), 0), rows]
        pieces.append(jnp.concatenate([earlier, later], axis=2))
    return jnp.concatenate(pieces, axis=3)

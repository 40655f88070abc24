"""Softmax over a window and a linear read beside it, merged, in one pass over the queries; and the way back.

Scores are held transposed, keys by queries: what is said of a query (its maximum, its sum) is then a row, found by
adding registers and applied without moving anything between lanes. Exponentials and logarithms are of base 2.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.tpu.call import COLUMNS_COLUMNS, ROWS_ROWS, call, product

Stabilizer = Literal["row_max", "lse", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of blocks that divide the arrays, and the function computed."""

    stabilizer: Stabilizer
    queries: int
    queries_backward: int
    keys: int
    resident: int
    vmem: int
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    plan: Plan,
    q: Float[Array, "B H T C D"],
    k: Float[Array, "B H T W D"],
    v: Float[Array, "B H T W D"],
    features_q: Float[Array, "B H T C F"],
    s: Float[Array, "B H T D F"],
    z: Float[Array, "B H T 1 F"],
    bounds: Int[Array, "T 2"],
) -> Float[Array, "B H T C D"]:
    """(Σ exp(q·k/√D − c) v + s φ_q) / (Σ exp(q·k/√D − c) + z·φ_q) of each chunk's queries.

    ``bounds`` are the first of the window's keys that is seen, and the first after it that is not. Queries and keys
    are cut into blocks that divide their number: ``plan``. A query that is padding has zeros for its values.
    """
    return _forward(plan, q, k, v, features_q, s, z, bounds)[0]


def _forward(plan: Plan, *arrays: Array) -> tuple[Array, Any]:
    q, k, v, features_q, s, z, bounds = arrays
    batch, heads, chunks, count, width = q.shape
    window, features = k.shape[3], features_q.shape[4]
    grid = (batch, heads, chunks, count // plan.queries, window // plan.resident)
    by_query, by_key, by_chunk = _specs(query=3, key=4)
    out, rows = call(
        functools.partial(_forward_kernel, plan=plan, factor=_factor(width)),
        bounds, q, k, v, features_q, s, z,
        grid=grid, prefetched=1, sequential=2,
        in_specs=[
            by_query(plan.queries, width), by_key(plan.resident, width), by_key(plan.resident, width),
            by_query(plan.queries, features), by_chunk(width, features), by_chunk(1, features),
        ],
        out_specs=[by_query(plan.queries, width), _row_spec(3, plan.queries, query=3)],
        out_shapes=[(q.shape, v.dtype), ((batch, heads, chunks, 3, count), jnp.float32)],
        scratch=[pltpu.VMEM((rows, plan.queries), jnp.float32) for rows in (1, 1, width)],
        flops=batch * heads * chunks * count * (4 * window * width + 2 * features * (width + 1)),
        exponentials=batch * heads * chunks * count * window,
        vmem=plan.vmem, interpret=plan.interpret, name="hybrid_forward",
    )  # fmt: skip
    return out, (*arrays, out, rows)


def _forward_kernel(bounds, q, k, v, features_q, s, z, out, rows, maximum, total, sums, *, plan, factor):
    @pl.when(pl.program_id(4) == 0)
    def _():
        maximum[...] = jnp.full_like(maximum, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    def step(begin, visible):
        here = pl.ds(begin, plan.keys)
        scores = visible(product(k[here, :], q[...], ROWS_ROWS) * factor, -jnp.inf)
        before = maximum[...]
        m = jnp.maximum(before, scores.max(axis=0, keepdims=True))
        weights = jnp.exp2(scores - m)
        rescale = jnp.exp2(before - m)
        maximum[...] = m
        total[...] = rescale * total[...] + weights.sum(axis=0, keepdims=True)
        sums[...] = rescale * sums[...] + product(v[here, :], weights.astype(v.dtype), COLUMNS_COLUMNS)

    _over_keys(bounds, pl.program_id(4), plan, step)

    @pl.when(pl.program_id(4) == pl.num_programs(4) - 1)
    def _():
        phi, m, n = features_q[...], maximum[...], total[...]
        a_linear = product(s[...].astype(phi.dtype), phi, ROWS_ROWS)
        n_linear = product(z[...].astype(phi.dtype), phi, ROWS_ROWS)
        c = {"row_max": m, "lse": m + jnp.log2(n), "none": jnp.zeros_like(m)}[plan.stabilizer]
        # An empty linear part has no say in the common factor, beside which small scores could vanish: 0 / 0.
        common = jnp.where(n_linear == 0, m, jnp.maximum(m, c))
        local = jnp.exp2(m - common)
        # With an empty linear part the difference is not bounded by 0, and 2 to it is multiplied by 0.
        past = jnp.exp2(jnp.minimum(c - common, 115))
        inverse = 1 / (n * local + n_linear * past)
        out[...] = ((sums[...] * local + a_linear * past) * inverse).T.astype(out.dtype)
        rows[0:1, :] = common
        rows[1:2, :] = inverse
        rows[2:3, :] = past


def _backward(plan: Plan, kept: Any, d_out: Array) -> tuple[Array | None, ...]:
    q, k, v, features_q, s, z, bounds, out, rows = kept
    common, inverse, past = (rows[:, :, :, i] for i in range(3))
    d_ratio = d_out.astype(jnp.float32) * inverse[..., None]
    # Of the joint sum of weights, whose cotangent every weight's has in common.
    d_total = (d_ratio * out.astype(jnp.float32)).sum(axis=-1)
    d_softmax = d_ratio.astype(v.dtype)
    d_linear = d_softmax if plan.stabilizer == "row_max" else (d_ratio * past[..., None]).astype(v.dtype)
    dq, dk, dv = _softmax_backward(plan, q, k, v, d_softmax, jnp.stack([common, d_total], axis=3), bounds)
    d_features, ds, dz = _linear_backward(plan, features_q, s, z, d_linear, out)
    return dq, dk, dv, d_features, ds, dz, None


def _softmax_backward(
    plan: Plan, q: Array, k: Array, v: Array, d_softmax: Array, rows: Array, bounds: Array
) -> tuple[Array, Array, Array]:
    batch, heads, chunks, count, width = q.shape
    window, size = k.shape[3], plan.queries_backward
    resident = window // plan.resident
    by_query, by_key, _ = _specs(query=4, key=3)
    dq, dk, dv = call(
        functools.partial(_softmax_backward_kernel, plan=plan, factor=_factor(width), scale=width**-0.5),
        bounds, q, d_softmax, rows, k, v,
        grid=(batch, heads, chunks, resident, count // size), prefetched=1, sequential=2,
        in_specs=[
            by_query(size, width), by_query(size, width), _row_spec(2, size, query=4),
            by_key(plan.resident, width), by_key(plan.resident, width),
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, None, size, width), lambda b, h, t, j, i, _: (j, b, h, t, i, 0)),
            by_key(plan.resident, width), by_key(plan.resident, width),
        ],
        out_shapes=[
            ((resident, *q.shape), q.dtype if resident == 1 else jnp.float32), (k.shape, k.dtype), (v.shape, v.dtype)
        ],
        scratch=[
            pltpu.VMEM((width, size), jnp.float32), *[pltpu.VMEM((plan.resident, width), jnp.float32) for _ in range(2)]
        ],
        flops=10 * batch * heads * chunks * count * window * width,
        exponentials=batch * heads * chunks * count * window,
        vmem=plan.vmem, interpret=plan.interpret, name="hybrid_backward_softmax",
    )  # fmt: skip
    return dq[0] if resident == 1 else dq.sum(axis=0).astype(q.dtype), dk, dv


def _softmax_backward_kernel(
    bounds, q, d_softmax, rows, k, v, dq, dk, dv, dq_sum, dk_sum, dv_sum, *, plan, factor, scale
):
    @pl.when(pl.program_id(4) == 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    dq_sum[...] = jnp.zeros_like(dq_sum)

    def step(begin, visible):
        here = pl.ds(begin, plan.keys)
        scores = visible(product(k[here, :], q[...], ROWS_ROWS) * factor, -jnp.inf)
        weights = jnp.exp2(scores - rows[0:1, :])
        d_scores = weights * (product(v[here, :], d_softmax[...], ROWS_ROWS) - rows[1:2, :])
        d_scores = d_scores.astype(q.dtype)
        dv_sum[here, :] += product(weights.astype(v.dtype), d_softmax[...])
        dk_sum[here, :] += product(d_scores, q[...])
        dq_sum[...] += product(k[here, :], d_scores, COLUMNS_COLUMNS)

    _over_keys(bounds, pl.program_id(3), plan, step)
    dq[...] = (dq_sum[...] * scale).T.astype(dq.dtype)

    @pl.when(pl.program_id(4) == pl.num_programs(4) - 1)
    def _():
        dk[...] = (dk_sum[...] * scale).astype(dk.dtype)
        dv[...] = dv_sum[...].astype(dv.dtype)


def _linear_backward(
    plan: Plan, features_q: Array, s: Array, z: Array, d_linear: Array, out: Array
) -> tuple[Array, Array, Array]:
    batch, heads, chunks, count, features = features_q.shape
    width, size = out.shape[4], plan.queries_backward
    by_query, _, by_chunk = _specs(query=3, key=3)
    d_features, ds, dz = call(
        _linear_backward_kernel, features_q, s, z, d_linear, out,
        grid=(batch, heads, chunks, count // size),
        in_specs=[
            by_query(size, features), by_chunk(width, features), by_chunk(1, features), by_query(size, width),
            by_query(size, width),
        ],
        out_specs=[by_query(size, features), by_chunk(width, features), by_chunk(1, features)],
        out_shapes=[(features_q.shape, features_q.dtype), (s.shape, s.dtype), (z.shape, z.dtype)],
        flops=4 * batch * heads * chunks * count * features * width,
        vmem=plan.vmem, interpret=plan.interpret, name="hybrid_backward_linear",
    )  # fmt: skip
    return d_features, ds, dz


def _linear_backward_kernel(features_q, s, z, d_linear, out, d_features, ds, dz):
    @pl.when(pl.program_id(3) == 0)
    def _():
        ds[...] = jnp.zeros_like(ds)
        dz[...] = jnp.zeros_like(dz)

    phi, d_a = features_q[...], d_linear[...]
    d_n = -(d_a.astype(jnp.float32) * out[...].astype(jnp.float32)).sum(axis=1, keepdims=True)
    d_features[...] = (product(d_a, s[...].astype(d_a.dtype)) + d_n * z[...]).astype(d_features.dtype)
    ds[...] += product(d_a, phi, COLUMNS_COLUMNS)
    dz[...] += (d_n * phi.astype(jnp.float32)).sum(axis=0, keepdims=True)


attend.defvjp(_forward, _backward)


def _factor(width: int) -> float:
    return width**-0.5 * math.log2(math.e)


def _over_keys(bounds: Any, block: Any, plan: Plan, step: Callable[..., None]) -> None:
    """``step`` over the keys of a block of the window that are seen; masked only where some are and some are not."""
    chunk, offset = pl.program_id(2), block * plan.resident
    begin, end = (jnp.clip(bounds[chunk, i] - offset, 0, plan.resident) for i in range(2))

    def masked(j, _):
        def visible(x, hidden):
            key = j * plan.keys + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
            return jnp.where((key >= begin) & (key < end), x, hidden)

        step(j * plan.keys, visible)

    def whole(j, _):
        step(j * plan.keys, lambda x, hidden: x)

    # Of what is not negative; `//` would also compare signs.
    first, last_whole = (jax.lax.div(at, plan.keys) for at in (begin, end))
    first_whole, last = (jax.lax.div(at + (plan.keys - 1), plan.keys) for at in (begin, end))
    middle = jnp.maximum(first_whole, last_whole)
    jax.lax.fori_loop(first, jnp.minimum(first_whole, last), masked, None)
    jax.lax.fori_loop(first_whole, middle, whole, None)
    jax.lax.fori_loop(middle, last, masked, None)


def _specs(*, query: int, key: int) -> tuple[Callable[..., pl.BlockSpec], ...]:
    """Blocks of arrays [B, H, T, …] along the grid's dimensions for queries, for keys, and one for each chunk."""

    def spec(rows: int, columns: int, dimension: int | None) -> pl.BlockSpec:
        def index(*at: Any) -> tuple[Any, ...]:
            return (*at[:3], 0 if dimension is None else at[dimension], 0)

        return pl.BlockSpec((None, None, None, rows, columns), index)

    return tuple(functools.partial(spec, dimension=d) for d in (query, key, None))


def _row_spec(rows: int, columns: int, *, query: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, None, rows, columns), lambda *at: (*at[:3], 0, at[query]))

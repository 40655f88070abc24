"""Softmax over a window and a linear read beside it, merged, in one pass over the queries; and the way back.

Scores are held transposed, keys by queries: what is said of a query (its maximum, its sum) is then a row, found by
adding registers and applied without moving anything between lanes. Exponentials and logarithms are of base 2.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.merge import shares, stabilizer_of
from pallas_kernels.options import KEPT_ATTENTION, Stabilizer
from pallas_kernels.tpu.call import COLUMNS_COLUMNS, ROWS_ROWS, TILE, call, inside, product

#: Keys and values.
Segment = tuple[Float[Array, "B H T _ D"], Float[Array, "B H T _ D"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the blocks of one direction."""

    #: Queries; the last block may overhang the chunk.
    queries: int
    #: Keys whose scores are held at once.
    keys: int
    #: Keys that are in VMEM while all queries pass: a multiple of ``keys``.
    resident: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The function computed, and how."""

    stabilizer: Stabilizer
    forward: Sizes
    backward: Sizes
    #: Where the segments begin in a window that is put together in VMEM and resident as a whole. Empty: there is one
    #: segment, which is in blocks.
    starts: tuple[int, ...]
    vmem: int
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    plan: Plan,
    q: Float[Array, "B H T C D"],
    segments: tuple[Segment, ...],
    features_q: Float[Array, "B H T C F"],
    s: Float[Array, "B H T D F"],
    z: Float[Array, "B H T 1 F"],
    seen: Int[Array, "T 4"],
) -> Float[Array, "B H T C D"]:
    """(Σ exp(q·k/√D − c) v + s φ_q) / (Σ exp(q·k/√D − c) + z·φ_q) of each chunk's queries.

    A chunk's window is its segments, one after the other or, at ``plan.starts``, with gaps. Of it are seen the keys
    from ``seen[t, 0]`` to before ``seen[t, 1]``, and from ``seen[t, 2]`` to before ``seen[t, 3]``.
    """
    return _forward(plan, q, segments, features_q, s, z, seen)[0]


def _forward(plan: Plan, *arguments: Any) -> tuple[Array, Any]:
    q, segments, features_q, s, z, seen = arguments
    batch, heads, chunks, count, width = q.shape
    window, features, sizes = _length(segments), features_q.shape[4], plan.forward
    by_query, by_chunk = _spec(3), _spec(None)
    keys, blocks, scratch = _window(plan, sizes, segments, dimension=4)
    out, rows = call(
        functools.partial(_forward_kernel, plan=plan),
        seen,
        q,
        _scaled(plan, segments),
        features_q,
        s,
        z,
        grid=(batch, heads, chunks, pl.cdiv(count, sizes.queries), blocks),
        prefetched=1,
        sequential=2,
        in_specs=[
            by_query(sizes.queries, width),
            keys,
            by_query(sizes.queries, features),
            by_chunk(width, features),
            by_chunk(1, features),
        ],
        out_specs=[by_query(sizes.queries, width), _row_spec(3, sizes.queries, query=3)],
        out_shapes=[
            jax.ShapeDtypeStruct(q.shape, segments[0][1].dtype),
            jax.ShapeDtypeStruct((batch, heads, chunks, 3, count), jnp.float32),
        ],
        scratch=[*(pltpu.VMEM((rows, sizes.queries), jnp.float32) for rows in (1, 1, 1, width)), scratch],
        flops=batch * heads * chunks * count * (4 * window * width + 2 * features * (width + 1)),
        exponentials=batch * heads * chunks * count * window,
        vmem=plan.vmem,
        interpret=plan.interpret,
        name="hybrid_forward",
    )
    out, rows = (checkpoint_name(x, KEPT_ATTENTION) for x in (out, rows))
    return out, (*arguments, out, rows)


#: By how many powers of two a query's scores may exceed the exponent that its sums lack, before these get another one;
#: and from where on what was summed before is nothing beside one weight: 2⁶ times as many keys as there are below 2⁻²⁴.
_LAG, _NOTHING = 6.0, 64.0


def _forward_kernel(seen, q, segments, features_q, s, z, out, rows, exponent, maximum, total, sums, window, *, plan):
    """Exponentials are of a lagged maximum: a block's weights are 2^(score − exponent) by the largest score of earlier
    blocks, while its own is found beside; seldom is that so much larger that the sums have to be rescaled."""
    k, v = _put_together(plan, segments, window, at=pl.program_id(3))

    def weighted(here, only, exponents):
        """A block's part of the total and the sums, and its largest scores; by exponents or, without, by these."""
        scores = only(product(k[here, :], q[...], ROWS_ROWS), -jnp.inf)
        largest = scores.max(axis=0, keepdims=True)
        weights = jnp.exp2(scores - (largest if exponents is None else exponents))
        values = v[here, :] if plan.starts else only(v[here, :], 0.0)
        part = product(values, weights.astype(v.dtype), COLUMNS_COLUMNS)
        return weights.sum(axis=0, keepdims=True), part, largest

    def begin(here, only):
        total[...], sums[...], maximum[...] = weighted(here, only, None)
        exponent[...] = maximum[...]

    def step(here, only):
        more, part, largest = weighted(here, only, exponent[...])
        total[...] += more
        sums[...] += part
        growth = largest - exponent[...]
        maximum[...] = jnp.maximum(maximum[...], largest)
        _when_grown(growth, functools.partial(grow, here, only))

    def grow(here, only):
        # Of some queries what was added may have overflowed: with so large a growth, this block is all that counts.
        alone, part, largest = weighted(here, only, None)
        growth = largest - exponent[...]
        rescale = jnp.exp2(-growth)
        grown, anew = growth > _LAG, growth > _NOTHING
        total[...] = jnp.where(anew, alone, jnp.where(grown, rescale * total[...], total[...]))
        sums[...] = jnp.where(anew, part, jnp.where(grown, rescale * sums[...], sums[...]))
        exponent[...] = jnp.where(grown, largest, exponent[...])

    _over_keys(seen, pl.program_id(4), plan.forward, step, begin, single=bool(plan.starts))

    @pl.when(pl.program_id(4) == pl.num_programs(4) - 1)
    def _():
        lag = jnp.exp2(exponent[...] - maximum[...])
        phi, m, n = features_q[...], maximum[...], total[...] * lag
        a_linear = product(s[...].astype(phi.dtype), phi, ROWS_ROWS)
        n_linear = product(z[...].astype(phi.dtype), phi, ROWS_ROWS)
        c = stabilizer_of(plan.stabilizer, m, lambda: m + jnp.log2(n))
        common, local, past = shares(m, c, n_linear, base="2")
        inverse = 1 / (n * local + n_linear * past)
        out[...] = ((sums[...] * (local * lag) + a_linear * past) * inverse).T.astype(out.dtype)
        rows[0:1, :] = common
        rows[1:2, :] = inverse
        rows[2:3, :] = past


def _when_grown(growth: Any, grow: Callable[[], None]) -> None:
    """A seldom branch: what overhangs the queries may be no number, and does not count."""
    pl.when(jnp.where(growth > _LAG, 1.0, 0.0).max() > 0)(grow)


def _backward(plan: Plan, kept: Any, d_out: Array) -> tuple[Any, ...]:
    q, segments, features_q, s, z, seen, out, rows = kept
    common, inverse, past = (rows[:, :, :, i] for i in range(3))
    d_ratio = d_out.astype(jnp.float32) * inverse[..., None]
    # Of the joint sum of weights, whose cotangent every weight's has in common.
    d_total = (d_ratio * out.astype(jnp.float32)).sum(axis=-1)
    d_softmax = d_ratio.astype(out.dtype)
    d_linear = d_softmax if plan.stabilizer == "row_max" else (d_ratio * past[..., None]).astype(out.dtype)
    dq, d_segments = _softmax_backward(plan, q, segments, d_softmax, jnp.stack([common, d_total], axis=3), seen)
    d_features, ds, dz = _linear_backward(plan, features_q, s, z, d_linear, out)
    return dq, d_segments, d_features, ds, dz, None


def _softmax_backward(plan: Plan, q: Array, segments: Any, d_softmax: Array, rows: Array, seen: Array) -> Any:
    batch, heads, chunks, count, width = q.shape
    window, sizes = _length(segments), plan.backward
    by_query = _spec(4)
    keys, blocks, scratch = _window(plan, sizes, segments, dimension=3)
    dq, d_segments = call(
        functools.partial(_softmax_backward_kernel, plan=plan, count=count),
        seen,
        q,
        d_softmax,
        rows,
        _scaled(plan, segments),
        grid=(batch, heads, chunks, blocks, pl.cdiv(count, sizes.queries)),
        prefetched=1,
        sequential=2,
        in_specs=[
            by_query(sizes.queries, width),
            by_query(sizes.queries, width),
            _row_spec(2, sizes.queries, query=4),
            keys,
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, None, sizes.queries, width), lambda b, h, t, j, i, _: (j, b, h, t, i, 0)),
            keys,
        ],
        # Part of dq from each of the resident blocks.
        out_shapes=[
            jax.ShapeDtypeStruct((blocks, *q.shape), q.dtype if blocks == 1 else jnp.float32),
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), segments),
        ],
        scratch=[
            pltpu.VMEM((width, sizes.queries), jnp.float32),
            *(pltpu.VMEM((sizes.resident, width), jnp.float32) for _ in range(2)),
            scratch,
        ],
        flops=10 * batch * heads * chunks * count * window * width,
        exponentials=batch * heads * chunks * count * window,
        vmem=plan.vmem,
        interpret=plan.interpret,
        name="hybrid_backward_softmax",
    )
    return dq[0] if blocks == 1 else dq.sum(axis=0).astype(q.dtype), d_segments


def _softmax_backward_kernel(
    seen, q, d_softmax, rows, segments, dq, d_segments, dq_sum, dk_sum, dv_sum, window, *, plan, count
):
    k, v = _put_together(plan, segments, window, at=pl.program_id(4))

    @pl.when(pl.program_id(4) == 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    dq_sum[...] = jnp.zeros_like(dq_sum)
    queries, d_a = (inside(x[...], pl.program_id(4), count) for x in (q, d_softmax))
    common, d_n = (inside(rows[i : i + 1, :], pl.program_id(4), count, axis=1) for i in range(2))

    def step(here, only):
        # A block that overhangs its array may hold anything there.
        keys, values = (x[here, :] if plan.starts else only(x[here, :], 0.0) for x in (k, v))
        weights = jnp.exp2(only(product(keys, queries, ROWS_ROWS), -jnp.inf) - common)
        d_scores = (weights * (product(values, d_a, ROWS_ROWS) - d_n)).astype(q.dtype)
        dv_sum[here, :] += product(weights.astype(v.dtype), d_a)
        dk_sum[here, :] += product(d_scores, queries)
        dq_sum[...] += product(keys, d_scores, COLUMNS_COLUMNS)

    _over_keys(seen, pl.program_id(3), plan.backward, step)
    dq[...] = (dq_sum[...] * math.log(2)).T.astype(dq.dtype)

    @pl.when(pl.program_id(4) == pl.num_programs(4) - 1)
    def _():
        for (dk, dv), start in zip(d_segments, plan.starts or (0,), strict=True):
            own = pl.ds(start, dk.shape[0])
            dk[...] = (dk_sum[own, :] * q.shape[1] ** -0.5).astype(dk.dtype)
            dv[...] = dv_sum[own, :].astype(dv.dtype)


def _linear_backward(plan: Plan, features_q: Array, s: Array, z: Array, d_linear: Array, out: Array) -> Any:
    batch, heads, chunks, count, features = features_q.shape
    width, size = out.shape[4], plan.backward.queries
    by_query, by_chunk = _spec(3), _spec(None)
    return call(
        functools.partial(_linear_backward_kernel, count=count),
        features_q,
        s,
        z,
        d_linear,
        out,
        grid=(batch, heads, chunks, pl.cdiv(count, size)),
        in_specs=[
            by_query(size, features),
            by_chunk(width, features),
            by_chunk(1, features),
            by_query(size, width),
            by_query(size, width),
        ],
        out_specs=[by_query(size, features), by_chunk(width, features), by_chunk(1, features)],
        out_shapes=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (features_q, s, z)],
        flops=4 * batch * heads * chunks * count * features * width,
        vmem=plan.vmem,
        interpret=plan.interpret,
        name="hybrid_backward_linear",
    )


def _linear_backward_kernel(features_q, s, z, d_linear, out, d_features, ds, dz, *, count):
    @pl.when(pl.program_id(3) == 0)
    def _():
        ds[...] = jnp.zeros_like(ds)
        dz[...] = jnp.zeros_like(dz)

    phi, d_a, ratio = (inside(x[...], pl.program_id(3), count) for x in (features_q, d_linear, out))
    d_n = -(d_a.astype(jnp.float32) * ratio.astype(jnp.float32)).sum(axis=1, keepdims=True)
    d_features[...] = (product(d_a, s[...].astype(d_a.dtype)) + d_n * z[...]).astype(d_features.dtype)
    ds[...] += product(d_a, phi, COLUMNS_COLUMNS)
    dz[...] += (d_n * phi.astype(jnp.float32)).sum(axis=0, keepdims=True)


attend.defvjp(_forward, _backward)


def _factor(width: int) -> float:
    return width**-0.5 * math.log2(math.e)


def _scaled(plan: Plan, segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    """With keys times what makes them give the exponents, unless that is done where the window is put together."""
    if plan.starts:
        return segments
    return tuple(((k.astype(jnp.float32) * _factor(k.shape[4])).astype(k.dtype), v) for k, v in segments)


def _length(segments: tuple[Segment, ...]) -> int:
    return sum(k.shape[3] for k, _ in segments)


def _window(plan: Plan, sizes: Sizes, segments: tuple[Segment, ...], *, dimension: int) -> tuple[Any, int, Any]:
    """The segments' specs, the number of resident blocks, and memory for a window that is put together."""
    width = segments[0][0].shape[4]
    if not plan.starts:
        spec = _spec(dimension)(sizes.resident, width)
        return ((spec, spec),), pl.cdiv(_length(segments), sizes.resident), ()
    specs = tuple((_spec(None)(k.shape[3], width),) * 2 for k, _ in segments)
    return specs, 1, tuple(pltpu.VMEM((sizes.resident, width), x.dtype) for x in segments[0])


def _put_together(plan: Plan, segments: Any, window: Any, *, at: Any) -> Any:
    """Keys, times what makes them give the exponents, and values of the window: at the first of its blocks of queries
    copied there, with zeros in between."""
    if not plan.starts:
        return segments[0]

    @pl.when(at == 0)
    def _():
        for scale, whole, parts in zip(
            (_factor(window[0].shape[1]), 1.0), window, zip(*segments, strict=True), strict=True
        ):
            ends = (*plan.starts[1:], whole.shape[0])
            for part, start, end in zip(parts, plan.starts, ends, strict=True):
                # From the tile where the segment ends.
                last = start + part.shape[0] // TILE * TILE
                if last < end:
                    whole[pl.ds(last, end - last), :] = jnp.zeros((end - last, whole.shape[1]), whole.dtype)
                whole[pl.ds(start, part.shape[0]), :] = (part[...].astype(jnp.float32) * scale).astype(whole.dtype)

    return window


def _over_keys(
    seen: Any,
    block: Any,
    sizes: Sizes,
    step: Callable[..., None],
    begin: Callable[..., None] | None = None,
    *,
    single: bool = False,
) -> None:
    """``step`` over those keys of a resident block of which some are seen, given what replaces all else in an array;
    ``begin`` in its place over a window's first keys, some of which every chunk sees; ``single``: there is one resident
    block."""
    seen = [(seen[pl.program_id(2), i], seen[pl.program_id(2), i + 1]) for i in (0, 2)]

    def either(compare: Callable[[Any, Any], Any]) -> Any:
        return functools.reduce(jnp.logical_or, (compare(*ends) for ends in seen))

    def place(j: Any) -> tuple[Any, Any]:
        return block * sizes.resident + j * sizes.keys, pl.ds(pl.multiple_of(j * sizes.keys, TILE), sizes.keys)

    def only(at: Any, x: Array, other: float) -> Array:
        key = at + jax.lax.broadcasted_iota(jnp.int32, (sizes.keys, 1), 0)
        visible = either(lambda begin, end: (begin <= key) & (key < end))
        return jnp.where(visible, x.astype(jnp.float32), other).astype(x.dtype)

    def some(j: Any, carry: None) -> None:
        at, here = place(j)
        whole = either(lambda begin, end: (begin <= at) & (at + sizes.keys <= end))
        partly = either(lambda begin, end: (begin < at + sizes.keys) & (at < end))
        pl.when(whole)(lambda: step(here, lambda x, other: x))
        pl.when(partly & jnp.logical_not(whole))(lambda: step(here, functools.partial(only, at)))

    first: Any = 0
    if begin is not None:
        # Seldom are there several resident blocks.
        first = 1 if single else jnp.where(block == 0, 1, 0)
        pl.when(block == 0)(lambda: begin(place(0)[1], functools.partial(only, 0)))
    jax.lax.fori_loop(first, sizes.resident // sizes.keys, some, None)


def _spec(dimension: int | None) -> Callable[[int, int], pl.BlockSpec]:
    """Blocks of arrays [B, H, T, …] along a dimension of the grid; None: one block for each chunk."""

    def spec(rows: int, columns: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, None, rows, columns),
            lambda *at: (*at[:3], 0 if dimension is None else at[dimension], 0),
        )

    return spec


def _row_spec(rows: int, columns: int, *, query: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, None, rows, columns), lambda *at: (*at[:3], 0, at[query]))

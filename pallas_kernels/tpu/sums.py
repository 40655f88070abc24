"""What tokens add to the state, Σ v φᵀ and Σ φ: of each chunk's first tokens, and of the rest."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.tpu.call import COLUMNS_COLUMNS, ROWS_ROWS, between, call, product


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The function computed, and how."""

    #: Chunks that are summed, from the first.
    chunks: int
    #: First token of a chunk that goes to the second sum.
    split: int
    #: Tokens of a block; the last may overhang the chunk.
    tokens: int
    vmem: int
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sums(
    plan: Plan, features: Float[Array, "B H T C F"], v: Float[Array, "B H T C D"]
) -> tuple[Float[Array, "B H S 2 D F"], Float[Array, "B H S 2 1 F"]]:
    """Σ v φᵀ and Σ φ of the first S = ``plan.chunks`` chunks, before and from the split, in float32."""
    return _forward(plan, features, v)[0]


def _forward(plan: Plan, features: Array, v: Array) -> tuple[tuple[Array, Array], Any]:
    count, width = features.shape[4], v.shape[4]
    shapes = [(*v.shape[:2], plan.chunks, 2, rows, count) for rows in (width, 1)]
    s, z = call(
        functools.partial(_forward_kernel, split=plan.split, count=v.shape[3]),
        features,
        v,
        grid=(*v.shape[:2], plan.chunks, pl.cdiv(v.shape[3], plan.tokens)),
        in_specs=[_tokens(plan, count), _tokens(plan, width)],
        out_specs=[_sums(plan, width, count), _sums(plan, 1, count)],
        out_shapes=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        flops=2 * v.size // v.shape[2] * plan.chunks * count,
        vmem=plan.vmem,
        interpret=plan.interpret,
        name="hybrid_sums",
    )
    return (s, z), (features, v)


def _forward_kernel(features, v, s, z, *, split, count):
    begin = pl.program_id(3) * features.shape[0]

    @pl.when(pl.program_id(3) == 0)
    def _():
        s[...] = jnp.zeros_like(s)
        z[...] = jnp.zeros_like(z)

    def add(i, first, end):
        # The values as well: what overhangs may hold anything.
        phi, values = (between(x[...], first - begin, end - begin) for x in (features, v))
        s[i] += product(values, phi, COLUMNS_COLUMNS)
        z[i] += phi.astype(jnp.float32).sum(axis=0, keepdims=True)

    pl.when(begin < split)(lambda: add(0, 0, split))
    pl.when(begin + features.shape[0] > split)(lambda: add(1, split, count))


def _backward(plan: Plan, kept: Any, cotangents: Any) -> tuple[Array, Array]:
    features, v = kept
    count, width = features.shape[4], v.shape[4]
    return call(
        functools.partial(_backward_kernel, plan=plan),
        features,
        v,
        *cotangents,
        grid=(*v.shape[:3], pl.cdiv(v.shape[3], plan.tokens)),
        in_specs=[_tokens(plan, count), _tokens(plan, width), _sums(plan, width, count), _sums(plan, 1, count)],
        out_specs=[_tokens(plan, count), _tokens(plan, width)],
        out_shapes=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (features, v)],
        flops=4 * v.size // v.shape[2] * plan.chunks * count,
        vmem=plan.vmem,
        interpret=plan.interpret,
        name="hybrid_sums_backward",
    )


def _backward_kernel(features, v, ds, dz, d_features, dv, *, plan):
    begin = pl.program_id(3) * plan.tokens
    summed = pl.program_id(2) < plan.chunks

    @pl.when(jnp.logical_not(summed))
    def _():
        d_features[...] = jnp.zeros_like(d_features)
        dv[...] = jnp.zeros_like(dv)

    def put(i, out, value):
        # The second sum's tokens come after what was written of the first's.
        if i == 1:
            row = jax.lax.broadcasted_iota(jnp.int32, value.shape, 0)
            value = jnp.where(begin + row < plan.split, out[...].astype(jnp.float32), value)
        out[...] = value.astype(out.dtype)

    def part(i):
        put(i, d_features, product(v[...], ds[i].astype(v.dtype)) + dz[i])
        put(i, dv, product(features[...], ds[i].astype(features.dtype), ROWS_ROWS))

    pl.when(summed & (begin < plan.split))(lambda: part(0))
    pl.when(summed & (begin + plan.tokens > plan.split))(lambda: part(1))


sums.defvjp(_forward, _backward)


def _tokens(plan: Plan, columns: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, None, plan.tokens, columns), lambda b, h, t, i: (b, h, t, i, 0))


def _sums(plan: Plan, rows: int, columns: int) -> pl.BlockSpec:
    def index(b, h, t, i):
        return b, h, jnp.minimum(t, plan.chunks - 1), 0, 0, 0

    return pl.BlockSpec((None, None, None, 2, rows, columns), index)

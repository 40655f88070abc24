"""Softmax over windows by Pallas and Triton: any GPU that Triton knows, any length."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array

from pallas_kernels.gpu.windows import Windows, inner


@dataclasses.dataclass(frozen=True, kw_only=True)
class TritonKernels:
    """Sizes of blocks, in tokens, powers of two from 16; None: by the dtype and head dimension."""

    queries: int | None = None
    keys: int | None = None
    queries_backward: int | None = None
    keys_backward: int | None = None
    interpret: bool = False

    def forward(self, windows: Windows, q: Array, k: Array, v: Array, seen: Array) -> tuple[Array, Array, Array]:
        wide = q.dtype == jnp.float32
        call = _Call(windows, q, self.queries or (64 if wide else 128), self.keys or (32 if wide else 64))
        rows = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
        out, total, largest = call(
            _forward,
            (*call.padded(q, k, v), seen[None]),
            [call.like(q, v.dtype), rows, rows],
            grid=call.by_queries,
            warps=8,
            stages=2 if wide else 3,
            interpret=self.interpret,
        )
        return out[..., : q.shape[3]], total, largest

    def backward(
        self, windows: Windows, q: Array, k: Array, v: Array, seen: Array, y: Array, d_y: Array, rows: Array
    ) -> tuple[Array, Array, Array]:
        wide = q.dtype == jnp.float32
        size = self.queries_backward or (32 if wide else 64), self.keys_backward or (32 if wide else 64)
        call = _Call(windows, q, *size)
        arrays = (*call.padded(q, k, v, d_y), rows, inner(d_y, y).swapaxes(1, 2), seen[None])
        options: dict[str, Any] = {"warps": 8 if wide else 4, "stages": 2, "interpret": self.interpret}
        (dq,) = call(_backward_queries, arrays, [call.like(q, q.dtype)], grid=call.by_queries, **options)
        dk, dv = call(
            _backward_keys, arrays, [call.like(k, k.dtype), call.like(v, v.dtype)], grid=call.by_keys, **options
        )
        return tuple(x[..., : q.shape[3]] for x in (dq, dk, dv))


class _Call:
    """What the kernels of one call share."""

    def __init__(self, windows: Windows, q: Array, queries: int, keys: int) -> None:
        self.batch, _, self.heads, self.width = q.shape
        #: Triton's blocks are powers of two.
        self.padded_width = max(pl.next_power_of_2(self.width), 16)
        self.windows, self.queries, self.keys = windows, queries, keys
        self.by_queries = pl.cdiv(windows.chunk, queries) * windows.chunks
        self.by_keys = pl.cdiv(windows.past, keys) + pl.cdiv(windows.chunk, keys) * windows.chunks

    def padded(self, *arrays: Array) -> tuple[Array, ...]:
        if self.padded_width == self.width:
            return arrays
        return tuple(jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.padded_width - self.width))) for x in arrays)

    def like(self, x: Array, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*x.shape[:3], self.padded_width), dtype)

    def __call__(
        self,
        kernel: Callable[..., None],
        arrays: Any,
        outputs: Any,
        *,
        grid: int,
        warps: int,
        stages: int,
        interpret: bool,
    ) -> Any:
        factor = self.width**-0.5
        return pl.pallas_call(
            functools.partial(
                kernel, windows=self.windows, queries=self.queries, keys=self.keys, factor=factor * math.log2(math.e)
            ),
            grid=(grid, self.heads, self.batch),
            out_shape=outputs,
            interpret=interpret,
            compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
            name="hybrid_windows" + kernel.__name__,
        )(*arrays)


def _forward(q_ref, k_ref, v_ref, seen_ref, out_ref, total_ref, largest_ref, *, windows, queries, keys, factor):
    i, head, sample = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    blocks = pl.cdiv(windows.chunk, queries)
    t, block = _divided(i, blocks)
    first = t * windows.chunk + block * queries
    valid = first + jnp.arange(queries) < windows.end(t)
    q = triton.load(q_ref.at[sample, pl.ds(first, queries), head, :], mask=valid[:, None], other=0.0)
    begin, end = windows.keys(t, seen_ref[0])

    def step(at, carry, masked):
        out, total, largest = carry
        mask = at + jnp.arange(keys) < end
        k, v = (_rows(x, sample, at, keys, head, mask if masked else None) for x in (k_ref, v_ref))
        exponents = _product(q, k, 1, 1) * factor
        if masked:
            exponents = jnp.where(mask[None, :], exponents, -jnp.inf)
        above = jnp.maximum(largest, exponents.max(axis=1))
        weights = jnp.exp2(exponents - above[:, None])
        rescale = jnp.exp2(largest - above)
        out = out * rescale[:, None] + _product(weights.astype(v.dtype), v, 1, 0)
        return out, total * rescale + weights.sum(axis=1), above

    carry = (
        jnp.zeros((queries, v_ref.shape[3]), jnp.float32),
        jnp.zeros(queries, jnp.float32),
        jnp.full(queries, -jnp.inf, jnp.float32),
    )
    whole, _ = _divided(end - begin, keys)
    carry = jax.lax.fori_loop(0, whole, lambda j, carry: step(begin + j * keys, carry, False), carry)
    # All queries of a chunk see its tokens: a window is never empty, though its last block may be.
    out, total, largest = step(begin + whole * keys, carry, True)
    out = (out / total[:, None]).astype(out_ref.dtype)
    triton.store(out_ref.at[sample, pl.ds(first, queries), head, :], out, mask=valid[:, None])
    triton.store(total_ref.at[sample, head, pl.ds(first, queries)], largest + jnp.log2(total), mask=valid)
    triton.store(largest_ref.at[sample, head, pl.ds(first, queries)], largest, mask=valid)


def _backward_queries(
    q_ref, k_ref, v_ref, d_out_ref, rows_ref, delta_ref, seen_ref, dq_ref, *, windows, queries, keys, factor
):
    i, head, sample = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    blocks = pl.cdiv(windows.chunk, queries)
    t, block = _divided(i, blocks)
    first = t * windows.chunk + block * queries
    valid = first + jnp.arange(queries) < windows.end(t)
    q, d_out = (_rows(x, sample, first, queries, head, valid) for x in (q_ref, d_out_ref))
    rows, delta = (
        triton.load(x.at[sample, head, pl.ds(first, queries)], mask=valid, other=0.0) for x in (rows_ref, delta_ref)
    )
    begin, end = windows.keys(t, seen_ref[0])

    def step(at, dq, masked):
        mask = at + jnp.arange(keys) < end
        k, v = (_rows(x, sample, at, keys, head, mask if masked else None) for x in (k_ref, v_ref))
        weights = jnp.exp2(_product(q, k, 1, 1) * factor - rows[:, None])
        d_scores = weights * (_product(d_out, v, 1, 1) - delta[:, None])
        if masked:
            d_scores = jnp.where(mask[None, :], d_scores, 0.0)
        return dq + _product(d_scores.astype(k.dtype), k, 1, 0)

    dq = jnp.zeros((queries, q_ref.shape[3]), jnp.float32)
    whole, _ = _divided(end - begin, keys)
    dq = jax.lax.fori_loop(0, whole, lambda j, dq: step(begin + j * keys, dq, False), dq)
    dq = step(begin + whole * keys, dq, True) * (factor * math.log(2))
    triton.store(dq_ref.at[sample, pl.ds(first, queries), head, :], dq.astype(dq_ref.dtype), mask=valid[:, None])


def _backward_keys(
    q_ref, k_ref, v_ref, d_out_ref, rows_ref, delta_ref, seen_ref, dk_ref, dv_ref, *, windows, queries, keys, factor
):
    i, head, sample = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    past_blocks, key_blocks = pl.cdiv(windows.past, keys), pl.cdiv(windows.chunk, keys)
    query_blocks = pl.cdiv(windows.chunk, queries)
    # The past's blocks, then those of each chunk; tokens of the past are below 0.
    chunk, block = _divided(i - past_blocks, key_blocks)
    before = i < past_blocks
    first = jnp.where(before, i * keys - windows.past, chunk * windows.chunk + block * keys)
    token = first + jnp.arange(keys)
    valid = token < jnp.where(before, 0, windows.end(chunk))
    k, v = (_rows(x, sample, first + windows.past, keys, head, valid) for x in (k_ref, v_ref))
    # The first and the last chunk whose queries see any of them.
    earliest = jnp.where(before, 0, chunk)
    last, _ = _divided(first + keys - 1 + windows.overlap, windows.chunk)
    latest = jnp.minimum(last, windows.chunks - 1)

    def step(j, carry):
        dk, dv = carry
        later, block = _divided(j, query_blocks)
        t = earliest + later
        at = t * windows.chunk + block * queries
        asks = at + jnp.arange(queries) < windows.end(t)
        q, d_out = (_rows(x, sample, at, queries, head, asks) for x in (q_ref, d_out_ref))
        rows, delta = (
            triton.load(x.at[sample, head, pl.ds(at, queries)], mask=asks, other=0.0) for x in (rows_ref, delta_ref)
        )
        begin, _ = windows.keys(t, seen_ref[0])
        visible = (valid & (token + windows.past >= begin))[:, None] & asks[None, :]
        weights = jnp.where(visible, jnp.exp2(_product(k, q, 1, 1) * factor - rows[None, :]), 0.0)
        dv = dv + _product(weights.astype(v.dtype), d_out, 1, 0)
        d_scores = weights * (_product(v, d_out, 1, 1) - delta[None, :])
        return dk + _product(d_scores.astype(q.dtype), q, 1, 0), dv

    none = jnp.zeros((keys, k_ref.shape[3]), jnp.float32)
    count = (latest - earliest + 1) * query_blocks
    dk, dv = jax.lax.fori_loop(0, count, step, (none, none))
    for ref, x in ((dk_ref, dk * (factor * math.log(2))), (dv_ref, dv)):
        out = ref.at[sample, pl.ds(first + windows.past, keys), head, :]
        triton.store(out, x.astype(ref.dtype), mask=valid[:, None])


def _rows(ref: Any, sample: Any, at: Any, count: int, head: Any, mask: Any) -> Array:
    here = ref.at[sample, pl.ds(at, count), head, :]
    return triton.load(here) if mask is None else triton.load(here, mask=mask[:, None], other=0.0)


def _product(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
    )


def _divided(x: Any, by: int) -> tuple[Any, Any]:
    """Quotient and remainder; Triton's own, which are right from 0."""
    divisor = jnp.asarray(by, x.dtype)
    return jax.lax.div(x, divisor), jax.lax.rem(x, divisor)

"""What the TPU kernels share: one way to call them, to multiply, and to treat a block that overhangs its array."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Rows: a tile of 8 holds rows of 32 bits, or pairs of 16 bits.
TILE = 16

# What is contracted of the two operands: rows or columns, as of matrices.
ROWS_COLUMNS = ((1,), (0,))
ROWS_ROWS = ((1,), (1,))
COLUMNS_COLUMNS = ((0,), (0,))


def product(a: jax.Array, b: jax.Array, contracted: tuple[tuple[int], tuple[int]] = ROWS_COLUMNS) -> jax.Array:
    """A product of matrices, summed in float32; float32 operands are not rounded to bfloat16."""
    if a.dtype != b.dtype:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, (contracted, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def between(x: jax.Array, begin: Any, end: Any, axis: int = 0) -> jax.Array:
    """x with zeros in all rows (columns: axis 1) but those from ``begin`` to before ``end``."""
    at = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
    # Chosen in 32 bits, as the positions are.
    return jnp.where((at >= begin) & (at < end), x.astype(jnp.float32), 0).astype(x.dtype)


def inside(x: jax.Array, block: Any, count: int, axis: int = 0) -> jax.Array:
    """A block of an array of ``count`` rows (columns), with zeros for those beyond the end, which hold anything."""
    size = x.shape[axis]
    return x if count % size == 0 else between(x, 0, count - block * size, axis=axis)


def call(
    kernel: Callable[..., None],
    *arrays: Any,
    grid: tuple[int, ...],
    in_specs: Sequence[Any],
    out_specs: Any,
    out_shapes: Any,
    scratch: Sequence[Any] = (),
    prefetched: int = 0,
    sequential: int = 1,
    vmem: int,
    flops: int,
    exponentials: int = 0,
    interpret: bool,
    name: str,
) -> Any:
    """``pl.pallas_call`` over blocks in VMEM; the first ``prefetched`` arrays are integers known before the blocks.

    The last ``sequential`` dimensions of the grid are walked in order. Under ``shard_map`` the results vary over the
    mesh axes that the arguments vary over.
    """
    leaves = jax.tree.leaves(arrays)
    # What any result of all the arguments would vary over.
    varies = jax.eval_shape(lambda *x: sum(jnp.sum(a, dtype=jnp.float32) for a in x), *leaves).manual_axis_type
    shapes = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape.shape, shape.dtype, manual_axis_type=varies), out_shapes
    )
    moved = sum(math.prod(a.shape) * a.dtype.itemsize for a in [*leaves, *jax.tree.leaves(shapes)])
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=prefetched, grid=grid, in_specs=in_specs, out_specs=out_specs, scratch_shapes=scratch
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=[pltpu.PARALLEL] * (len(grid) - sequential) + [pltpu.ARBITRARY] * sequential,
            vmem_limit_bytes=vmem,
        ),
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=exponentials, bytes_accessed=moved),
        interpret=interpret,
        name=name,
    )(*arrays)

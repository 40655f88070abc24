"""What a chunk's tokens add to the state: Σ v φ_kᵀ and Σ φ_k."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.tpu.call import COLUMNS_COLUMNS, ROWS_ROWS, call, product


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Tokens of a block, which divide a chunk's."""

    tokens: int
    vmem: int
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sums(
    plan: Plan, features: Float[Array, "B H T C F"], v: Float[Array, "B H T C D"]
) -> tuple[Float[Array, "B H T D F"], Float[Array, "B H T 1 F"]]:
    """Σ v φᵀ and Σ φ of each chunk, in float32."""
    return _forward(plan, features, v)[0]


def _forward(plan: Plan, features: Array, v: Array) -> tuple[tuple[Array, Array], Any]:
    s, z = _call(
        plan, _forward_kernel, features, v, blocks_in="tt", blocks_out="ss", name="hybrid_sums",
        out_shapes=[
            ((*v.shape[:3], v.shape[4], features.shape[4]), jnp.float32),
            ((*v.shape[:3], 1, features.shape[4]), jnp.float32),
        ],
    )  # fmt: skip
    return (s, z), (features, v)


def _forward_kernel(features, v, s, z):
    @pl.when(pl.program_id(3) == 0)
    def _():
        s[...] = jnp.zeros_like(s)
        z[...] = jnp.zeros_like(z)

    phi = features[...]
    s[...] += product(v[...], phi, COLUMNS_COLUMNS)
    z[...] += phi.astype(jnp.float32).sum(axis=0, keepdims=True)


def _backward(plan: Plan, kept: Any, cotangents: Any) -> tuple[Array, Array]:
    features, v = kept
    ds, dz = cotangents
    d_features, dv = _call(
        plan, _backward_kernel, features, v, ds, dz, blocks_in="ttss", blocks_out="tt", name="hybrid_sums_backward",
        out_shapes=[(features.shape, features.dtype), (v.shape, v.dtype)],
    )  # fmt: skip
    return d_features, dv


def _backward_kernel(features, v, ds, dz, d_features, dv):
    d_features[...] = (product(v[...], ds[...].astype(v.dtype)) + dz[...]).astype(d_features.dtype)
    dv[...] = product(features[...], ds[...].astype(features.dtype), ROWS_ROWS).astype(dv.dtype)


sums.defvjp(_forward, _backward)


def _call(plan: Plan, kernel: Any, *arrays: Array, blocks_in: str, blocks_out: str, out_shapes: Any, name: str):
    """Blocks of tokens (t) or a chunk's sums (s)."""

    def spec(kind: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        if kind == "t":
            return pl.BlockSpec((None, None, None, plan.tokens, shape[4]), lambda b, h, t, i: (b, h, t, i, 0))
        return pl.BlockSpec((None, None, None, *shape[3:]), lambda b, h, t, i: (b, h, t, 0, 0))

    tokens, columns = arrays[0].size // arrays[0].shape[4], arrays[0].shape[4] * arrays[1].shape[4]
    return call(
        kernel, *arrays, grid=(*arrays[0].shape[:3], arrays[0].shape[3] // plan.tokens),
        in_specs=[spec(kind, a.shape) for kind, a in zip(blocks_in, arrays, strict=True)],
        out_specs=[spec(kind, shape) for kind, (shape, _) in zip(blocks_out, out_shapes, strict=True)],
        out_shapes=out_shapes, flops=len(blocks_in) * tokens * columns, vmem=plan.vmem,
        interpret=plan.interpret, name=name,
    )  # fmt: skip

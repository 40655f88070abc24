"""Norms of the Wan transformer, computed in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def layer_norm(x: Float[Array, "*B C"], eps: float) -> Float[Array, "*B C"]:
    """Layer norm over channels without affine part; float32 in and out."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, computed in float32."""

    def __init__(self, dim: int, eps: float, *, param_dtype: DTypeLike) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(dim, param_dtype))

    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (normed * self.scale[...].astype(jnp.float32)[None, None]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm with affine part, float32 inside and in storage."""

    def __init__(self, dim: int, eps: float) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(dim, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(dim, jnp.float32))

    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        normed = layer_norm(x.astype(jnp.float32), self.eps)
        return (normed * self.scale[...][None, None] + self.bias[...][None, None]).astype(x.dtype)

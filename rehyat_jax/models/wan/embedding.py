"""The transformer's conditions, embedded: diffusion time, text and image features.

Sources: Wan-Video/Wan2.1 ``wan/modules/model.py``; diffusers ``models/transformers/transformer_wan.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from rehyat_jax.adapters.linear import Linear
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.image import ImageEmbedder
from rehyat_jax.runtime.variables import kernel

_xavier = nnx.initializers.xavier_uniform()
_normal = nnx.initializers.normal(0.02)


class TextEmbedder(nnx.Module):
    """Text features to the transformer's width; also the shape of the time embedder, with another activation."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        activation: Callable[[Array], Array],
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = {"kernel_init": _normal, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.linear_1 = Linear(in_dim, dim, kernel_metadata=kernel(None, "width"), **kinds)
        self.linear_2 = Linear(dim, dim, kernel_metadata=kernel("width", None), **kinds)
        self.activation = activation

    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B D"]:
        return self.linear_2(self.activation(self.linear_1(x)))


class ConditionEmbedder(nnx.Module):
    """Diffusion time, text and image features, as the blocks take them."""

    def __init__(self, config: WanConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.freq_dim = config.freq_dim
        self.time_embedder = TextEmbedder(
            config.freq_dim, config.dim, jax.nn.silu, dtype=jnp.float32, param_dtype=jnp.float32, rngs=rngs
        )
        self.time_proj = Linear(
            config.dim,
            6 * config.dim,
            kernel_init=_xavier,
            kernel_metadata=kernel("width", None),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.text_embedder = TextEmbedder(
            config.text_dim, config.dim, _gelu_tanh, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        if config.image_dim is not None:
            self.image_embedder = ImageEmbedder(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)


def _gelu_tanh(x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
    return jax.nn.gelu(x, approximate=True)

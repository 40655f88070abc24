"""The linear layer of every network here: one module, whatever its weights are kept as."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class Linear(nnx.Module):
    """``x @ kernel + bias`` over the last axis; paths, numbers and first values are ``nnx.Linear``'s.

    Args:
        dtype: of the computation and of the result.
        param_dtype: of the stored parameters.
        kernel_metadata: `rehyat_jax.runtime.variables.kernel`.
        rngs: the ``params`` stream initialises.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        kernel_init: Initializer,
        kernel_metadata: Mapping[str, Any],
        rngs: nnx.Rngs,
    ) -> None:
        self.dtype = jnp.dtype(dtype)
        self.kernel = nnx.Param(kernel_init(rngs.params(), (in_features, out_features), param_dtype), **kernel_metadata)
        self.bias: nnx.Param[Array] | None = nnx.data(None)
        if use_bias:
            # A key that zeros do not use: what is made after this layer has the first values that it always had.
            rngs.params()
            self.bias = nnx.Param(jnp.zeros(out_features, param_dtype))

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        kernel = self.kernel[...].astype(self.dtype)
        y = jax.lax.dot_general(x.astype(self.dtype), kernel, (((x.ndim - 1,), (0,)), ((), ())))
        if self.bias is not None:
            y += self.bias[...].astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y

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

from rehyat_jax.adapters.int8 import along, as_row, int8_product
from rehyat_jax.runtime.eight_bits import EightBits
from rehyat_jax.runtime.mesh import Dimension
from rehyat_jax.runtime.variables import AdapterParam, ScaleParam, axes_of, kernel, sharded


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
        #: Beside the kernel, where adapters are trained (`rehyat_jax.adapters.training`).
        self.adapter: LowRank | None = nnx.data(None)
        #: [*layers, out], where the kernel is kept in eight bits (`keep_in_eight_bits`).
        self.scale: ScaleParam | None = nnx.data(None)
        #: Whether products with a kernel in int8 are made in int8.
        self.rounds_inputs = False
        self.kernel = nnx.Param(kernel_init(rngs.params(), (in_features, out_features), param_dtype), **kernel_metadata)
        self.bias: nnx.Param[Array] | None = nnx.data(None)
        if use_bias:
            # A key that zeros do not use: what is made after this layer has the first values that it always had.
            rngs.params()
            self.bias = nnx.Param(jnp.zeros(out_features, param_dtype))

    def __call__(self, x: Float[Array, "*B I"], *, gelu: bool = False) -> Float[Array, "*B O"]:
        """``gelu``: then tanh's approximation of GELU, which a product in int8 can have in its epilogue."""
        x = x.astype(self.dtype)
        bias = None if self.bias is None else self.bias[...]
        if self.scale is not None and self.rounds_inputs:
            inside = gelu and self.adapter is None
            y = int8_product(x, self.kernel[...], self.scale[...], bias, gelu=inside)
            gelu = gelu and not inside
        else:
            y = self._product(x)
            if bias is not None:
                y += as_row(bias.astype(y.dtype), y.ndim)
            y = y.astype(self.dtype)
        y = y if self.adapter is None else y + self.adapter(x)
        return jax.nn.gelu(y, approximate=True) if gelu else y

    def _product(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        kernel = self.kernel[...].astype(self.dtype)
        if self.scale is None:
            return jax.lax.dot_general(x, kernel, along(x))
        y = jax.lax.dot_general(x, kernel, along(x), preferred_element_type=jnp.float32)
        return y * as_row(self.scale[...], y.ndim)


def linear_layers(module: Any) -> dict[str, Linear]:
    """Of a network, by dotted path."""
    found = nnx.iter_graph(module)
    return {".".join(map(str, path)): node for path, node in found if isinstance(node, Linear)}


def stacked_layers(module: Any) -> dict[str, Linear]:
    """The linear layers of a network's blocks, which are nearly all of it, by dotted path."""
    return {path: layer for path, layer in linear_layers(module).items() if layer.kernel.get_value().ndim > 2}


def keep_in_eight_bits(module: Any, how: EightBits, dtype: DTypeLike) -> None:
    """Make of a module of shapes alone one whose blocks' kernels are of this type, with a scale for each output.

    Raises:
        ConfigError: as `EightBits.check`.
    """
    layers = stacked_layers(module)
    how.check(layers)
    for path, layer in layers.items():
        if how.leaves_out(path):
            continue
        *stack, inputs, outputs = layer.kernel.get_value().shape
        axes = axes_of(layer.kernel)
        layer.kernel.set_value(jax.ShapeDtypeStruct((*stack, inputs, outputs), dtype))
        scale = jax.ShapeDtypeStruct((*stack, outputs), jnp.float32)
        layer.scale = ScaleParam(scale, **sharded(None if axes is None else axes.dimensions[-1]))
        layer.rounds_inputs = how.rounds_inputs


class LowRank(nnx.Module):
    """``x @ down @ up · scale``: LoRA (arXiv:2106.09685).

    Args:
        down, up: [*layers, in, r] and [*layers, r, out].
        dimensions: of the kernel beside it.
    """

    def __init__(
        self,
        down: Float[Array | jax.ShapeDtypeStruct, "*layers I r"],
        up: Float[Array | jax.ShapeDtypeStruct, "*layers r O"],
        *,
        scale: float,
        dimensions: tuple[Dimension | None, ...],
    ) -> None:
        self.down = AdapterParam(down, **kernel(dimensions[0], None))
        self.up = AdapterParam(up, **kernel(None, dimensions[1]))
        self.scale = scale

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        for matrix in (self.down, self.up):
            x = jax.lax.dot_general(x, matrix[...].astype(x.dtype), along(x))
        return x * jnp.asarray(self.scale, x.dtype)

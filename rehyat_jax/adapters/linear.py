"""The linear layer of every network here: one module, whatever its weights are kept as."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

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

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        x = x.astype(self.dtype)
        y = self._product(x) if self.scale is None else self._scaled_product(x, self.scale[...])
        if self.bias is not None:
            y += _row(self.bias[...].astype(y.dtype), y.ndim)
        y = y.astype(self.dtype)
        return y if self.adapter is None else y + self.adapter(x)

    def _product(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        return jax.lax.dot_general(x, self.kernel[...].astype(self.dtype), _along(x))

    def _scaled_product(self, x: Float[Array, "*B I"], scale: Float[Array, " O"]) -> Float[Array, "*B O"]:
        """In float32: what is left to do in a product's epilogue."""
        if self.rounds_inputs:
            x, step = rounded_rows(x)
            y = jax.lax.dot_general(x, self.kernel[...], _along(x), preferred_element_type=jnp.int32)
            y = y.astype(jnp.float32) * step
        else:
            kernel = self.kernel[...].astype(self.dtype)
            y = jax.lax.dot_general(x, kernel, _along(x), preferred_element_type=jnp.float32)
        return y * _row(scale, y.ndim)


def rounded_rows(x: Float[Array, "*B I"]) -> tuple[Int8[Array, "*B I"], Float[Array, "*B 1"]]:
    """Each row in int8, and the step of its numbers, by which its largest is 127. What is not finite makes the step
    so; a row below float32's normal steps is zero."""
    wide = x.astype(jnp.float32)
    top = jnp.abs(wide).max(axis=-1, keepdims=True)
    step = jnp.where(top < 1e-30, 1, top / 127)
    return jnp.round(wide / step).astype(jnp.int8), step


def _along(x: Array) -> tuple[Any, Any]:
    return ((x.ndim - 1,), (0,)), ((), ())


def _row(of_outputs: Float[Array, " O"], ndim: int) -> Array:
    return of_outputs.reshape((1,) * (ndim - 1) + (-1,))


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
            x = jax.lax.dot_general(x, matrix[...].astype(x.dtype), _along(x))
        return x * jnp.asarray(self.scale, x.dtype)

"""Products in int8: each row of the input is rounded with a scale of its own, sums are whole numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from pallas_kernels.devices import is_hopper
from rehyat_jax.runtime.mesh import whole_on_each_device
from rehyat_jax.runtime.platform import device_kind


def int8_product(
    x: Float[Array, "*B I"],
    kernel: Int8[Array, "I O"],
    scale: Float[Array, " O"],
    bias: Float[Array, " O"] | None,
    *,
    gelu: bool,
) -> Float[Array, "*B O"]:
    """``x @ (kernel * scale) + bias`` with ``x`` rounded by rows, of x's dtype; then GELU by tanh's approximation.

    On Hopper, where each device has its whole part and the sizes are multiples of `pallas_kernels.gpu.Int8Product`'s,
    one kernel applies scales, bias and GELU while the sums leave its registers; elsewhere XLA does.
    """
    rows, step = rounded_rows(x)

    def plain(rows: Array, step: Array, kernel: Array, scale: Array, bias: Array | None) -> Array:
        y = jax.lax.dot_general(rows, kernel, along(rows), preferred_element_type=jnp.int32)
        y = y.astype(jnp.float32) * step * as_row(scale, y.ndim)
        y = (y if bias is None else y + as_row(bias.astype(jnp.float32), y.ndim)).astype(x.dtype)
        return jax.nn.gelu(y, approximate=True) if gelu else y

    product = _product(x.size // x.shape[-1], kernel, x.dtype)
    if product is None:
        return plain(rows, step, kernel, scale, bias)

    def fused(rows: Array, step: Array, kernel: Array, scale: Array, bias: Array | None) -> Array:
        bias = jnp.zeros(scale.shape) if bias is None else bias.astype(jnp.float32)
        flat = rows.reshape(-1, rows.shape[-1])
        y = product(flat, step.reshape(-1), kernel.T, scale, bias, gelu=gelu, dtype=x.dtype)
        return y.reshape(*rows.shape[:-1], -1)

    return jax.lax.platform_dependent(rows, step, kernel, scale, bias, cuda=fused, default=plain)


def _product(length: int, kernel: Array | jax.ShapeDtypeStruct, dtype: Any) -> Any:
    """A `pallas_kernels.gpu.Int8Product`, or None where there is none for so many rows and this kernel."""
    if dtype != jnp.bfloat16 or not is_hopper(device_kind()) or not whole_on_each_device():
        return None
    from pallas_kernels import gpu  # here: Pallas takes half a second to import

    product = gpu.Int8Product()
    return None if product.lacking(length, *kernel.shape) else product


def rounded_rows(x: Float[Array, "*B I"]) -> tuple[Int8[Array, "*B I"], Float[Array, "*B 1"]]:
    """Each row in int8, and the step of its numbers, by which its largest is 127. What is not finite makes the step
    so; a row below float32's normal steps is zero."""
    wide = x.astype(jnp.float32)
    top = jnp.abs(wide).max(axis=-1, keepdims=True)
    step = jnp.where(top < 1e-30, 1, top / 127)
    return jnp.round(wide / step).astype(jnp.int8), step


def along(x: Array) -> tuple[Any, Any]:
    """The dimensions of a product over x's last axis and a kernel's first."""
    return ((x.ndim - 1,), (0,)), ((), ())


def as_row(of_outputs: Float[Array, " O"], ndim: int) -> Array:
    return of_outputs.reshape((1,) * (ndim - 1) + (-1,))

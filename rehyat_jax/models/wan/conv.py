"""Convolutions of the causal video autoencoder, channels last, and the frames that they hand from call to call."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from rehyat_jax.runtime.variables import kernel

_kernel_init = nnx.initializers.lecun_normal()
_bias_init = nnx.initializers.zeros_init()


def at_least_float32(dtype):
    """The type in which norms and softmax are computed."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _conv2d(
    x: Float[Array, "N H W I"],
    kernel: Float[Array, "kh kw I O"],
    *,
    stride: int,
    padding: tuple[tuple[int, int], tuple[int, int]],
) -> Float[Array, "N h w O"]:
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


class Conv2d(nnx.Module):
    """A 3x3 or 1x1 convolution of every frame by itself.

    Args:
        in_features, out_features: channels.
        kernel_size: side of the kernel.
        stride: along both sides.
        padding: (before, after), along both sides.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kernel_size: int,
        stride: int = 1,
        padding: tuple[int, int] = (0, 0),
        kernel_init=_kernel_init,
        dtype,
        param_dtype,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (kernel_size, kernel_size, in_features, out_features)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype), **kernel(*[None] * len(shape)))
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype))
        self.stride, self.padding, self.dtype = stride, padding, dtype

    def __call__(self, x: Float[Array, "B F H W I"]) -> Float[Array, "B F h w O"]:
        batch, frames, *_ = x.shape
        y = _conv2d(
            x.astype(self.dtype).reshape(batch * frames, *x.shape[2:]),
            self.kernel[...].astype(self.dtype),
            stride=self.stride,
            padding=(self.padding, self.padding),
        )
        y = y + self.bias[...].astype(self.dtype).reshape(1, 1, 1, -1)
        return y.reshape(batch, frames, *y.shape[1:])

    def of_repeated(self, x: Float[Array, "B F H W I"]) -> Float[Array, "B F 2*H 2*W O"]:
        """A 3x3 convolution of `repeat_pixels` of ``x``, in four ninths of its arithmetic.

        Of the nine pixels that a kernel sees, those that are copies of one pixel share the sum of their weights: each
        of the four places in a doubled pixel has a kernel of 2x2. All four are one convolution of the small frames,
        and each place takes its part of the result.
        """
        batch, frames, height, width, _ = x.shape
        kernel = self.kernel[...].astype(at_least_float32(self.dtype))
        places = [_halved(part, axis=1) for part in _halved(kernel, axis=0)]
        kernel = jnp.concatenate([place for row in places for place in row], axis=-1).astype(self.dtype)
        x = x.astype(self.dtype).reshape(batch * frames, height, width, -1)
        y = _conv2d(x, kernel, stride=1, padding=((1, 1), (1, 1)))
        y = y.reshape(batch * frames, height + 1, width + 1, 2, 2, -1)
        rows = [jnp.stack([y[:, r : r + height, c : c + width, r, c] for c in (0, 1)], axis=3) for r in (0, 1)]
        y = jnp.stack(rows, axis=2).reshape(batch, frames, 2 * height, 2 * width, -1)
        return y + self.bias[...].astype(self.dtype).reshape(1, 1, 1, 1, -1)


def _halved(kernel: Float[Array, "..."], *, axis: int) -> tuple[Array, Array]:
    """Three weights along an axis as those of two pixels: for the first and for the second copy of a pixel."""
    first, second, third = jnp.split(kernel, 3, axis=axis)
    return jnp.concatenate([first, second + third], axis), jnp.concatenate([first + second, third], axis)


class CausalConv3d(nnx.Module):
    """A convolution over time and space that sees the present and past frames, never the future ones.

    Before the first frame come frames of zeros. The frames that a later call needs to see are its state.

    It is computed as one 2-D convolution of frames whose channels are stacked over the taps in time: the same products,
    added in one accumulator, three times as fast as a 3-D convolution on a CPU.

    Args:
        in_features, out_features: channels.
        kernel_size: (time, height, width), odd in space; space is padded with zeros to keep its size.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kernel_size: tuple[int, int, int],
        kernel_init=_kernel_init,
        bias_init=_bias_init,
        dtype,
        param_dtype,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (*kernel_size, in_features, out_features)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype), **kernel(*[None] * len(shape)))
        self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype))
        self.kernel_size, self.dtype = kernel_size, dtype

    def __call__(
        self, x: Float[Array, "B F H W I"], past: Float[Array, "B P H W I"] | None
    ) -> tuple[Float[Array, "B F H W O"], Float[Array, "B P H W I"]]:
        """Convolve ``x``, which follows ``past`` (``None``: the start); give also the next call's ``past``."""
        x = x.astype(self.dtype)
        length = self.kernel_size[0] - 1
        if past is None:
            past = jnp.zeros((x.shape[0], length, *x.shape[2:]), x.dtype)
        x = jnp.concatenate([past, x], axis=1)
        return self.valid(x), x[:, x.shape[1] - length :]

    def valid(self, x: Float[Array, "B F H W I"], *, stride: int = 1) -> Float[Array, "B f H W O"]:
        """Convolve where the kernel lies wholly inside ``x`` in time: f = (F - kt) // stride + 1 frames."""
        taps, height, width = self.kernel_size
        count = (x.shape[1] - taps) // stride + 1
        kernel = jnp.moveaxis(self.kernel[...].astype(self.dtype), 0, 2)
        kernel = kernel.reshape(height, width, taps * kernel.shape[3], kernel.shape[4])
        last = stride * (count - 1) + 1
        x = jnp.concatenate([x[:, tap : tap + last : stride] for tap in range(taps)], axis=-1).astype(self.dtype)
        y = _conv2d(
            x.reshape(x.shape[0] * count, *x.shape[2:]),
            kernel,
            stride=1,
            padding=((height // 2, height // 2), (width // 2, width // 2)),
        )
        y = y + self.bias[...].astype(self.dtype).reshape(1, 1, 1, -1)
        return y.reshape(x.shape[0], count, *y.shape[1:])


class RMSNorm(nnx.Module):
    """Each pixel's channels divided by their root mean square, in float32 (diffusers' ``WanRMS_norm``)."""

    def __init__(self, features: int, *, dtype, param_dtype, rngs: nnx.Rngs) -> None:
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "B F H W C"]) -> Float[Array, "B F H W C"]:
        wide = at_least_float32(x.dtype)
        x = x.astype(wide)
        # torch's F.normalize divides by max(norm, 1e-12). Written on the square, the gradient at zero is finite.
        inverse = lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
        scale = self.scale[...].astype(wide).reshape(1, 1, 1, 1, -1)
        return (x * inverse * math.sqrt(x.shape[-1]) * scale).astype(self.dtype)


def repeat_pixels(x: Float[Array, "B F H W C"]) -> Float[Array, "B F 2*H 2*W C"]:
    """Each pixel becomes four (nearest-neighbour upsampling by two)."""
    batch, frames, height, width, channels = x.shape
    x = x.reshape(batch, frames, height, 1, width, 1, channels)
    x = jnp.broadcast_to(x, (batch, frames, height, 2, width, 2, channels))
    return x.reshape(batch, frames, 2 * height, 2 * width, channels)


def identity_tap(copies: int, tap: int):
    """An initialiser of a (3, 1, 1) kernel that hands the frame at one tap through, to each of ``copies`` outputs."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype) -> Array:
        eye = jnp.tile(jnp.eye(shape[3], dtype=dtype), (1, copies))
        return jnp.zeros(shape, dtype).at[tap, 0, 0].set(eye)

    return init

"""φ by Pallas and Triton, forward: both layers, the positive function and the powers in one pass over the tokens."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from pallas_kernels.gpu.triton import _divided, _product
from pallas_kernels.options import Positive


class Layers(NamedTuple):
    """Of an MLP for each head: D → W, GELU, W → W."""

    kernel_1: Float[Array, "H D W"]
    bias_1: Float[Array, "H W"]
    kernel_2: Float[Array, "H W W"]
    bias_2: Float[Array, "H W"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureKernels:
    """Sizes of blocks, powers of two: a program takes some tokens of a head, keeps their hidden layer on the chip and
    goes through the output's columns, whose weights are copied ahead. For Hopper's shared memory at W up to 384.
    """

    tokens: int = 128
    #: Columns of the hidden layer at one product.
    hidden: int = 128
    columns: int = 64
    #: Blocks of weights that are copied ahead, and one.
    stages: int = 3
    warps: int = 8
    interpret: bool = False

    def unsupported(self, x: Array | jax.ShapeDtypeStruct, degree: int) -> str | None:
        """What they lack for inputs like these; None where they can be used."""
        width = x.shape[3]
        if x.dtype not in (jnp.bfloat16, jnp.float16):
            return f"arrays of {x.dtype}"
        if width not in (16, 32, 64, 128) or width * degree > 384:
            return f"heads of {width} to the power {degree}"
        return None

    def forward(self, degree: int, positive: Positive, x: Array, layers: Layers, weight: Array | None) -> Array:
        batch, length, heads, width = x.shape
        # As the products of `hybrid` take them: no pass over the features turns them.
        like = jax.ShapeDtypeStruct((batch, heads, length, degree * width), x.dtype)
        blocks = self.tokens, min(self.hidden, width), min(self.columns, width)
        tanh = jnp.tanh if self.interpret else triton.approx_tanh
        sizes = _Sizes(*blocks, degree, positive, weight is not None, tanh)
        weights = jnp.ones((1, 1), jnp.float32) if weight is None else weight.T.astype(jnp.float32)
        features = pl.pallas_call(
            functools.partial(_forward, sizes=sizes),
            grid=(pl.cdiv(length, self.tokens), heads, batch),
            out_shape=like,
            interpret=self.interpret,
            name="features_forward",
            compiler_params=triton.CompilerParams(num_warps=self.warps, num_stages=self.stages),
        )(x, *layers, weights)
        return features.swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def feature_map(
    kernels: FeatureKernels,
    degree: int,
    positive: Positive,
    x: Float[Array, "B N H D"],
    layers: Layers,
    weight: Float[Array, "N H"] | None,
) -> Float[Array, "B N H F"]:
    """Part i of ``positive`` of the MLP's F = degree·D outputs to the power i, times the token's weight; of x's dtype.

    Parameters are of x's dtype, sums and functions of float32. Gradients reach all arrays; the hidden layer is computed
    again.
    """
    return kernels.forward(degree, positive, x, layers, weight)


def _map_forward(kernels: Any, degree: Any, positive: Any, x: Array, layers: Layers, weight: Any) -> Any:
    return kernels.forward(degree, positive, x, layers, weight), (x, layers, weight)


def _map_backward(_: FeatureKernels, degree: int, positive: Positive, kept: Any, d_out: Array) -> Any:
    """By XLA's matrix products, heads outermost: a kernel for them took twice as long. In operations of our own, for
    what JAX would derive cuts and joins the parts, and each one's gradient is then padded to the whole width."""
    x, layers, weight = kept
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    product = functools.partial(jnp.einsum, precision=exact)
    x, d_out = x.swapaxes(1, 2), d_out.swapaxes(1, 2).astype(jnp.float32)
    first = product("bhni,hio->bhno", x, layers.kernel_1) + layers.bias_1[None, :, None]
    hidden, gelu_backward = jax.vjp(functools.partial(jax.nn.gelu, approximate=True), first)
    z = (product("bhni,hio->bhno", hidden, layers.kernel_2) + layers.bias_2[None, :, None]).astype(jnp.float32)
    u, slope = (jax.nn.softplus(z), jax.nn.sigmoid(z)) if positive == "softplus" else (jnp.exp(z), jnp.exp(z))
    part = (jnp.arange(z.shape[3]) // x.shape[3])[None, None, None]
    lower = _lower(u, part, degree)
    d_weight = None
    if weight is not None:
        d_weight = (d_out * lower * u).sum(axis=(0, 3)).T.astype(weight.dtype)
        d_out = d_out * weight.T[None, :, :, None]
    hidden = jax.lax.optimization_barrier(hidden)  # Else products' factors are made in a layout that takes longer.
    d_z = (d_out * (part + 1).astype(jnp.float32) * lower * slope).astype(x.dtype)
    d_z = jax.lax.optimization_barrier(d_z)
    (d_first,) = gelu_backward(product("bhno,hio->bhni", d_z, layers.kernel_2))
    d_first = jax.lax.optimization_barrier(d_first)
    d_x = product("bhno,hio->bhni", d_first, layers.kernel_1).swapaxes(1, 2)

    pieces = _pieces(x.shape[2])

    def of_kernel(a: Array, b: Array) -> Array:
        a, b = (y.reshape(*y.shape[:2], pieces, -1, y.shape[3]) for y in (a, b))
        each = product("bhtni,bhtno->bhtio", a, b, preferred_element_type=jnp.float32)
        return each.sum(axis=(0, 2)).astype(x.dtype)

    def of_bias(b: Array) -> Array:
        return b.sum(axis=(0, 2), dtype=jnp.float32).astype(x.dtype)

    d_layers = Layers(of_kernel(x, d_first), of_bias(d_first), of_kernel(hidden, d_z), of_bias(d_z))
    return d_x, d_layers, d_weight


def _pieces(length: int) -> int:
    """In which a sum over so many tokens is made: enough for all multiprocessors, and whole, where XLA, that cuts such
    a sum as well, would pad both factors."""
    return max(n for n in range(1, 17) if n == 1 or length % (8 * n) == 0)


feature_map.defvjp(_map_forward, _map_backward)


class _Sizes(NamedTuple):
    tokens: int
    hidden: int
    columns: int
    degree: int
    positive: Positive
    weighted: bool
    #: Hopper's instruction, to 5e-4; an interpreter has none.
    tanh: Callable[[Array], Array]


def _forward(x_ref, kernel_1, bias_1, kernel_2, bias_2, weight_ref, out_ref, *, sizes):
    here, head, valid, x = _inputs(x_ref, sizes)
    hidden = [_gelu(z, sizes.tanh).astype(x.dtype) for z in _first(x, kernel_1, bias_1, head, sizes)]
    weight = _weight(weight_ref, here, head, valid, sizes)

    def step(j, _):
        z = _second(hidden, kernel_2, bias_2, head, j, sizes)
        u = _positive(z, sizes.positive)
        part, _ = _divided(j, x.shape[1] // sizes.columns)
        y = u * _lower(u, part, sizes.degree) * weight
        out = out_ref.at[here[0], head, here[1], pl.ds(j * sizes.columns, sizes.columns)]
        triton.store(out, y.astype(out_ref.dtype), mask=valid)

    jax.lax.fori_loop(0, out_ref.shape[3] // sizes.columns, step, None)


def _inputs(x_ref: Any, sizes: _Sizes) -> tuple[Any, Any, Array, Array]:
    """Where the program's tokens are, its head, which of the tokens there are, and x of them."""
    block, head, sample = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    first = block * sizes.tokens
    valid = (first + jnp.arange(sizes.tokens) < x_ref.shape[1])[:, None]
    x = triton.load(x_ref.at[sample, pl.ds(first, sizes.tokens), head, :], mask=valid, other=0.0)
    return (sample, pl.ds(first, sizes.tokens)), head, valid, x


def _first(x: Array, kernel: Any, bias: Any, head: Any, sizes: _Sizes) -> list[Array]:
    """Blocks of the hidden layer, before its activation."""
    blocks = [pl.ds(begin, sizes.hidden) for begin in range(0, kernel.shape[2], sizes.hidden)]
    return [_product(x, triton.load(kernel.at[head, :, at]), 1, 0) + _row(bias, head, at) for at in blocks]


def _second(hidden: list[Array], kernel: Any, bias: Any, head: Any, j: Any, sizes: _Sizes) -> Array:
    """Block j of the output before the positive function."""
    at = pl.ds(j * sizes.columns, sizes.columns)
    kernels = [triton.load(kernel.at[head, pl.ds(i * sizes.hidden, sizes.hidden), at]) for i in range(len(hidden))]
    z = functools.reduce(jnp.add, [_product(h, k, 1, 0) for h, k in zip(hidden, kernels, strict=True)])
    return z + _row(bias, head, at)


def _row(bias: Any, head: Any, at: Any) -> Array:
    return triton.load(bias.at[head, at]).astype(jnp.float32)[None, :]


def _weight(ref: Any, here: Any, head: Any, valid: Array, sizes: _Sizes) -> Any:
    return triton.load(ref.at[head, here[1]], mask=valid[:, 0], other=0.0)[:, None] if sizes.weighted else 1.0


def _lower(u: Array, part: Any, degree: int) -> Array:
    """u to the power less one of the parts, counted from 0, that its columns are of."""
    lower = jnp.ones_like(u)
    for power in range(1, degree):
        lower = jnp.where(jnp.broadcast_to(part >= power, u.shape), lower * u, lower)
    return lower


def _gelu(z: Array, tanh: Callable[[Array], Array]) -> Array:
    c = math.sqrt(2 / math.pi)
    half = 0.5 * z
    return half + half * tanh(z * (c + (0.044715 * c) * z * z))


def _positive(z: Array, positive: Positive) -> Array:
    if positive == "exp":
        return jnp.exp2(z * math.log2(math.e))
    t = jnp.exp2(-jnp.abs(z) * math.log2(math.e))
    series = functools.reduce(lambda total, c: total * t + c, _LOG1P[1:], jnp.full(t.shape, _LOG1P[0], jnp.float32))
    return jnp.maximum(z, 0.0) + t * series


#: log(1 + t) / t on [0, 1], highest power first, to 1e-5 where half precision keeps 5e-4: small t need no care, and no
#: logarithm is taken.
_LOG1P: list[float] = (
    np.polynomial.Chebyshev.interpolate(lambda t: np.log1p(t) / t, 5, [0, 1])
    .convert(kind=np.polynomial.Polynomial)
    .coef[::-1]
    .tolist()
)

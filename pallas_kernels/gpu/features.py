"""φ by Pallas and Triton: both layers, the positive function and the powers in one pass over the tokens."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from pallas_kernels.gpu.triton import _divided, _product

Positive = Literal["softplus", "exp"]


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
    tokens_backward: int = 64
    #: Of the hidden layer, at one product.
    hidden: int = 128
    columns: int = 64
    #: Blocks of weights that are copied ahead, and one.
    stages: int = 3
    stages_backward: int = 2
    warps: int = 8
    interpret: bool = False

    def lacking(self, x: Array | jax.ShapeDtypeStruct, degree: int) -> str | None:
        """What they lack for inputs like these; None where they can be used."""
        width = x.shape[3]
        if x.dtype not in (jnp.bfloat16, jnp.float16):
            return f"arrays of {x.dtype}"
        if width not in (16, 32, 64, 128) or width * degree > 384:
            return f"heads of {width} to the power {degree}"
        return None

    def forward(self, degree: int, positive: Positive, x: Array, layers: Layers, weight: Array | None) -> Array:
        like = jax.ShapeDtypeStruct((*x.shape[:3], degree * x.shape[3]), x.dtype)
        (out,) = self._call(_forward, self.tokens, self.stages, degree, positive, (x, *layers), weight, [like])
        return out

    def backward(
        self, degree: int, positive: Positive, x: Array, layers: Layers, weight: Array | None, d_out: Array
    ) -> tuple[Array, Layers, Array | None]:
        wide = jax.ShapeDtypeStruct(d_out.shape, x.dtype)
        rows = jax.ShapeDtypeStruct((x.shape[0], x.shape[2], x.shape[1]), jnp.float32)
        dx, hidden, d_1, d_2, d_weight = self._call(
            _backward, self.tokens_backward, self.stages_backward, degree, positive, (x, *layers, d_out), weight,
            [jax.ShapeDtypeStruct(x.shape, x.dtype), wide, wide, wide, rows],
        )  # fmt: skip
        # Sums over all tokens: XLA's batched products, each weight's gradient once.
        exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        product = functools.partial(jnp.einsum, "bnhi,bnho->hio", precision=exact, preferred_element_type=jnp.float32)
        gradients = product(x, d_1), d_1.sum((0, 1), jnp.float32), product(hidden, d_2), d_2.sum((0, 1), jnp.float32)
        d_layers = Layers(*(d.astype(p.dtype) for d, p in zip(gradients, layers, strict=True)))
        return dx, d_layers, None if weight is None else d_weight.sum(axis=0).T.astype(weight.dtype)

    def _call(
        self, kernel: Callable[..., None], tokens: int, stages: int, degree: int, positive: Positive, arrays: Any,
        weight: Array | None, outputs: list[jax.ShapeDtypeStruct],
    ) -> Any:  # fmt: skip
        batch, length, heads, width = arrays[0].shape
        sizes = _Sizes(tokens, min(self.hidden, width), min(self.columns, width), degree, positive, weight is not None)
        weights = jnp.ones((1, 1), jnp.float32) if weight is None else weight.T.astype(jnp.float32)
        return pl.pallas_call(
            functools.partial(kernel, sizes=sizes), grid=(pl.cdiv(length, tokens), heads, batch), out_shape=outputs,
            interpret=self.interpret, name="features" + kernel.__name__,
            compiler_params=triton.CompilerParams(num_warps=self.warps, num_stages=stages),
        )(*arrays, weights)  # fmt: skip


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


def _map_backward(kernels: FeatureKernels, degree: int, positive: Positive, kept: Any, d_out: Array) -> Any:
    x, layers, weight = kept
    return kernels.backward(degree, positive, x, layers, weight, d_out)


feature_map.defvjp(_map_forward, _map_backward)


class _Sizes(NamedTuple):
    tokens: int
    hidden: int
    columns: int
    degree: int
    positive: Positive
    weighted: bool


def _forward(x_ref, kernel_1, bias_1, kernel_2, bias_2, weight_ref, out_ref, *, sizes):
    here, head, valid, x = _inputs(x_ref, sizes)
    hidden = [_gelu(z)[0].astype(x.dtype) for z in _first(x, kernel_1, bias_1, head, sizes)]
    weight = _weight(weight_ref, here, head, valid, sizes)

    def step(j, _):
        z, _ = _second(hidden, kernel_2, bias_2, head, j, sizes)
        u = _positive(z, sizes.positive)[0]
        y = u * _lower(u, j, x.shape[1], sizes)[0] * weight
        out = out_ref.at[here[0], here[1], head, pl.ds(j * sizes.columns, sizes.columns)]
        triton.store(out, y.astype(out_ref.dtype), mask=valid)

    jax.lax.fori_loop(0, out_ref.shape[3] // sizes.columns, step, None)


def _backward(
    x_ref, kernel_1, bias_1, kernel_2, bias_2, d_out_ref, weight_ref, dx_ref, hidden_ref, d_1_ref, d_2_ref,
    d_weight_ref, *, sizes,
):  # fmt: skip
    here, head, valid, x = _inputs(x_ref, sizes)
    first = _first(x, kernel_1, bias_1, head, sizes)
    hidden = [_gelu(z)[0].astype(x.dtype) for z in first]
    weight = _weight(weight_ref, here, head, valid, sizes)

    def step(j, carry):
        d_hidden, d_weight = carry
        at = (here[0], here[1], head, pl.ds(j * sizes.columns, sizes.columns))
        z, kernels = _second(hidden, kernel_2, bias_2, head, j, sizes)
        u, slope = _positive(z, sizes.positive)
        lower, power = _lower(u, j, x.shape[1], sizes)
        d_out = triton.load(d_out_ref.at[at], mask=valid, other=0.0).astype(jnp.float32)
        d_weight = d_weight + (d_out * lower * u).sum(axis=1)
        d_2 = (d_out * weight * lower * slope * power).astype(x.dtype)
        triton.store(d_2_ref.at[at], d_2, mask=valid)
        d_hidden = tuple(d + _product(d_2, kernel, 1, 1) for d, kernel in zip(d_hidden, kernels, strict=True))
        return d_hidden, d_weight

    none = tuple(jnp.zeros((sizes.tokens, sizes.hidden), jnp.float32) for _ in first)
    count = d_out_ref.shape[3] // sizes.columns
    d_hidden, d_weight = jax.lax.fori_loop(0, count, step, (none, jnp.zeros(sizes.tokens, jnp.float32)))
    dx = jnp.zeros(x.shape, jnp.float32)
    for i, (z, h, d_h) in enumerate(zip(first, hidden, d_hidden, strict=True)):
        at = (here[0], here[1], head, pl.ds(i * sizes.hidden, sizes.hidden))
        d_1 = (d_h * _gelu(z)[1]).astype(x.dtype)
        triton.store(hidden_ref.at[at], h, mask=valid)
        triton.store(d_1_ref.at[at], d_1, mask=valid)
        dx = dx + _product(d_1, triton.load(kernel_1.at[head, :, pl.ds(i * sizes.hidden, sizes.hidden)]), 1, 1)
    triton.store(dx_ref.at[here[0], here[1], head, :], dx.astype(dx_ref.dtype), mask=valid)
    triton.store(d_weight_ref.at[here[0], head, here[1]], d_weight, mask=valid[:, 0])


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


def _second(hidden: list[Array], kernel: Any, bias: Any, head: Any, j: Any, sizes: _Sizes) -> tuple[Array, list[Array]]:
    """Block j of the output before the positive function, and the weights it was made with."""
    at = pl.ds(j * sizes.columns, sizes.columns)
    kernels = [triton.load(kernel.at[head, pl.ds(i * sizes.hidden, sizes.hidden), at]) for i in range(len(hidden))]
    z = functools.reduce(jnp.add, [_product(h, k, 1, 0) for h, k in zip(hidden, kernels, strict=True)])
    return z + _row(bias, head, at), kernels


def _row(bias: Any, head: Any, at: Any) -> Array:
    return triton.load(bias.at[head, at]).astype(jnp.float32)[None, :]


def _weight(ref: Any, here: Any, head: Any, valid: Array, sizes: _Sizes) -> Any:
    return triton.load(ref.at[head, here[1]], mask=valid[:, 0], other=0.0)[:, None] if sizes.weighted else 1.0


def _lower(u: Array, j: Any, width: int, sizes: _Sizes) -> tuple[Array, Any]:
    """u to the power less one that is of block j, and that power."""
    part, _ = _divided(j, width // sizes.columns)
    lower = jnp.ones_like(u)
    for power in range(1, sizes.degree):
        lower = jnp.where(jnp.full(u.shape, part >= power), lower * u, lower)
    return lower, (part + 1).astype(jnp.float32)


def _gelu(z: Array) -> tuple[Array, Array]:
    """By tanh, as z·σ(2y), and its slope."""
    c = 2 * math.sqrt(2 / math.pi)
    share = 1.0 / (1.0 + jnp.exp2(z * (1.0 + 0.044715 * z * z) * (-c * math.log2(math.e))))
    return z * share, share + z * share * (1.0 - share) * c * (1.0 + 3 * 0.044715 * z * z)


def _positive(z: Array, positive: Positive) -> tuple[Array, Array]:
    """And its slope."""
    if positive == "exp":
        u = jnp.exp2(z * math.log2(math.e))
        return u, u
    t = jnp.exp2(-jnp.abs(z) * math.log2(math.e))
    series = functools.reduce(lambda total, c: total * t + c, _LOG1P[1:], jnp.full(t.shape, _LOG1P[0], jnp.float32))
    return jnp.maximum(z, 0.0) + t * series, jnp.where(z < 0, t, jnp.ones_like(t)) / (1.0 + t)


#: log(1 + t) / t on [0, 1], highest power first, to 1e-7: small t need no care, and no logarithm is taken.
_LOG1P: list[float] = (
    np.polynomial.Chebyshev.interpolate(lambda t: np.log1p(t) / t, 9, [0, 1])
    .convert(kind=np.polynomial.Polynomial)
    .coef[::-1]
    .tolist()
)

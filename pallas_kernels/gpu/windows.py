"""Which keys the queries of a chunk see, and softmax over them, which is a GPU kernel, with the linear part."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels.merge import shares, stabilizer_of
from pallas_kernels.options import KEPT_ATTENTION, Stabilizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows:
    """Queries of chunk t, tokens from t·chunk on, see the chunk's tokens and the ``overlap`` before it.

    Keys and values are of these tokens, after ``past`` (0 or ``overlap``) earlier ones.
    """

    chunk: int
    overlap: int
    past: int
    #: Queries.
    length: int

    @property
    def chunks(self) -> int:
        return -(-self.length // self.chunk)

    def keys(self, t: Any, seen: Any) -> tuple[Any, Any]:
        """First place of keys seen by chunk t, and the one after the last, where ``seen`` of the past hold a token."""
        return jnp.maximum(t * self.chunk - self.overlap, -seen) + self.past, self.end(t) + self.past

    def end(self, t: Any) -> Any:
        """One after the last query of chunk t."""
        return jnp.minimum((t + 1) * self.chunk, self.length)


@runtime_checkable
class Kernels(Protocol):
    """Softmax over windows, of arrays [B, N, H, D] and rows [B, H, N] in float32."""

    def forward(self, windows: Windows, q: Array, k: Array, v: Array, seen: Array) -> tuple[Array, Array, Array]:
        """Output, log₂ of the sum of exponentials and the largest exponent, base 2, of every query."""

    def backward(
        self, windows: Windows, q: Array, k: Array, v: Array, seen: Array, y: Array, d_y: Array, rows: Array
    ) -> tuple[Array, Array, Array]:
        """Gradients to q, k and v of outputs y: with p = 2^(exponent − row), of p·(d_y·v − d_y·y) to the scores."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attend(
    kernels: Kernels,
    windows: Windows,
    stabilizer: Stabilizer,
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M H D"],
    v: Float[Array, "B M H D"],
    seen: Int[Array, ""],
    a: Float[Array, "B N H D"],
    n: Float[Array, "B N H"],
) -> Float[Array, "B N H D"]:
    """Softmax over the windows and a linear part, a / n by itself, under one normaliser; of v's dtype.

    (Σ e^s v + e^c a) / (Σ e^s + e^c n), s = q·k/√D and c what ``stabilizer`` names, which carries no gradient.
    """
    return _forward(kernels, windows, stabilizer, q, k, v, seen, a, n)[0]


def _forward(
    kernels: Kernels,
    windows: Windows,
    stabilizer: Stabilizer,
    q: Array,
    k: Array,
    v: Array,
    seen: Array,
    a: Array,
    n: Array,
) -> tuple[Array, Any]:
    softmax, total, largest = kernels.forward(windows, q, k, v, seen)
    total, largest = (x.swapaxes(1, 2) for x in (total, largest))
    # What the kernels give is normalised: its exponent is the logarithm of the sum, its sum 1.
    c = stabilizer_of(stabilizer, largest, lambda: total)
    common, local, past = shares(total, c, n, base="2")
    normalizer = local + n * past
    y = softmax.astype(jnp.float32) * (local / normalizer)[..., None]
    y = (y + a.astype(jnp.float32) * (past / normalizer)[..., None]).astype(v.dtype)
    # The row of the joint normaliser; its sign, which features that are not positive may turn, is the weight's.
    rows = common + jnp.log(jnp.abs(normalizer)) * math.log2(math.e)
    y, rows, weight = (checkpoint_name(x, KEPT_ATTENTION) for x in (y, rows.swapaxes(1, 2), past / normalizer))
    return y, (q, k, v, seen, y, rows, weight, jnp.zeros((0,), a.dtype))


def _backward(kernels: Kernels, windows: Windows, stabilizer: Stabilizer, kept: Any, d_y: Array) -> Any:
    # With p of the joint normaliser the softmax's gradient is as ever; a and n are one more value and weight.
    q, k, v, seen, y, rows, weight, like_a = kept
    seen = jnp.asarray(seen)  # rematerialised, a constant comes back as numpy's
    d_a = d_y.astype(jnp.float32) * weight[..., None]
    d_n = -weight * inner(d_y, y)
    signed = jnp.where(weight[..., None] < 0, -d_y, d_y)
    return *kernels.backward(windows, q, k, v, seen, y, signed, rows), None, d_a.astype(like_a.dtype), d_n


attend.defvjp(_forward, _backward)


def inner(x: Float[Array, "B N H D"], y: Float[Array, "B N H D"]) -> Float[Array, "B N H"]:
    """x·y of every token and head, in float32."""
    return (x.astype(jnp.float32) * y.astype(jnp.float32)).sum(axis=3)

"""Which keys the queries of a chunk see, and softmax over them: the part of hybrid attention that is a GPU kernel."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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
        self, windows: Windows, q: Array, k: Array, v: Array, seen: Array, d_out: Array, rows: Array, delta: Array
    ) -> tuple[Array, Array, Array]:
        """Gradients to q, k and v: with p = 2^(exponent − row), of p·(d_out·v − delta) to the scores."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(
    kernels: Kernels,
    windows: Windows,
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M H D"],
    v: Float[Array, "B M H D"],
    seen: Int[Array, ""],
) -> tuple[Float[Array, "B N H D"], Float[Array, "B H N"], Float[Array, "B H N"]]:
    """Softmax output of v's dtype; of the scores q·k/√D, log Σ exp and the maximum, which carries no gradient."""
    return _forward(kernels, windows, q, k, v, seen)[0]


_LN2 = 0.6931471805599453


def _forward(kernels: Kernels, windows: Windows, q: Array, k: Array, v: Array, seen: Array) -> tuple[Any, Any]:
    out, total, largest = kernels.forward(windows, q, k, v, seen)
    return (out, total * _LN2, largest * _LN2), (q, k, v, seen, out, total)


def _backward(kernels: Kernels, windows: Windows, kept: Any, cotangents: Any) -> Any:
    q, k, v, seen, out, total = kept
    d_out, d_total, _ = cotangents
    # The softmax's own, less what comes through the sum's logarithm: d log Σ exp = p.
    delta = jnp.einsum("bnhd,bnhd->bhn", d_out.astype(jnp.float32), out.astype(jnp.float32)) - d_total
    return (*kernels.backward(windows, q, k, v, seen, d_out, total, delta), None)


attend.defvjp(_forward, _backward)

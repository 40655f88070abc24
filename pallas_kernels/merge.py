"""The one rule by which a softmax part and a linear part meet under one normaliser.

Each part is (a, n, m): weighted values a and the weights' sum n, both to be multiplied by e^m. The linear part's m is
the stabiliser c, so that

    y = (a_S e^(m − g) + a_L e^(c − g)) / (n_S e^(m − g) + n_L e^(c − g))

for any g. Called inside kernels, which count in powers of two, and outside them, in powers of e.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from pallas_kernels.options import Stabilizer

Base = Literal["e", "2"]

#: Powers of the base, and the largest exponent of a linear part that may be empty: e⁸⁰ and 2¹¹⁵ are about equal.
_POWERS: dict[Base, tuple[Callable[[Array], Array], float]] = {"e": (jnp.exp, 80.0), "2": (jnp.exp2, 115.0)}


class Shares(NamedTuple):
    """What each part's numerator and denominator are multiplied by, and the common exponent g that both lack."""

    common: Float[Array, "..."]
    softmax: Float[Array, "..."]
    linear: Float[Array, "..."]


def stabilizer_of(
    stabilizer: Stabilizer, m: Float[Array, "..."], lse: Callable[[], Float[Array, "..."]]
) -> Float[Array, "..."]:
    """The stabiliser c beside a softmax part whose largest score is m, and the logarithm of whose sum is ``lse()``."""
    match stabilizer:
        case "row_max":
            return m
        case "lse":
            return lse()
        case "none":
            return jnp.zeros_like(m)


def shares(
    m: Float[Array, "..."], c: Float[Array, "..."], n_linear: Float[Array, "..."], *, base: Base = "e"
) -> Shares:
    """For a softmax part with exponent m and a linear part with exponent c and sum ``n_linear``."""
    power, most = _POWERS[base]
    # An empty linear part has no say in the common exponent, beside which small scores could vanish: 0 / 0.
    common = jnp.where(n_linear == 0, m, jnp.maximum(m, c))
    # With an empty linear part the difference is not bounded by 0, and the power is multiplied by 0.
    return Shares(common, power(m - common), power(jnp.minimum(c - common, most)))

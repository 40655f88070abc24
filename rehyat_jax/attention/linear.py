"""The linear part of hybrid attention: its state, the update by new tokens, and the read-out by queries."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from rehyat_jax.attention.state import accumulator


class LinearState(NamedTuple):
    """s = Σ φ_k(k) vᵀ and z = Σ φ_k(k) over the tokens so far; float32, or float64 for float64 inputs. A pytree."""

    s: Float[Array, "B H F D"]
    z: Float[Array, "B H F"]

    @classmethod
    def empty(cls, features_k: Float[Array, "B N H F"], v: Float[Array, "B N H D"]) -> LinearState:
        """Over no token, sharded as these are."""
        wide = accumulator(features_k.dtype, v.dtype)
        # No number is beyond infinity: zeros, but not to the compiler. XLA's CPU backend reads beyond a product's
        # operand that it knows to be one constant everywhere (docs/notebook/decisions.md).
        z, values = ((x[:, 0] > jnp.inf).astype(wide) for x in (features_k, v))
        return cls(z[..., None] + values[:, :, None, :], z)

    @classmethod
    def zeros(
        cls, batch: int, *, heads: int, head_dim: int, feature_dim: int, dtype: DTypeLike = jnp.float32
    ) -> LinearState:
        """Over no token; ``dtype`` is that of the features and values."""
        wide = accumulator(dtype)
        return cls(jnp.zeros((batch, heads, feature_dim, head_dim), wide), jnp.zeros((batch, heads, feature_dim), wide))

    def update(self, features_k: Float[Array, "B C H F"], v: Float[Array, "B C H D"]) -> LinearState:
        """With more tokens."""
        # In this order XLA's CPU product takes half the time.
        added = product("bchd,bchf->bhdf", v, features_k).swapaxes(2, 3)
        return LinearState(self.s + added, self.z + features_k.sum(axis=1, dtype=self.z.dtype))

    def decayed(self, decay: Float[Array, " H"]) -> LinearState:
        """Multiplied by γ of each head."""
        return LinearState(self.s * decay[None, :, None, None], self.z * decay[None, :, None])

    def read_out(self, features_q: Float[Array, "B C H F"]) -> tuple[Float[Array, "B H C D"], Float[Array, "B H C"]]:
        """a_L and n_L of queries."""
        return product("bchf,bhfd->bhcd", features_q, self.s), product("bchf,bhf->bhc", features_q, self.z)


def product(subscripts: str, a: Array, b: Array) -> Array:
    """``einsum`` with sums in the accumulator's dtype."""
    wide = accumulator(a.dtype, b.dtype)

    def widened(a: Array, b: Array) -> Array:
        return jnp.einsum(subscripts, a.astype(wide), b.astype(wide))

    if a.dtype != b.dtype or a.dtype == wide:
        return widened(a, b)
    # XLA's CPU backend has no product of bfloat16 with a float32 sum in every place where one may stand.
    return jax.lax.platform_dependent(
        a, b, cpu=widened, default=lambda a, b: jnp.einsum(subscripts, a, b, preferred_element_type=wide)
    )

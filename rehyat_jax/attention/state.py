"""What hybrid attention carries from one chunk to the next."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


def accumulator(*dtypes: DTypeLike) -> jnp.dtype:
    """The dtype of scores, sums and states over inputs of these dtypes: float32, or float64 where one is float64."""
    return jnp.dtype(jnp.float64 if jnp.float64 in [jnp.dtype(d) for d in dtypes] else jnp.float32)


def empty_places(x: Float[Array, "B N H D"], count: int) -> Float[Array, "B count H D"]:
    """Zeros for ``count`` tokens like those of ``x``, of its dtype and sharded as it is: made from it."""
    return jnp.pad(x[:, :0], ((0, 0), (count, 0), (0, 0), (0, 0)))


class HybridState(NamedTuple):
    """The past of a stream: what has left the softmax window as sums, what is still in it as tokens. A pytree.

    The next chunk reads ``s`` and ``z`` as they are; the overlap's tokens enter them as they leave the window.
    """

    #: Σ φ_k(k) vᵀ of every token before the window; float32, or float64 for float64 inputs.
    s: Float[Array, "B H F D"]
    #: Σ φ_k(k) of the same.
    z: Float[Array, "B H F"]
    #: The last ``overlap`` tokens, the newest last.
    k: Float[Array, "B O H D"]
    v: Float[Array, "B O H D"]
    features_k: Float[Array, "B O H F"]
    #: Tokens seen so far: the overlap's first ``O − seen`` places are empty while it is below O. Counted no further
    #: than O, so that no stream is long enough to overflow it.
    seen: Int[Array, ""]

    @classmethod
    def zeros(
        cls,
        batch: int,
        *,
        heads: int,
        head_dim: int,
        feature_dim: int,
        overlap: int,
        dtype: DTypeLike = jnp.float32,
        features_dtype: DTypeLike | None = None,
    ) -> HybridState:
        """Nothing seen yet: the same as ``initial_state=None``.

        ``dtype`` is that of q, k and v; ``features_dtype`` that of the features, where it is another.
        """
        features_dtype = dtype if features_dtype is None else features_dtype
        wide = accumulator(dtype, features_dtype)
        tokens = (batch, overlap, heads)
        return cls(
            s=jnp.zeros((batch, heads, feature_dim, head_dim), wide),
            z=jnp.zeros((batch, heads, feature_dim), wide),
            k=jnp.zeros((*tokens, head_dim), dtype),
            v=jnp.zeros((*tokens, head_dim), dtype),
            features_k=jnp.zeros((*tokens, feature_dim), features_dtype),
            seen=jnp.zeros((), jnp.int32),
        )

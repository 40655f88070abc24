"""The equation written once, dense and without tricks: what every other implementation is tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from pallas_kernels.options import Stabilizer
from rehyat_jax.attention.state import HybridState


def reference(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    features_q: Float[Array, "B N H F"],
    features_k: Float[Array, "B N H F"],
    *,
    chunk: int,
    overlap: int,
    causal: bool,
    stabilizer: Stabilizer,
    decay: Float[Array, " H"],
    state: HybridState,
) -> tuple[Float[Array, "B N H D"], HybridState]:
    """ReHyAt (arXiv 2601.04342), parallel form, on N × (overlap + N) scores; also the state after the last token.

    Query i is in chunk t = ⌊i / T_c⌋. Key j, counted from −T_o where the overlap carried over begins, is in chunk
    ⌊j / T_c⌋ and leaves the window with chunk ⌊(j + T_o) / T_c⌋: between the two it is seen by softmax, after by φ.
    """
    new, s, z = q.shape[1], state.s, state.z
    k_all, v_all, phi_k = (
        jnp.concatenate([past, now], axis=1).astype(s.dtype)
        for past, now in [(state.k, k), (state.v, v), (state.features_k, features_k)]
    )
    q_all, phi_q = q.astype(s.dtype), features_q.astype(s.dtype)
    t, j = (jnp.arange(new, dtype=jnp.int32) // chunk)[:, None], jnp.arange(-overlap, new, dtype=jnp.int32)[None]
    enters, leaves, seen = j // chunk, (j + overlap) // chunk, j >= -state.seen
    softmax_set = seen & (enters <= t) & (t <= leaves)
    linear_set = seen & ((leaves < t) if causal else (leaves < t) | (enters > t))

    def gamma(steps: Array) -> Array:
        return jnp.power(jnp.expand_dims(decay, range(1, 1 + steps.ndim)), steps[None].astype(decay.dtype))

    scores = jnp.einsum("bihd,bjhd->bhij", q_all, k_all) * q.shape[-1] ** -0.5
    scores = jnp.where(softmax_set[None, None], scores, -jnp.inf)
    linear = jnp.einsum("bihf,bjhf->bhij", phi_q, phi_k) * gamma(jnp.maximum(t - 1 - leaves, 0))[None]
    linear = jnp.where(linear_set[None, None], linear, 0)
    a_past = jnp.einsum("bihf,bhfd->bhid", phi_q, s) * gamma(t)[None]
    n_past = jnp.einsum("bihf,bhf->bhi", phi_q, z)[..., None] * gamma(t)[None]

    m = stop_gradient(scores.max(axis=-1, keepdims=True))
    lse = stop_gradient(jax.nn.logsumexp(scores, axis=-1, keepdims=True))
    c = {"row_max": m, "lse": lse, "none": jnp.zeros_like(m)}[stabilizer]
    # Numerator and denominator times e^(c − g): g = c but for "none", whose e^scores may overflow, or vanish beside an
    # empty linear set.
    g = jnp.where(linear.sum(axis=-1, keepdims=True) + n_past == 0, m, jnp.maximum(c, m))
    rest = jnp.exp(jnp.minimum(c - g, 80))
    weights = jnp.exp(scores - g) + rest * linear
    a = jnp.einsum("bhij,bjhd->bhid", weights, v_all) + rest * a_past
    n = weights.sum(axis=-1, keepdims=True) + rest * n_past
    y = (a / n).swapaxes(1, 2)

    chunks = jnp.array(-(-new // chunk), jnp.int32)
    left = gamma(jnp.maximum(chunks - 1 - leaves[0], 0)) * (seen[0] & (j[0] < new - overlap))[None].astype(s.dtype)
    after = HybridState(
        s=s * gamma(chunks)[None, :, None, None] + jnp.einsum("hj,bjhf,bjhd->bhfd", left, phi_k, v_all),
        z=z * gamma(chunks)[None, :, None] + jnp.einsum("hj,bjhf->bhf", left, phi_k),
        k=jnp.concatenate([state.k, k], axis=1)[:, new:],
        v=jnp.concatenate([state.v, v], axis=1)[:, new:],
        features_k=jnp.concatenate([state.features_k, features_k], axis=1)[:, new:],
        seen=jnp.minimum(state.seen + new, overlap),
    )
    return y.astype(v.dtype), after

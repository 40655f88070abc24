"""How far a hybrid block is from softmax attention: what distillation minimises, and what it watches."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float, Int

from rehyat_jax.mixers.hybrid import HybridAttention


def relative_error(guess: Float[Array, "*shape"], truth: Float[Array, "*shape"]) -> Float[Array, ""]:
    """Σ|guess − truth| / Σ|truth|, in float32: ReHyAt's E‖y − ŷ‖₁, on one scale for all blocks."""
    guess, truth = guess.astype(jnp.float32), truth.astype(jnp.float32)
    return jnp.mean(jnp.abs(guess - truth)) / jnp.mean(jnp.abs(truth))


class Weights(NamedTuple):
    """What some queries give every key, before the common normaliser; float32.

    Softmax: e^(q·k/√D − c), with the stabiliser c. Linear: φ_q·φ_k, with the state's decay.
    """

    softmax: Float[Array, "B H Q N"]
    linear: Float[Array, "B H Q N"]
    #: Which of the two counts for a key, if any.
    softmax_set: Bool[Array, "Q N"]
    linear_set: Bool[Array, "Q N"]


def weights(
    attention: HybridAttention,
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    *,
    queries: Int[Array, " Q"],
    frame: int,
) -> Weights:
    """The dense equation (see `rehyat_jax.attention.reference`) of one block, for a sample of the queries.

    A block of kind "linear" has no softmax, and its linear part sees its own chunk; kind "window" has no φ.

    Args:
        queries: numbers of tokens.
        frame: tokens of a frame.
    """
    hybrid = attention.hybrid
    features_q, features_k = attention.phi_q(q), attention.phi_k(k)
    if hybrid.length_norm:
        weight = attention.past_weight(q.shape[1], frame=frame, first=0)[None, :, :, None]
        features_q = features_q.astype(jnp.float32) * weight
    chunk, overlap = hybrid.chunk_frames * frame, hybrid.overlap_frames * frame
    t, j = (queries // chunk)[:, None], jnp.arange(k.shape[1], dtype=queries.dtype)[None]
    enters, leaves = j // chunk, (j + overlap) // chunk
    if hybrid.kind == "linear":
        softmax_set, linear_set, age = jnp.zeros(jnp.broadcast_shapes(t.shape, j.shape), bool), enters <= t, t - enters
    else:
        softmax_set, linear_set, age = (enters <= t) & (t <= leaves), leaves < t, t - 1 - leaves
    if not hybrid.causal:
        linear_set = ~softmax_set

    q, k, features_q, features_k = (
        x.astype(jnp.float32) for x in (q[:, queries], k, features_q[:, queries], features_k)
    )
    scores = jnp.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    inside = jnp.where(softmax_set[None, None], scores, -jnp.inf)
    match hybrid.stabilizer:
        case _ if hybrid.kind == "linear":
            c = jnp.max(scores, axis=-1, keepdims=True)  # any: nothing stands beside the linear part
        case "row_max":
            c = inside.max(axis=-1, keepdims=True)
        case "lse":
            c = jax.nn.logsumexp(inside, axis=-1, keepdims=True)
        case "none":
            c = jnp.zeros_like(scores[..., :1])
    linear = jnp.einsum("bihf,bjhf->bhij", features_q, features_k)
    if attention.decay is not None:
        linear = linear * (attention.decay[:, None, None] ** jnp.maximum(age, 0).astype(jnp.float32)[None])[None]
    return Weights(jnp.exp(scores - stop_gradient(c)), linear, softmax_set, linear_set)


def score_loss(weights: Weights) -> Float[Array, ""]:
    """log(1 + ‖e^(q·k) − φ_q·φ_k‖²) over the keys of each query's linear set, mean over the queries.

    Attention Surgery (arXiv 2509.24899), which measured it to be worse for motion than the error of the output.
    """
    apart = jnp.where(weights.linear_set[None, None], weights.softmax - weights.linear, 0)
    return jnp.mean(jnp.log1p(jnp.sum(jnp.square(apart), axis=-1)))


class Health(NamedTuple):
    """Of one block's normaliser n_S + n_L."""

    #: n_L / (n_S + n_L), mean over queries: near 1 the window is drowned.
    share: Float[Array, ""]
    #: The least n_S + n_L: at 0 the output is not defined.
    normaliser: Float[Array, ""]


def health(weights: Weights) -> Health:
    softmax, linear = (
        jnp.sum(jnp.where(where[None, None], values, 0), axis=-1)
        for values, where in [(weights.softmax, weights.softmax_set), (weights.linear, weights.linear_set)]
    )
    return Health(jnp.mean(linear / (softmax + linear)), jnp.min(softmax + linear))

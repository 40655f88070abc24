"""The aim on a student's own rollouts: the difference of two scores (distribution matching)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from train.stages.aims import Aim, wide


def score_difference(
    generated: Float[Array, "B T h w z"],
    real: Float[Array, "B T h w z"],
    fake: Float[Array, "B T h w z"],
    counted: Float[Array, "B T"],
) -> Float[Array, "B T h w z"]:
    """The direction in which the generated clips are to move, negative: (x̂_fake − x̂_real) / mean|x̂ − x̂_real|.

    Distribution matching distillation (Yin et al., arXiv 2311.18828): the mean is over a clip's frames that count.
    """
    counts = wide(counted)
    size = jnp.sum(jnp.abs(generated - real) * counts, axis=(1, 2, 3, 4), keepdims=True)
    values = jnp.sum(counts, axis=(1, 2, 3, 4), keepdims=True) * generated[0, 0].size
    return (fake - real) * jnp.maximum(values, 1) / jnp.maximum(size, 1e-6 * jnp.maximum(values, 1))


def scores_aim(
    velocity: Float[Array, "B T h w z"],
    difference: Float[Array, "B T h w z"],
    sigma: Float[Array, "B T"],
    weights: Float[Array, "B T"],
) -> Aim:
    """Distribution matching: v* = v + g / σ, whose gradient is that of ⟨g, x̂⟩.

    Args:
        velocity: the student's, at its exit step; taken as a constant.
        difference: g, of `score_difference`.
        sigma: the exit step's level, above 0 where a frame counts.
        weights: of each frame: a reward's, 0 for a frame that was given.
    """
    level = jnp.where(weights > 0, sigma, jnp.ones_like(sigma))
    return Aim(velocity.astype(jnp.float32) + difference / wide(level), weights * jnp.square(sigma))

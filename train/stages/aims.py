"""What a velocity is drawn to: every aim of few-step training is Σ_frames w · mean‖v − v*‖², and says v* and w.

In the convention x_σ = (1 − σ) x + σ ε, v = ε − x, a velocity's guess of the data is x̂ = z − σ v. So w = σ² measures
the difference of two guesses.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from train.engine.gradients import Mean


class Aim(NamedTuple):
    """What is learned of a clip's latent frames."""

    velocity: Float[Array, "B T h w z"]
    #: What each frame counts; 0: it is not learned.
    weights: Float[Array, "B T"]


def aim_mean(velocity: Float[Array, "B T h w z"], aim: Aim) -> Mean:
    """Weighted squared error, in float32, over the number of frames that count. (Over the sum of their weights, a batch
    of low levels would have as much to say as one of high levels.)"""
    target = jax.lax.stop_gradient(aim.velocity).astype(jnp.float32)
    squared = jnp.mean(jnp.square(velocity.astype(jnp.float32) - target), axis=(2, 3, 4))
    return Mean(jnp.sum(squared * aim.weights), jnp.sum((aim.weights > 0).astype(jnp.float32)))


def noised(
    latents: Float[Array, "B T h w z"], noise: Float[Array, "B T h w z"], sigma: Float[Array, "B T"]
) -> Float[Array, "B T h w z"]:
    """The latents at these levels."""
    return (1 - wide(sigma)) * latents + wide(sigma) * noise


def guess(
    noisy: Float[Array, "B T h w z"], velocity: Float[Array, "B T h w z"], sigma: Float[Array, "B T"]
) -> Float[Array, "B T h w z"]:
    """The data that a velocity points to, in float32."""
    return noisy - wide(sigma) * velocity.astype(jnp.float32)


def wide(sigma: Float[Array, "B T"]) -> Float[Array, "B T 1 1 1"]:
    return sigma[:, :, None, None, None]


def consistency_grid(levels: int, shift: float) -> Float[Array, "{levels}+1"]:
    """Ascending noise levels from 0 to 1, even before they are shifted."""
    even = jnp.linspace(0.0, 1.0, levels + 1)
    return shift * even / (1 + (shift - 1) * even)


def consistency_aim(
    teacher: Float[Array, "B T h w z"],
    following: Float[Array, "B T h w z"],
    sigma: Float[Array, "B T"],
    lower: Float[Array, "B T"],
) -> Aim:
    """Consistency distillation (Song et al., arXiv 2303.01469) in velocities: the guess at a level is to be the guess
    of the averaged model one Euler step of the teacher below it.

    x̂* = z' − σ' v_avg(z') with z' = z − (σ − σ') v_T, so v* = ((σ − σ') v_T + σ' v_avg) / σ: a weighted mean of two
    velocities, which loses nothing at small levels.

    Args:
        teacher: v_T at the level, with guidance.
        following: v_avg at the lower level.
        sigma, lower: the level, above 0, and the next one of the grid, down to 0.
    """
    share = wide(lower / sigma)
    return Aim((1 - share) * teacher.astype(jnp.float32) + share * following.astype(jnp.float32), jnp.square(sigma))


def spread(key: Key[Array, ""], rows: int, columns: int) -> Float[Array, "{rows} {columns}"]:
    """Numbers in 0…1 for each of some columns (chunks) of each row, stratified over the rows of each column and
    independent between columns."""
    order, within = jax.random.split(key)
    rank = jax.vmap(lambda k: jax.random.permutation(k, rows), out_axes=1)(jax.random.split(order, columns))
    return (rank.astype(jnp.float32) + jax.random.uniform(within, rank.shape)) / rows


def spread_levels(key: Key[Array, ""], rows: int, columns: int, *, levels: int) -> Int[Array, "{rows} {columns}"]:
    """As `spread`: a level's number, 1 to ``levels``."""
    even = spread(key, rows, columns)
    return jnp.clip(jnp.floor(even * levels).astype(jnp.int32), 0, levels - 1) + 1

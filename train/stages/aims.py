"""What a velocity is drawn to: an aim is Σ_frames w · mean‖v − v*‖², and says v* and w.

In the convention x_σ = (1 − σ) x + σ ε, v = ε − x.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

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


def wide(sigma: Float[Array, "B T"]) -> Float[Array, "B T 1 1 1"]:
    return sigma[:, :, None, None, None]


def spread(key: Key[Array, ""], rows: int, columns: int) -> Float[Array, "{rows} {columns}"]:
    """Numbers in 0…1 for each of some columns (chunks) of each row, stratified over the rows of each column and
    independent between columns."""
    order, within = jax.random.split(key)
    rank = jax.vmap(lambda k: jax.random.permutation(k, rows), out_axes=1)(jax.random.split(order, columns))
    return (rank.astype(jnp.float32) + jax.random.uniform(within, rank.shape)) / rows

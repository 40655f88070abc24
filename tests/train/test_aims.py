"""The aims of few-step training, against what is known exactly: a Gaussian's flow, a mixture's scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.stages.aims import (
    Aim,
    aim_mean,
    consistency_aim,
    consistency_grid,
    guess,
    spread_levels,
)

MEAN, DEVIATION = 0.7, 0.4


def clips(values: np.ndarray | jax.Array) -> jax.Array:
    """One number a clip."""
    return jnp.asarray(values, jnp.float32).reshape(-1, 1, 1, 1, 1)


def levels(value: float | jax.Array, count: int) -> jax.Array:
    return jnp.full((count, 1), value, jnp.float32)


def gaussian_velocity(z: jax.Array, sigma: jax.Array) -> jax.Array:
    """E[ε − x | z] where x is N(MEAN, DEVIATION²): both are jointly normal with z."""
    sigma = sigma[:, :, None, None, None]
    variance = jnp.square((1 - sigma) * DEVIATION) + jnp.square(sigma)
    off = (z - (1 - sigma) * MEAN) / variance
    return sigma * off - MEAN - (1 - sigma) * DEVIATION**2 * off


def consistent_end(count: int, start: jax.Array) -> jax.Array:
    """The guess from pure noise of the model that fits every level's consistency aim exactly, built from below."""
    grid = consistency_grid(count, shift=5.0)

    def velocity(z: jax.Array, level: int) -> jax.Array:
        sigma, lower = levels(grid[level], len(z)), levels(grid[level - 1], len(z))
        teacher = gaussian_velocity(z, sigma)
        below = z - (sigma - lower)[:, :, None, None, None] * teacher
        following = velocity(below, level - 1) if level > 1 else jnp.zeros_like(z)
        return consistency_aim(teacher, following, sigma, lower).velocity

    return guess(start, velocity(start, count), levels(1.0, len(start)))


def euler_end(count: int, start: np.ndarray) -> np.ndarray:
    """Of the same flow by Euler's method, in float64."""
    even = np.linspace(0, 1, count + 1)
    grid, x = 5 * even / (1 + 4 * even), start.astype(np.float64)
    for level in range(count, 0, -1):
        sigma = grid[level]
        off = (x - (1 - sigma) * MEAN) / (((1 - sigma) * DEVIATION) ** 2 + sigma**2)
        x = x - (sigma - grid[level - 1]) * (sigma * off - MEAN - (1 - sigma) * DEVIATION**2 * off)
    return x


def test_consistency_finds_the_exact_end_of_a_gaussians_flow() -> None:
    start = np.linspace(-2, 2, 9)
    # The flow moves quantiles: from N(0, 1) to N(MEAN, DEVIATION²) along straight lines of the standard normal.
    exact = MEAN + DEVIATION * start
    apart = []
    for count in (48, 96):
        found = np.asarray(consistent_end(count, clips(start))).reshape(-1)
        # One guess of the model that fits every aim is all of Euler's steps: but for float32, to 1e-5 of values near 1.
        np.testing.assert_allclose(found, euler_end(count, start), atol=2e-5)
        apart.append(np.abs(found - exact).max())
    # Euler's method is of first order: half the error at twice as many levels.
    assert 0.4 < apart[1] / apart[0] < 0.6


def test_a_consistency_aims_weights_make_it_a_difference_of_guesses() -> None:
    key = jax.random.split(jax.random.key(0), 4)
    z, v, teacher, following = (jax.random.normal(k, (2, 3, 2, 2, 4)) for k in key)
    sigma = jnp.asarray([[0.9, 0.5, 0.02], [1.0, 0.3, 0.6]])
    lower = sigma * jnp.asarray([[0.9, 0.5, 0.0], [0.99, 0.0, 0.8]])
    aim = consistency_aim(teacher, following, sigma, lower)
    below = z - (sigma - lower)[:, :, None, None, None] * teacher
    apart = guess(z, v, sigma) - guess(below, following, lower)
    np.testing.assert_allclose(aim_mean(v, aim).value, jnp.mean(jnp.square(apart)), rtol=1e-5)


def test_the_loss_divides_by_the_frames_that_count() -> None:
    velocity = jnp.ones((2, 3, 1, 1, 1))
    weights = jnp.asarray([[0.25, 0.0, 0.5], [0.0, 0.0, 0.0]])
    # Two frames count, with 0.25 and 0.5.
    assert float(aim_mean(velocity, Aim(jnp.zeros_like(velocity), weights)).value) == pytest.approx(0.375)
    assert float(aim_mean(velocity, Aim(jnp.zeros_like(velocity), jnp.zeros((2, 3)))).value) == 0


def test_every_column_of_levels_has_them_all() -> None:
    found = np.asarray(spread_levels(jax.random.key(0), 48, 5, levels=48))
    for column in found.T:
        assert sorted(column) == list(range(1, 49))
    assert len({tuple(column) for column in found.T}) == 5

"""Distribution matching against what is known exactly: a mixture's scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared.programs import FOR_SPEED

from train.stages.aims import aim_mean, noised
from train.stages.scores import score_difference, scores_aim


def posterior_mean(
    noisy: jax.Array, sigma: jax.Array, centres: jax.Array, spread: float, shares: jax.Array
) -> jax.Array:
    """E[x | noisy] of a mixture of normals of one standard deviation."""
    z, s = noisy.reshape(-1, 1), sigma.reshape(-1, 1)
    variance = jnp.square((1 - s) * spread) + jnp.square(s)
    off = z - (1 - s) * centres[None]
    weight = jax.nn.softmax(jnp.log(shares)[None] - jnp.square(off) / (2 * variance), axis=1)
    mean = centres[None] + (1 - s) * spread**2 * off / variance
    return jnp.sum(weight * mean, axis=1).reshape(noisy.shape)


def matched(real: jax.Array, fake: jax.Array, x: jax.Array, z: jax.Array, sigma: jax.Array) -> jax.Array:
    """The gradient for x of the scores aim."""
    wide = sigma[:, :, None, None, None]

    def loss(x: jax.Array) -> jax.Array:
        velocity = (z - x) / wide
        difference = score_difference(x, real, fake, jnp.ones_like(sigma))
        constant = jax.lax.stop_gradient((velocity, difference))
        return aim_mean(velocity, scores_aim(*constant, sigma, jnp.ones_like(sigma))).value

    return jax.grad(loss)(x)


def test_known_scores_find_a_mixtures_mean_and_variance() -> None:
    """The generator is a set of particles, so that its own score is known exactly too: every particle is a centre.

    64 of them are a clip's pixels: a clip's difference is measured by its mean, which one number alone would bias.
    """
    centres, spread, shares, count = jnp.asarray([-1.0, 1.5]), 0.3, jnp.asarray([0.4, 0.6]), 256
    mean = 0.4 * -1.0 + 0.6 * 1.5
    variance = spread**2 + 0.4 * (-1.0 - mean) ** 2 + 0.6 * (1.5 - mean) ** 2

    def posterior(noisy: jax.Array, tau: jax.Array, *mixture) -> jax.Array:
        each = jnp.repeat(tau, 64)[:, None]
        return posterior_mean(noisy.reshape(-1, 1), each, *mixture).reshape(noisy.shape)

    def step(number: jax.Array, x: jax.Array) -> jax.Array:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), number), 3)
        even = (jax.random.permutation(keys[0], 4).astype(jnp.float32) + jax.random.uniform(keys[1], (4,))) / 4
        tau = jnp.clip(5 * even / (1 + 4 * even), 0.02, 0.98)[:, None]
        noisy = noised(x, jax.random.normal(keys[2], x.shape), tau)
        real = posterior(noisy, tau, centres, spread, shares)
        fake = posterior(noisy, tau, x.reshape(-1), 0.0, jnp.full(count, 1 / count))
        rate = 0.02 * count * (1 - number.astype(jnp.float32) / 2000)  # the loss is a mean over particles
        return x - rate * matched(real, fake, x, x + jnp.ones_like(x), jnp.ones((4, 1)))

    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 1, 8, 8, 1)), jnp.float32)
    x = jax.jit(lambda x: jax.lax.fori_loop(0, 2000, step, x), compiler_options=FOR_SPEED)(x)
    assert float(x.mean()) == pytest.approx(mean, abs=0.15)
    assert float(x.var()) == pytest.approx(variance, rel=0.15)
    # Both of its parts, each about as often as it is there.
    assert float((x > 0.25).mean()) == pytest.approx(0.6, abs=0.08)


def test_with_the_real_score_for_a_critic_nothing_moves() -> None:
    x, real = jax.random.normal(jax.random.key(0), (2, 4, 3, 2, 2, 1))
    gradient = matched(real, real, x, x + 1, jnp.full((4, 3), 0.7))
    assert not gradient.any()


def test_a_clips_difference_is_measured_by_its_frames_that_count() -> None:
    x, real, fake = jax.random.normal(jax.random.key(1), (3, 2, 4, 2, 2, 3))
    counted = jnp.asarray([[0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    found = score_difference(x, real, fake, counted)
    size = jnp.mean(jnp.abs(x - real)[0, 1:])
    np.testing.assert_allclose(found[0], (fake - real)[0] / size, rtol=1e-5)
    moved = score_difference(x.at[0, 0].add(100.0), real, fake, counted)
    np.testing.assert_allclose(moved[0], found[0], rtol=1e-5)

"""Sinusoids of positions against float64, diffusers and the official formula; positions beyond Wan's table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import Timesteps
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.tiers import examples

from rehyat_jax.models.wan.positions import cos_sin, rotary_embedding, rotate, timestep_embedding

#: The fastest is one radian a position, as everywhere in Wan.
FREQUENCIES = 10_000.0 ** (-np.arange(64) / 64)

_random = np.random.default_rng(0)
POSITIONS = {
    "first_whole": np.arange(4096 * 3 + 1),
    "whole_to_2^24": np.append(_random.integers(0, 2**24, 20_000), 2**24),
    "timesteps": np.append(_random.uniform(0, 1000, 20_000), 1000.0),
    "large_fractions": _random.uniform(0, 2**23, 20_000),
}


def exact(positions: np.ndarray, frequencies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin by numpy in float64."""
    angles = np.multiply.outer(positions.astype(np.float64), frequencies)
    return np.cos(angles), np.sin(angles)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", POSITIONS)
def test_sinusoids_are_those_of_float64(name, traced):
    """1e-6: the angle is within half a turn by then, where float32 is good to 2e-7, and cos and sin add as much."""
    positions = POSITIONS[name].astype(np.float32)
    made = (jax.jit(lambda p: cos_sin(p, FREQUENCIES)) if traced else lambda p: cos_sin(p, FREQUENCIES))(
        jnp.asarray(positions)
    )
    cos, sin = exact(positions, FREQUENCIES)
    np.testing.assert_allclose(made.cos, cos, atol=1e-6, rtol=0)
    np.testing.assert_allclose(made.sin, sin, atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=examples(200))
@given(st.floats(0, 2**24, width=32), st.floats(0, 1, width=32))
def test_any_position_at_any_frequency(position, frequency):
    made = cos_sin(jnp.asarray([position], jnp.float32), np.asarray([frequency], np.float64))
    cos, sin = exact(np.asarray([position]), np.asarray([frequency]))
    np.testing.assert_allclose(made.cos, cos, atol=1e-6, rtol=0)
    np.testing.assert_allclose(made.sin, sin, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("head_dim", "frames", "height", "width"), [(128, 1024, 3, 2), (12, 1, 1024, 1), (22, 5, 1, 1024), (64, 21, 30, 52)]
)
def test_rotary_factors_are_those_of_diffusers(head_dim, frames, height, width):
    """Its tables, made in float64, to 1e-6."""
    theirs = WanRotaryPosEmbed(head_dim, (1, 2, 2), 1024)(torch.zeros(1, 1, frames, 2 * height, 2 * width))
    ours = jax.jit(lambda frames: rotary_embedding(head_dim, frames, height, width))(jnp.arange(frames))
    # Theirs holds each pair's factor twice.
    for mine, yours in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, yours[0, :, 0, ::2].numpy(), atol=1e-6, rtol=0)
        np.testing.assert_allclose(mine, yours[0, :, 0, 1::2].numpy(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dim", [256, 34])
def test_time_embedding_is_the_official_formula(dim):
    """``sinusoidal_embedding_1d`` of Wan2.1 ``wan/modules/model.py``, in float64 as there: 1e-6."""
    times = np.concatenate([np.arange(1001), POSITIONS["timesteps"]]).astype(np.float32)
    cos, sin = exact(times, np.power(10_000.0, -np.arange(dim // 2) / (dim // 2)))
    ours = jax.jit(lambda times: timestep_embedding(times, dim))(jnp.asarray(times))
    np.testing.assert_allclose(ours, np.concatenate([cos, sin], axis=1), atol=1e-6, rtol=0)


def test_time_embedding_is_that_of_diffusers_to_its_rounding():
    """diffusers makes angle t·exp(x) with x = -i/half·ln 10,000 in float32, u = 2^-24: x is wrong by three roundings
    (3u|x|, the logarithm's own among them), exp and product each by one, u, and exp by one of its own."""
    half, times = 128, np.append(POSITIONS["timesteps"], 999.0).astype(np.float32)
    exponents = np.arange(half) / half * np.log(10_000)
    bound = np.multiply.outer(times.astype(np.float64), np.exp(-exponents) * (3 * exponents + 3) * 2**-24) + 1e-6
    theirs = Timesteps(num_channels=2 * half, flip_sin_to_cos=True, downscale_freq_shift=0)(torch.from_numpy(times))
    error = np.abs(np.asarray(timestep_embedding(jnp.asarray(times), 2 * half)) - theirs.numpy())
    assert (error <= np.tile(bound, 2)).all()


def scores(start: int, distance: int) -> np.ndarray:
    """Attention scores between all tokens of two latent frames, of which the first is at ``start``."""
    rng = np.random.default_rng(1)
    query, key = (jnp.asarray(rng.standard_normal((1, 6, 2, 128), np.float32)) for _ in range(2))
    return np.asarray(_products(query, key, jnp.asarray([start]), jnp.asarray([start + distance]))) * 128**-0.5


@jax.jit
def _products(query: jax.Array, key: jax.Array, start: jax.Array, end: jax.Array) -> jax.Array:
    rotated = [rotate(x, rotary_embedding(128, position, 2, 3)) for x, position in ((query, start), (key, end))]
    return jnp.einsum("bnhd,bmhd->bhnm", *rotated)


@pytest.mark.parametrize("distance", [0, 1, 20, 1000])
@pytest.mark.parametrize("start", [5, 1020, 5000, 2**24 - 2000])
def test_beyond_the_table_only_differences_matter(start, distance):
    """Scores of order one are the same 5,000 frames, or any number of frames, later: 1e-4 (rounding is some 1e-6)."""
    near = scores(0, distance)
    assert 0.5 < near.std() < 2
    np.testing.assert_allclose(scores(start, distance), near, atol=1e-4, rtol=0)


def test_distance_does_matter():
    assert np.abs(scores(0, 1) - scores(0, 20)).max() > 0.1


@pytest.mark.parametrize("start", [0, 1000, 70_000])
def test_traced_positions_are_static_ones(start):
    """Fused and unfused arithmetic may differ in the last bit or two of values up to one: 2.5e-7."""
    made = jax.jit(lambda first: rotary_embedding(128, first + jnp.arange(50), 3, 2))(start)
    static = rotary_embedding(128, jnp.arange(start, start + 50), 3, 2)
    for traced, fixed in zip(made, static, strict=True):
        np.testing.assert_allclose(traced, fixed, atol=2.5e-7, rtol=0)


def test_jax_x64_changes_nothing():
    """Not a bit, and not the type."""
    times = POSITIONS["timesteps"][:500].astype(np.float32)

    def tables() -> list[jax.Array]:
        return [
            *rotary_embedding(22, jnp.arange(1500), 2, 3),
            *jax.jit(lambda first: rotary_embedding(22, first + jnp.arange(9), 2, 3))(2000),
            timestep_embedding(jnp.asarray(times), 256),
        ]

    narrow = tables()
    with jax.enable_x64(True):
        wide = tables()
    for one, other in zip(narrow, wide, strict=True):
        assert one.dtype == other.dtype == jnp.float32
        np.testing.assert_array_equal(one, other)


def test_rotation_keeps_lengths_and_type():
    """A rotation: 1e-5 on norms of some eleven. bf16 in, bf16 out, turned in float32."""
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 12, 3, 128), np.float32))
    rotary = rotary_embedding(128, jnp.arange(2), 2, 3)
    turned = rotate(x, rotary)
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), atol=1e-5, rtol=0)
    half = x.astype(jnp.bfloat16)
    assert rotate(half, rotary).dtype == jnp.bfloat16
    expected = rotate(half.astype(jnp.float32), rotary).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(rotate(half, rotary), np.float32), np.asarray(expected, np.float32))

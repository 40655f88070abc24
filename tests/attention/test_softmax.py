"""Softmax attention: numpy in float64, torch's gradients, and memory that grows with N, not N²."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from shared.tiers import breadth

from rehyat_jax.attention.softmax import softmax_attention


def inputs(n: int, m: int, *, heads: int = 2, dim: int = 8, batch: int = 1, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((batch, length, heads, dim), np.float32) for length in (n, m, m)]


def exact(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    query, key, value = (x.astype(np.float64) for x in (query, key, value))
    scores = np.einsum("bnhd,bmhd->bhnm", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bhnm,bmhd->bnhd", weights / weights.sum(axis=-1, keepdims=True), value)


@pytest.mark.parametrize(
    ("n", "m"),
    breadth(
        [(1025, 33), (7, 19), (1, 1), (1023, 5), (1024, 64), (2048, 100), (2500, 701), (3333, 3333)],
        test=3,
    ),
)
def test_blocks_of_queries_are_the_plain_result(n, m):
    """float64's to 1e-5 at every length around the block's 1,024: sums of order-one values in float32."""
    arguments = inputs(n, m, batch=2 if n < 3000 else 1)
    ours = jax.jit(softmax_attention)(*arguments)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, exact(*arguments), atol=1e-5, rtol=0)


def test_float64_is_computed_in_float64(x64):
    arguments = [jnp.asarray(x, jnp.float64) for x in inputs(1100, 40)]
    np.testing.assert_allclose(softmax_attention(*arguments), exact(*map(np.asarray, arguments)), atol=1e-13, rtol=0)


def test_large_scores_do_not_overflow():
    """Scores of some ±5,000: one key takes all."""
    query, key, value = inputs(9, 30)
    query, key = 70 * query, 70 * key
    ours = softmax_attention(*map(jnp.asarray, (query, key, value)))
    # A rounding of scores of 5,000 is 2.4e-4, and their ratio with it; three in a row.
    np.testing.assert_allclose(ours, exact(query, key, value), atol=2e-3, rtol=0)


def test_bf16_has_float32_scores():
    """Only inputs, weights and result are rounded to 8 bits: an rms of 2^-8 on results of order 0.1 to 1."""
    arguments = [jnp.asarray(x, jnp.bfloat16) for x in inputs(1100, 50)]
    ours = jax.jit(softmax_attention)(*arguments)
    assert ours.dtype == jnp.bfloat16
    error = np.asarray(ours, np.float64) - exact(*(np.asarray(x, np.float32) for x in arguments))
    assert np.sqrt(np.mean(error**2)) < 2**-8


@pytest.mark.parametrize(("n", "m"), [(11, 6), (2100, 37)])
def test_gradients_are_those_of_torch(n, m):
    """Within a block and over blocks; 1e-5 of each gradient's largest entry, against torch in float64."""
    arguments, direction = inputs(n, m), inputs(n, m, seed=1)[0]
    theirs = [torch.from_numpy(x).double().requires_grad_() for x in arguments]
    out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in theirs)).transpose(1, 2)
    (out * torch.from_numpy(direction)).sum().backward()
    ours = jax.jit(jax.grad(lambda *x: jnp.sum(softmax_attention(*x) * direction), argnums=(0, 1, 2)))(*arguments)
    for mine, yours in zip(ours, theirs, strict=True):
        wanted = yours.grad.numpy()
        np.testing.assert_allclose(mine, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)


@pytest.mark.parametrize("n", [5, 1500])
def test_a_key_stands_for_many_alike(n):
    """The last of 7 keys for 506: numpy's on all 512 to 1e-5; torch's gradients, those of the alike summed."""
    (query, key, value), direction = inputs(n, 7), inputs(n, 7, seed=1)[0]
    whole = [np.pad(x, ((0, 0), (0, 505), (0, 0), (0, 0)), mode="edge") for x in (key, value)]

    ours = jax.jit(functools.partial(softmax_attention, repeats=506))
    np.testing.assert_allclose(ours(query, key, value), exact(query, *whole), atol=1e-5, rtol=0)
    theirs = [torch.from_numpy(x).double().requires_grad_() for x in (query, key, value)]
    padded = [torch.cat([x, x[:, -1:].expand(-1, 505, -1, -1)], dim=1) for x in theirs[1:]]
    given = (x.transpose(1, 2) for x in (theirs[0], *padded))
    out = torch.nn.functional.scaled_dot_product_attention(*given).transpose(1, 2)
    (out * torch.from_numpy(direction)).sum().backward()
    gradients = jax.jit(jax.grad(lambda *x: jnp.sum(ours(*x) * direction), argnums=(0, 1, 2)))(query, key, value)
    for mine, yours in zip(gradients, theirs, strict=True):
        wanted = yours.grad.numpy()
        np.testing.assert_allclose(mine, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_grows_with_length_and_not_its_square(backward):
    """By the compiler's own account, at a 480p video's 32,760 tokens: scores of all queries would be 4.3 GB a head.

    A block holds 1,024 × 32,760 scores and a few copies; six bound it.
    """
    shape = jax.ShapeDtypeStruct((1, 32_760, 1, 128), jnp.float32)
    function = jax.grad(lambda *x: softmax_attention(*x).sum(), argnums=(0, 1, 2)) if backward else softmax_attention
    memory = jax.jit(function).lower(shape, shape, shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 6 * 1024 * 32_760 * 4

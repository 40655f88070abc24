"""The optimiser against optax, its schedule, its shares of a rate."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from shared.training import problem

from rehyat_jax.errors import ConfigError
from rehyat_jax.runtime.variables import GateParam, MixerParam, kernel, table
from train.engine.optimizer import OptimizerConfig


def test_the_rate_warms_up_and_falls_by_half_a_cosine():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=9, final_share=0.1)
    rates = [config.rate(step, 109) for step in range(110)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10, rtol=1e-12)
    # Halfway down the cosine: the mean of 1 and 0.1.
    np.testing.assert_allclose([rates[9], rates[59], rates[109]], [1.0, 0.55, 0.1], rtol=1e-12)
    assert np.all(np.diff(rates[9:]) < 0)
    theirs = optax.cosine_decay_schedule(1.0, 100, alpha=0.1)
    np.testing.assert_allclose(rates[9:], [theirs(step) for step in range(101)], atol=1e-6)  # float32


def test_a_run_shorter_than_its_warmup_still_reaches_its_peak_and_end():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=200, final_share=0.0)
    assert max(config.rate(step, 10) for step in range(10)) == 1.0
    assert config.rate(10, 10) == 0.0
    assert config.rate(0, 1) == 1.0


def _gradients(params, step):
    """Of a quadratic, large enough at first to be clipped."""
    return jax.tree.map(lambda p: 3.0 * p + jnp.sin(1.0 * step), params)


def test_a_step_is_optax_adamw_on_clipped_gradients():
    config = OptimizerConfig(learning_rate=0.05, warmup_steps=3, weight_decay=0.1, beta2=0.95, clip_norm=2.0)
    mask = {"layer": {"kernel": True, "bias": False}, "table": {"embedding": True}}
    theirs = optax.chain(
        optax.clip_by_global_norm(2.0),
        optax.adamw(
            lambda count: jnp.float32([config.rate(i, 20) for i in range(20)])[count],
            b2=0.95,
            weight_decay=0.1,
            mask=mask,
        ),
    )
    state, params = config.init(problem()), problem()
    their_state, average = theirs.init(params), problem()
    apply = jax.jit(config.apply)
    for step in range(20):
        state = apply(state, _gradients(state.params, step), jnp.float32(config.rate(step, 20)))
        with jax.numpy_dtype_promotion("standard"):
            updates, their_state = theirs.update(_gradients(params, step), their_state, params)
        params = optax.apply_updates(params, updates)
        decay = min(0.999, (1 + step) / (10 + step))
        average = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, average, params)
    assert int(state.step) == 20
    chex.assert_trees_all_close(state.params, params, atol=1e-5)
    chex.assert_trees_all_close(state.ema, average, atol=1e-5)


def test_muon_makes_a_kernels_update_orthogonal():
    """Its singular values are all about 1 (Newton-Schulz ends within 0.7 to 1.2), whatever the gradient's are."""
    config = OptimizerConfig(method="muon", weight_decay=0.0, clip_norm=1e9)
    rng = np.random.default_rng(0)
    stacked, convolution, bias = ((2, 6, 6), (3, 3, 1, 2, 8), (5,))

    def numbers(shape, scale=1.0, **metadata):
        return nnx.Param(jnp.asarray(rng.normal(size=shape) * scale, jnp.float32), **metadata)

    gradients = {
        "layers": numbers(stacked, [[[1.0]], [[100.0]]], **kernel(None, None)),
        "convolution": numbers(convolution, **kernel(*[None] * 5)),
        "heads": numbers((2, 2, 8, 4), **kernel("heads", None, None, inputs=1)),
        "bias": numbers(bias),
    }
    params = jax.tree.map(jnp.zeros_like, gradients)
    after = config.apply(config.init(params), gradients, jnp.float32(1.0)).params
    # A layer of the stack is a matrix of its own, and so is a head of a feature map; a convolution is one from all that
    # it sees to its output.
    heads = after["heads"][...].reshape(4, 8, 4)
    for matrix in (*after["layers"][...], after["convolution"][...].reshape(18, 8), *heads):
        values = np.linalg.svd(matrix, compute_uv=False)
        assert values.min() > 0.6
        assert values.max() < 1.3
    # Adam's first step is the gradient's sign, at a tenth of the rate. Nesterov's look ahead, which optax adds, takes
    # 0.9 of the first moment (0.1, corrected by 1 - 0.9²) and 0.1 of the gradient (corrected by 1 - 0.9).
    expected = -0.1 * (1 + 0.09 / 0.19) * np.sign(gradients["bias"][...])
    np.testing.assert_allclose(after["bias"][...], expected, atol=1e-5)


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_a_share_of_the_learning_rate_is_that_share_of_the_step(method):
    config, params = OptimizerConfig(method=method), problem()
    params["layer"]["bias"] = GateParam(params["layer"]["bias"][...])
    params["table"]["embedding"] = MixerParam(params["table"]["embedding"][...], **table())
    whole, shared = (
        config.apply(config.init(params), _gradients(params, 0), jnp.float32(0.1), shares=x).params
        for x in ({}, {GateParam: 3.0, MixerParam: 0.0})
    )
    expected = {
        "layer": {
            "kernel": whole["layer"]["kernel"],
            "bias": jax.tree.map(lambda p, after: p + 3 * (after - p), *(x["layer"]["bias"] for x in (params, whole))),
        },
        "table": params["table"],
    }
    chex.assert_trees_all_close(shared, expected, atol=1e-6)


@pytest.mark.parametrize("field", ["learning_rate", "ema_decay", "beta2", "clip_norm"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_impossible_optimiser_settings_are_named(field, value):
    with pytest.raises(ConfigError, match=field):
        OptimizerConfig(**{field: value})

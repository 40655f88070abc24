"""The feature map: the published size, an independent evaluation of it, its start, and its options."""

import functools
import math

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch
from flax import nnx
from shared.tiers import breadth

from rehyat_jax import hybrid_attention
from rehyat_jax.attention.features import FeatureMap
from rehyat_jax.attention.softmax import softmax_attention
from rehyat_jax.errors import ConfigError
from rehyat_jax.mixers.window import window_attention
from rehyat_jax.models.checkpoints import load_transformer
from rehyat_jax.models.folder import bundled_models


def parameters(module: nnx.Module) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(module, nnx.Param)))


def test_published_size():
    """method.md §1: 128 → 256 → 256 per head, 1.186 M parameters at 12 heads; made without memory."""
    phi = nnx.eval_shape(lambda: FeatureMap(12, 128, rngs=nnx.Rngs(0)))
    assert parameters(phi) == 12 * ((128 * 256 + 256) + (256 * 256 + 256)) == 1_185_792


@pytest.mark.parametrize(("layers", "degree"), [(1, 1), (2, 2), (3, 3)])
def test_is_an_mlp_per_head_with_powers(layers, degree):
    """Against torch's layers, head by head; float32 rounding of sums of at most 15 terms of order one."""
    phi = FeatureMap(3, 5, layers=layers, degree=degree, rngs=nnx.Rngs(0))
    state = jax.tree.map(
        lambda p: jnp.asarray(np.random.default_rng(p.size).normal(size=p.shape) * 0.4, jnp.float32), nnx.state(phi)
    )
    nnx.update(phi, state)
    x = np.random.default_rng(1).normal(size=(2, 7, 3, 5)).astype(np.float32)
    ours = np.asarray(phi(jnp.asarray(x)))
    assert ours.shape == (2, 7, 3, degree * 5)
    for head in range(3):
        y = torch.tensor(x[:, :, head])
        for i, layer in enumerate(phi.layers):
            y = y @ torch.tensor(np.asarray(layer.kernel[head])) + torch.tensor(np.asarray(layer.bias[head]))
            y = torch.nn.functional.softplus(y) if i == layers - 1 else torch.nn.functional.gelu(y, approximate="tanh")
        for i in range(degree):
            np.testing.assert_allclose(
                ours[:, :, head, i * 5 : i * 5 + 5], y[..., i * 5 : i * 5 + 5] ** (i + 1), rtol=2e-5, atol=1e-6
            )


@pytest.mark.parametrize("positive", breadth(["softplus", "exp", "none"]))
@pytest.mark.parametrize("activation", breadth(["gelu", "silu", "relu"]))
@pytest.mark.parametrize("level", [1e-4, 1.0])
def test_starts_level_and_learns_everywhere(positive, activation, level):
    """φ_q·φ_k of every pair is the level asked for, within what the output kernel's spread of 0.1 makes of it (powers
    up to 2 of two maps: within a half), and no parameter's gradient is zero."""
    x = jax.random.normal(jax.random.key(0), (2, 64, 2, 16))
    phi_q, phi_k = (
        FeatureMap(2, 16, activation=activation, positive=positive, level=level, rngs=nnx.Rngs(i)) for i in range(2)
    )

    def pairs(maps: tuple[FeatureMap, FeatureMap]) -> jax.Array:
        return jnp.einsum("bihf,bjhf->bhij", maps[0](x), maps[1](x[::-1]))

    values = pairs((phi_q, phi_k))
    assert abs(jnp.mean(values) / level - 1) < 0.05
    assert jnp.max(jnp.abs(values / level - 1)) < 0.5
    gradients = nnx.grad(lambda maps: jnp.mean(jnp.square(pairs(maps) / level)))((phi_q, phi_k))
    assert all(jnp.all(jnp.any(g != 0, axis=tuple(range(1, g.ndim)))) for g in jax.tree.leaves(gradients))


@pytest.mark.full
def test_an_unconverted_model_is_hardly_disturbed():
    """What the bundled model's ten blocks attend to, in noise of 17 latent frames, beside full softmax, mean absolute
    over the mean: converted and untrained it is as far off as its window alone (0.29), within a hundredth of that, and
    nearer than with a φ initialised as any other network (0.56)."""
    teacher = load_transformer(bundled_models()["mini-sprites"], hybrid=None)
    heads, width = teacher.config.num_attention_heads, teacher.config.attention_head_dim

    @nnx.jit
    def inside(teacher, latents):
        given = teacher.embed(latents, jnp.array([750.0]))
        text = teacher.embed_text(jnp.zeros((1, 8, teacher.config.text_dim)))
        graph, layers = nnx.split(teacher.blocks)

        def attend(q, k, v):
            y = softmax_attention(q, k, v)
            return y, (q, k, v, y)

        def step(x, layer):
            return nnx.merge(graph, layer).attending(x, text, given.modulation, given.rotary, attend)

        return jax.lax.scan(step, given.x, layers)[1]

    q, k, v, exact = (x[:, 0] for x in inside(teacher, jax.random.normal(jax.random.key(0), (1, 17, 16, 16, 16))))
    window = {"chunk": 3 * 64, "overlap": 64}

    def error(attention) -> float:
        return float(jnp.mean(jnp.abs(jax.jit(attention)(q, k, v) - exact)) / jnp.mean(jnp.abs(exact)))

    def hybrid(phi_q: FeatureMap, phi_k: FeatureMap) -> float:
        return error(lambda q, k, v: hybrid_attention(q, k, v, phi_q(q), phi_k(k), **window))

    begun = [FeatureMap(heads, width, rngs=nnx.Rngs(i)) for i in range(2)]
    usual = [FeatureMap(heads, width, rngs=nnx.Rngs(i)) for i in range(2)]
    for phi in usual:
        phi.layers[-1].kernel.set_value(phi.layers[-1].kernel[...] * 10)
        phi.layers[-1].bias.set_value(jnp.zeros_like(phi.layers[-1].bias[...]))
    alone = error(functools.partial(window_attention, **window))
    assert hybrid(*begun) < 1.01 * alone
    assert hybrid(*usual) > 1.5 * alone


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_never_zero_nor_infinite(dtype, scale):
    """Inputs a hundred times beyond a normed query's still give a positive, finite inner product."""
    x = scale * jax.random.normal(jax.random.key(0), (1, 256, 2, 16), dtype)
    phi = FeatureMap(2, 16, dtype=dtype, rngs=nnx.Rngs(0))
    assert phi(x).dtype == dtype
    pairs = jnp.einsum("bihf,bjhf->bhij", phi(x), phi(x), preferred_element_type=jnp.float32)
    assert jnp.all((pairs > 0) & jnp.isfinite(pairs))


@pytest.mark.parametrize(
    "wrong", [{"layers": 0}, {"degree": 0}, {"activation": "tanh"}, {"positive": "square"}, {"level": 0.0}]
)
def test_impossible_options_are_named(wrong, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        FeatureMap(2, 4, **wrong, rngs=nnx.Rngs(0))

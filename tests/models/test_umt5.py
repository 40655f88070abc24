"""UMT5's encoder against transformers' ``UMT5EncoderModel`` on the same random weights, then its own promises."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from shared import tiers
from shared.umt5 import by_us, ported, reference
from transformers import UMT5Config, UMT5EncoderModel
from transformers.models.umt5.modeling_umt5 import UMT5Attention

from rehyat_jax.errors import ConfigError
from rehyat_jax.models.checkpoints import load_text_encoder
from rehyat_jax.models.umt5.config import TextEncoderConfig
from rehyat_jax.models.umt5.encoder import UMT5Encoder, relative_position_buckets

TINY = TextEncoderConfig(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)

CONFIGS = {
    "as_t5": TextEncoderConfig(vocab_size=101, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4),
    "odd_and_wide": TextEncoderConfig(
        vocab_size=77,
        d_model=27,
        d_kv=7,
        d_ff=45,
        num_layers=2,
        num_heads=5,
        relative_attention_num_buckets=10,
        relative_attention_max_distance=23,
    ),
    "one_head_one_layer": TextEncoderConfig(
        vocab_size=33,
        d_model=40,
        d_kv=13,
        d_ff=19,
        num_layers=1,
        num_heads=1,
        relative_attention_num_buckets=6,
        layer_norm_epsilon=1e-5,
    ),
    "bundled": TextEncoderConfig.mini_sprites(),
}


def batch(config: TextEncoderConfig, *, length: int, real: list[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (len(real), length)).astype(np.int32)
    return ids, np.arange(length)[None] < np.asarray(real)[:, None]


@pytest.mark.parametrize("name", tiers.breadth(CONFIGS))
def test_agrees_with_transformers(name):
    """1e-4 on activations of order one (the last norm makes them so), in float32, at every real position."""
    config = CONFIGS[name]
    model = reference(config, seed=len(name))
    ids, mask = batch(config, length=151, real=[151, 1, 64], seed=1)
    with torch.no_grad():
        out = model(torch.tensor(ids.astype(np.int64)), torch.tensor(mask.astype(np.int64)))
    theirs = out.last_hidden_state.numpy()
    ours = by_us(ported(model, config), ids, mask.astype(np.int32))
    assert 0.3 < theirs[mask].std() < 3
    np.testing.assert_allclose(ours[mask], theirs[mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 20), (6, 7), (10, 33), (64, 1000), (4, 2)])
def test_buckets_are_those_of_transformers(buckets, distance):
    """Exactly, out to 1,024 tokens, for both signs."""
    config = UMT5Config(relative_attention_num_buckets=buckets, relative_attention_max_distance=distance, d_model=8)
    attention = UMT5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    position = torch.arange(1024)
    theirs = attention._relative_position_bucket(position[None] - position[:, None]).numpy()
    ours = relative_position_buckets(1024, num_buckets=buckets, max_distance=distance)
    np.testing.assert_array_equal(ours, theirs)


def test_too_few_buckets_are_refused():
    with pytest.raises(ConfigError, match="relative_attention_num_buckets"):
        UMT5Encoder(dataclasses.replace(TINY, relative_attention_num_buckets=3), rngs=nnx.Rngs(0))


def test_padding_does_not_reach_real_positions():
    """Other ids under the padding, and other lengths of it, leave real positions as they were: 1e-5, float32 sums."""
    encoder = ported(reference(TINY, seed=3), TINY)
    ids, mask = batch(TINY, length=64, real=[20, 33], seed=2)
    short = by_us(encoder, ids, mask)
    longer = np.full((2, 200), 7, np.int32)
    longer[:, :64] = np.where(mask, ids, 9)
    long = by_us(encoder, longer, np.pad(mask, ((0, 0), (0, 136))))
    np.testing.assert_allclose(long[:, :64][mask], short[mask], atol=1e-5, rtol=0)


def test_bf16_stays_near_float32():
    """bf16 keeps 8 bits: 2^-8 a rounding, some ten in a row on order-one activations, so an rms of 0.05 at most."""
    config = CONFIGS["as_t5"]
    model = reference(config, seed=5)
    ids, mask = batch(config, length=40, real=[40, 11], seed=3)
    exact = by_us(ported(model, config), ids, mask)
    rounded = ported(model, config, dtype=jnp.bfloat16)(ids, mask)
    assert rounded.dtype == jnp.bfloat16
    error = np.asarray(rounded.astype(jnp.float32))[mask] - exact[mask]
    assert np.sqrt(np.mean(error**2)) < 0.05


def program_of(config: TextEncoderConfig, ids: np.ndarray, mask: np.ndarray, **kinds):
    graph, weights = nnx.split(nnx.eval_shape(lambda: UMT5Encoder(config, **kinds, rngs=nnx.Rngs(0))))
    return jax.make_jaxpr(lambda weights: nnx.merge(graph, weights)(ids, mask))(weights)


def test_norms_biases_and_softmax_are_float32_under_bf16():
    ids, mask = batch(TINY, length=8, real=[8], seed=0)
    program = str(program_of(TINY, ids, mask, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))
    for operation in ("rsqrt", "exp"):
        lines = [line for line in program.splitlines() if f"= {operation}" in line]
        assert lines
        assert all(":f32[" in line for line in lines), lines


def test_xxl_has_its_shapes_without_memory():
    """umt5-xxl's encoder: 24 layers of 4096, and the embedding of 256,384 words: 5.68 billion parameters."""
    encoder = nnx.eval_shape(lambda: UMT5Encoder(TextEncoderConfig.umt5_xxl(), rngs=nnx.Rngs(0)))
    shapes = {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(encoder))}
    assert shapes["shared.embedding"] == (256384, 4096)
    assert shapes["block.self_attention.q.kernel"] == (24, 4096, 4096)
    assert shapes["block.ffn.wo.kernel"] == (24, 10240, 4096)
    assert shapes["block.self_attention.relative_attention_bias.embedding"] == (24, 32, 64)
    with torch.device("meta"):
        theirs = UMT5EncoderModel(UMT5Config(**TextEncoderConfig.umt5_xxl().to_dict()))
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == sum(p.numel() for p in theirs.parameters())


def test_one_compilation_serves_all_layers():
    """Scanned: the program of twelve layers is as long as that of two."""
    ids, mask = batch(TINY, length=8, real=[8], seed=0)

    def size(layers: int) -> int:
        return len(str(program_of(dataclasses.replace(TINY, num_layers=layers), ids, mask)).splitlines())

    assert size(12) == size(2)


def test_layers_start_different_and_from_the_seed():
    first, again, other = (UMT5Encoder(TINY, rngs=nnx.Rngs(seed)) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(nnx.state(first), nnx.state(again))
    kernel = first.block.self_attention.q.kernel[...]
    assert jnp.abs(kernel[0] - kernel[1]).max() > 1e-3
    assert jnp.abs(kernel - other.block.self_attention.q.kernel[...]).max() > 1e-3


@pytest.mark.full
def test_learns_from_scratch_with_adam():
    """Position 1 must report the token two places on: from chance (ln 8 = 2.08) to below 0.1 in 150 steps of Adam."""
    encoder = UMT5Encoder(dataclasses.replace(TINY, d_model=32, d_kv=16, vocab_size=8), rngs=nnx.Rngs(0))
    head = nnx.Linear(32, 8, rngs=nnx.Rngs(1))
    graphdef, params = nnx.split((encoder, head))
    optimizer = optax.adam(3e-3)

    def loss_of(params, ids):
        encoder, head = nnx.merge(graphdef, params)
        logits = head(encoder(ids, jnp.ones(ids.shape, bool)))[:, 1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 3]).mean()

    def step(carry, key):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_of)(params, jax.random.randint(key, (128, 5), 0, 8))
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
            updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    keys = jax.random.split(jax.random.key(2), 150)
    _, losses = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))((params, optimizer.init(params)))
    assert losses[0] > 1.8
    assert losses[-10:].mean() < 0.1


@pytest.mark.parametrize("scale", tiers.breadth([3000.0, 1.0, 1e5]))
def test_float16_is_that_of_transformers_and_never_overflows(tmp_path, scale):
    """Loaded from one folder by both, where the feed-forward's sums are up to 4e5, beyond float16's 65504: 2e-2 on
    activations of order one (float16 keeps 11 bits, over three layers)."""
    config = CONFIGS["as_t5"]
    model = reference(config, seed=3)
    with torch.no_grad():
        for block in model.encoder.block:
            block.layer[1].DenseReluDense.wo.weight.mul_(scale)
    model.save_pretrained(tmp_path)
    ids, mask = batch(config, length=64, real=[64, 9], seed=1)
    theirs = UMT5EncoderModel.from_pretrained(tmp_path, dtype=torch.float16).eval()
    assert theirs.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    with torch.no_grad():
        want = theirs(torch.from_numpy(ids).long(), torch.from_numpy(mask)).last_hidden_state.float().numpy()
    encoder = load_text_encoder(tmp_path, dtype=jnp.float16)
    assert encoder.block.ffn.wo.kernel[...].dtype == jnp.float32
    assert encoder.block.ffn.wi_0.kernel[...].dtype == jnp.float16
    made = encoder(ids, mask)
    assert made.dtype == jnp.float16
    made = np.asarray(made.astype(jnp.float32))
    assert np.isfinite(made).all()
    np.testing.assert_allclose(made[mask], want[mask], atol=2e-2)
    exact = np.asarray(load_text_encoder(tmp_path)(ids, mask))
    np.testing.assert_allclose(made[mask], exact[mask], atol=2e-2)

"""A VAE learns, and brings the statistics of its latents."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from shared.training import random_module

from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.models.checkpoints import load_vae, save_vae
from rehyat_jax.models.wan.config import VAEConfig
from rehyat_jax.models.wan.vae import WanVAE
from train.data.clips import Bucket, round_key
from train.engine.optimizer import OptimizerConfig
from train.stages.vae import VAETraining


@pytest.mark.full
@pytest.mark.usefixtures("compiled_for_speed")
def test_the_vae_learns_and_brings_its_statistics(tmp_path):
    """One compilation of a VAE's backward pass, at the smallest sizes that have every kind of layer."""
    config = VAEConfig(
        base_dim=4,
        z_dim=4,
        dim_mult=(1, 1),
        temperal_downsample=(True,),
        num_res_blocks=1,
        latents_mean=(0.0,) * 4,
        latents_std=(1.0,) * 4,
    )
    training = VAETraining(
        out=tmp_path,
        model=config,
        buckets=(Bucket(kind="plain", frames=3, batch=2),) * 2,
        steps=64,
        steps_per_round=16,
        statistics_clips=4,
        dtype="float32",
        checkpoint_seconds=0.0,
        optimizer=OptimizerConfig(learning_rate=2e-2, warmup_steps=4, weight_decay=0.0),
    )
    training.run()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "train-vae" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4
    assert losses[-1] < 0.75 * losses[0]
    vae = load_vae(training.result)
    assert dataclasses.replace(vae.config, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4) == config
    assert vae.config.latents_mean != (0.0,) * 4
    bucket = training.buckets[0]
    moments = jax.jit(lambda key: vae.encode_moments(bucket.render(bucket.sample(key, bucket.batch))))
    # The clips that gave the statistics; the weights were rounded to bfloat16 since. Of the posterior's samples:
    seen = [moments(round_key(training.seed + 1, index)) for index in range(2)]
    mean, variance = (np.concatenate(x) for x in ([m.mean for m in seen], [np.exp(m.logvar) for m in seen]))
    centre = mean.mean(axis=(0, 1, 2, 3))
    np.testing.assert_allclose(vae.config.latents_mean, centre, atol=0.05)
    spread = np.sqrt((np.square(mean - centre) + variance).mean(axis=(0, 1, 2, 3)))
    np.testing.assert_allclose(vae.config.latents_std, spread, rtol=0.05)
    with pytest.raises(RehyatError, match="already"):
        training.run()


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A random VAE of one downsampling in time and place, saved."""
    config = VAEConfig(
        base_dim=4, z_dim=4, dim_mult=(1, 1), temperal_downsample=(True,), num_res_blocks=1,
        latents_mean=(0.5,) * 4, latents_std=(2.0,) * 4,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("source") / "vae"
    save_vae(random_module(lambda: WanVAE(config, rngs=nnx.Rngs(0)), 3), folder)
    return folder


@nnx.jit
def decoded(vae: WanVAE, latents: jax.Array) -> jax.Array:
    return vae.decode(latents)


def decoder_training(vae, out, width):
    model = dataclasses.replace(load_vae(vae).config, decoder_base_dim=width, latents_mean=(0.0,) * 4)
    return VAETraining(
        out=out, encoder=vae, model=model, buckets=(Bucket(kind="plain", frames=3, batch=2),), steps=32,
        steps_per_round=16, dtype="float32", checkpoint_seconds=0.0,
        optimizer=OptimizerConfig(learning_rate=2e-2, warmup_steps=4),
    )  # fmt: skip


@pytest.mark.full
@pytest.mark.usefixtures("compiled_for_speed")
def test_a_decoder_alone_learns_and_the_latents_stay(vae, tmp_path):
    """A narrower one, from its own start: it gets nearer to the videos, and the encoder is what it was, bit for bit."""
    training = decoder_training(vae, tmp_path, 2)
    training.run()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "train-vae" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    before, after = load_vae(vae), load_vae(training.result)
    assert after.config == dataclasses.replace(before.config, decoder_base_dim=2)
    video = training.buckets[0].draw(jax.random.key(0))
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), nnx.state(before))
    nnx.update(before, rounded)
    np.testing.assert_array_equal(after.encode(video), before.encode(video))


def test_a_decoder_of_the_same_width_goes_on_from_the_one_there(vae, tmp_path):
    before, half = load_vae(vae), decoder_training(vae, tmp_path, 4).stage().networks["decoder"].make()
    video = jax.random.normal(jax.random.key(0), (1, 2, 4, 4, 4))
    np.testing.assert_array_equal(decoded(half.put_into(load_vae(vae)), video), decoded(before, video))
    halved = (
        dataclasses.replace(decoder_training(vae, tmp_path, 4), dtype="bfloat16").stage().networks["decoder"].make()
    )
    assert jax.eval_shape(halved.put_into(load_vae(vae)).decode, video).dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(nnx.state(halved))} == {jnp.dtype(jnp.float32)}


def test_a_decoder_for_other_latents_is_refused(vae, tmp_path):
    training = decoder_training(vae, tmp_path, 2)
    other = dataclasses.replace(training, model=dataclasses.replace(training.model, num_res_blocks=2))
    with pytest.raises(ConfigError, match="may differ by its decoder_base_dim alone"):
        other.run()
    assert not other.result.exists()

"""A VAE learns, and brings the statistics of its latents."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from rehyat_jax.errors import RehyatError
from rehyat_jax.models.checkpoints import load_vae
from rehyat_jax.models.wan.config import VAEConfig
from train.data.clips import Bucket, round_key
from train.engine.optimizer import OptimizerConfig
from train.stages.vae import VAETraining

pytestmark = pytest.mark.usefixtures("compiled_for_speed")


@pytest.mark.full
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

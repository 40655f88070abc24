"""Training through the state: a tiny student learns by teacher forcing and by consistency, and what it writes streams
in few steps by itself."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared.tiers import tier
from shared.training import finetuning, log_of, write_teacher

from rehyat_jax import TextToVideo
from rehyat_jax.errors import ConfigError
from rehyat_jax.mixers.config import HybridConfig
from train.cli.config_files import load_config
from train.data.clips import Bucket
from train.data.pools import Pool
from train.engine.optimizer import OptimizerConfig
from train.stages.forced import ForcedTraining, Past

HYBRID = HybridConfig(chunk_frames=2, overlap_frames=1, length_norm=True)


def training(model: Path, out: Path, **options) -> ForcedTraining:
    """Two and a half chunks a clip."""
    return ForcedTraining(
        **{
            "out": out,
            "source": model,
            "hybrid": HYBRID,
            "aim": "flow",
            "buckets": (Bucket(kind="plain", frames=9, batch=4),),
            "steps": 24,
            "steps_per_round": 8,
            "dtype": "float32",
            "checkpoint_seconds": 0.0,  # each round is logged
            "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=4, ema_decay=0.5),
        }
        | options
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def forced(teacher, tmp_path_factory) -> ForcedTraining:
    run = training(teacher, tmp_path_factory.mktemp("forced") / "student")
    run.run()
    return run


@pytest.mark.full
def test_teacher_forcing_learns_and_its_student_commits_finished_chunks(forced) -> None:
    log = log_of(forced)
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    pipe = TextToVideo.from_pretrained(forced.out)
    assert (pipe.defaults.remember, pipe.defaults.num_inference_steps) == (0.0, 2)
    assert next(pipe.stream("a lemon moving down slowly on a blue background")).shape == (3, 32, 32, 3)


@pytest.mark.wider
def test_consistency_learns_and_its_student_needs_no_option(request, teacher, tmp_path) -> None:
    """From a student that has learned by teacher forcing; in `make test` from a teacher, converted."""
    run = training(
        request.getfixturevalue("forced").out if tier in ("rest", "all") else teacher,
        tmp_path / "student",
        aim="consistency",
        guidance_scale=2.0,
        num_inference_steps=3,
        steps=24,
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=4, ema_decay=0.5),
    )
    run.run()
    log = log_of(run)
    assert np.isfinite([entry["loss"] for entry in log]).all()
    pipe = TextToVideo.from_pretrained(run.out)
    settings = pipe.settings()
    assert (settings.num_inference_steps, settings.guidance_scale, settings.remember) == (3, 1.0, 0.0)
    assert type(settings.solver).__name__ == "Renoise"
    stream = pipe.stream("a lemon moving down slowly on a blue background", seed=3)
    assert [next(stream).shape for _ in range(2)] == [(3, 32, 32, 3), (4, 32, 32, 3)]


def test_every_chunk_has_a_level_and_is_given_the_clip(teacher, tmp_path) -> None:
    config = training(teacher, tmp_path / "none", aim="consistency", past=Past(share=0.5, noise=0.1), grid_levels=8)
    latents = jax.random.normal(jax.random.key(0), (16, 5, 2, 2, 4))
    pool, text = Pool(latents, jnp.zeros((16, 3, 7))), jnp.ones((1, 3, 7))
    batch = jax.jit(lambda key: config.batch(pool, text, key))(jax.random.key(1))
    for levels in (batch.sigma, batch.past_sigma):
        np.testing.assert_array_equal(levels[:, 0], levels[:, 1])
        np.testing.assert_array_equal(levels[:, 2], levels[:, 3])
    assert batch.lower is not None
    assert (batch.lower < batch.sigma).all()
    assert float(batch.sigma.max()) == 1
    assert float(batch.past_sigma.max()) <= 0.1
    clean = batch.past_sigma == 0
    assert 0.2 < float(clean.mean()) < 0.8
    np.testing.assert_array_equal(batch.past[clean], latents[clean])
    np.testing.assert_allclose(
        batch.noisy, latents + batch.sigma[:, :, None, None, None] * batch.velocity, rtol=1e-5, atol=1e-5
    )


def test_shipped_configurations_are_of_this_kind() -> None:
    for name in ("sprites_forced", "sprites_consistency", "wan_1_3b_consistency"):
        assert isinstance(load_config(name, kinds=(ForcedTraining,)).config, ForcedTraining)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"hybrid": None}, "say by hybrid"),
        ({"stop": -1}, "stop must be 0 or more"),
        ({"guidance_scale": 0.5}, "guidance_scale must be 1 or more"),
        ({"unroll": True}, "leave unroll out"),
        ({"remember": "steps"}, "remember is a level"),
    ],
)
def test_what_cannot_be_is_a_sentence(teacher, tmp_path, options, sentence) -> None:
    with pytest.raises(ConfigError, match=sentence):
        training(teacher, tmp_path / "none", **options)


def test_a_past_of_noise_is_none() -> None:
    with pytest.raises(ConfigError, match="noise from 0 to below 1"):
        Past(noise=1.0)


def test_a_softmax_teacher_has_no_place_here(teacher, tmp_path) -> None:
    ordinary = finetuning(teacher, tmp_path / "none")
    fields = {field.name: getattr(ordinary, field.name) for field in dataclasses.fields(ordinary)}
    with pytest.raises(ConfigError, match="leave them out"):
        ForcedTraining(**fields | {"remember": 0.0})

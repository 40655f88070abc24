"""Clips of training: buckets, their columns and captions, and runs that are impossible."""

import dataclasses
import math
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rehyat_jax.errors import ConfigError
from rehyat_jax.models.umt5.config import TextEncoderConfig
from rehyat_jax.models.umt5.encoder import UMT5Encoder
from rehyat_jax.sprites.world import NAMES
from rehyat_jax.text.tokenizer import Tokenizer, embed_prompts
from train.data.clips import Bucket, check_rounds, choose
from train.data.pools import Captions
from train.data.tokenizer import build_sprite_tokenizer
from train.stages.diffusion import DiffusionTraining
from train.stages.flow import embed
from train.stages.vae import VAETraining


def test_buckets_are_drawn_by_their_shares():
    buckets = tuple(Bucket(kind="plain", frames=5, batch=1, share=share) for share in (5.0, 3.0, 2.0, 0.0))
    drawn = [choose(buckets, 7, index) for index in range(4000)]
    assert drawn[:100] == [choose(buckets, 7, index) for index in range(100)]
    assert drawn[:100] != [choose(buckets, 8, index) for index in range(100)]
    counts = Counter(drawn)
    for bucket, share in enumerate((0.5, 0.3, 0.2, 0.0)):
        # Five standard deviations of a binomial.
        assert abs(counts[bucket] / 4000 - share) <= 5 * math.sqrt(share * (1 - share) / 4000)


@pytest.mark.parametrize("seed", range(5))
def test_short_runs_meet_every_bucket_by_its_share(seed):
    """An interval met by multiples of the golden section: n·share to within 2 for n up to 100 (Kesten's bound is
    logarithmic in n)."""
    shares = (0.3, 0.35, 0.2, 0.15)
    buckets = tuple(Bucket(kind="plain", frames=5, batch=1, share=share) for share in shares)
    drawn = [choose(buckets, seed, index) for index in range(300)]
    for begin in range(0, 200, 7):
        for length in (10, 18, 40, 100):
            counts = Counter(drawn[begin : begin + length])
            assert all(abs(counts[number] - share * length) <= 2 for number, share in enumerate(shares))


def test_a_bucket_is_drawn_during_its_part_of_the_run():
    first, always = Bucket(kind="plain", frames=5, batch=1, during=(0.0, 0.4)), Bucket(kind="plain", frames=9, batch=1)
    drawn = [choose((first, always), 7, index, progress=index / 1000) for index in range(1000)]
    assert 100 < drawn[:400].count(0) < 300
    assert not drawn[400:].count(0)
    with pytest.raises(ConfigError, match="40% through"):
        check_rounds((first,), steps=10, steps_per_round=1)


@pytest.mark.parametrize(
    "change",
    [{"frames": 0}, {"batch": 0}, {"share": -1.0}, {"share": math.nan}, {"columns": 65}, {"during": (0.5, 0.5)}],
)
def test_impossible_buckets_are_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        Bucket(**{"kind": "plain", "frames": 5, "batch": 1} | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "steps"),
        ({"steps_per_round": 0}, "steps_per_round"),
        ({"buckets": ()}, "share"),
        ({"caption_tokens": 513}, "caption_tokens"),
        ({"caption_dropout": 1.5}, "caption_dropout"),
        ({"shift": 0.0}, "shift"),
        ({"reuse": 0}, "reuse"),
        ({"reuse": 3}, "multiple"),
        ({"text_encoder": TextEncoderConfig(d_model=64)}, "64"),
    ],
)
def test_impossible_runs_are_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        DiffusionTraining(**{"out": Path("unused")} | change)


def test_a_vae_is_trained_on_lengths_that_it_can_encode():
    with pytest.raises(ConfigError, match="18 frames are not 4k"):
        VAETraining(out=Path("unused"), buckets=(Bucket(kind="plain", frames=18, batch=1),))
    with pytest.raises(ConfigError, match="62 columns are not a multiple of 4"):
        VAETraining(out=Path("unused"), buckets=(Bucket(kind="occlusion", frames=17, batch=1, columns=62),))
    with pytest.raises(ConfigError, match="of one size"):
        VAETraining(
            out=Path("unused"), buckets=tuple(Bucket(kind=k, frames=5, batch=1) for k in ("plain", "occlusion"))
        )


def test_columns_are_cut_from_the_clip_at_a_place_of_its_own():
    whole = Bucket(kind="occlusion", frames=3, batch=8, longest_wait=4)
    key = jax.random.key(3)
    videos, cut = (
        np.asarray(bucket.draw(key, latest_start=40)) for bucket in (whole, dataclasses.replace(whole, columns=64))
    )
    assert cut.shape == (8, 3, 64, 64, 3)
    places = [
        [x for x in range(33) if np.array_equal(video[:, :, x : x + 64], part)]
        for video, part in zip(videos, cut, strict=True)
    ]
    assert all(places)
    assert len({x[0] for x in places}) > 3


def test_text_in_training_is_text_in_sampling(tmp_path):
    """Captions embedded with 48 tokens in training are, to float32's rounding, those `embed_prompts` makes of 512, and
    its others are zeros."""
    build_sprite_tokenizer(tmp_path, list(NAMES))
    tokenizer = Tokenizer.from_folder(tmp_path)
    config = TextEncoderConfig(vocab_size=tokenizer.vocab_size, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    encoder = UMT5Encoder(config, rngs=nnx.Rngs(1))
    prompts = ["a lemon moving down slowly and a koala moving up and left quickly on a red background", "a cat", ""]
    tokens = tokenizer.encode(prompts, max_length=48)
    ours = embed(encoder, Captions(jnp.asarray(tokens.ids), jnp.asarray(tokens.mask)))
    theirs = np.asarray(embed_prompts(encoder, tokenizer, prompts))
    assert (ours.shape, theirs.shape) == ((3, 48, 16), (3, 512, 16))
    assert np.abs(theirs).max() > 0.1
    np.testing.assert_allclose(ours, theirs[:, :48], atol=1e-5)
    assert not theirs[:, 48:].any()

"""Training: the optimiser against optax, the loop against itself uninterrupted, checkpoints against damage."""

import dataclasses
import json
import math
import os
import signal
import threading
from collections import Counter
from io import StringIO
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from rich.console import Console

from rehyat_jax.errors import CheckpointError, ConfigError, RehyatError
from rehyat_jax.models.checkpoints import load_vae
from rehyat_jax.models.umt5.config import TextEncoderConfig
from rehyat_jax.models.umt5.encoder import UMT5Encoder
from rehyat_jax.models.wan.config import VAEConfig
from rehyat_jax.runtime.variables import GateParam, MixerParam, kernel, table
from rehyat_jax.sprites.world import NAMES
from rehyat_jax.text.tokenizer import Tokenizer, embed_prompts
from train.data.clips import Bucket, check_rounds, choose, round_key
from train.data.pools import Captions
from train.data.tokenizer import build_sprite_tokenizer
from train.engine.checkpoint import Checkpoints
from train.engine.loop import Stopped, run
from train.engine.optimizer import OptimizerConfig
from train.stages.diffusion import DiffusionTraining
from train.stages.flow import embed
from train.stages.vae import VAETraining

# Optimiser ----------------------------------------------------------------------------------------------------------


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


def _problem() -> dict:
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "layer": {
            "kernel": nnx.Param(jax.random.normal(keys[0], (5, 3)), **kernel(None, None)),
            "bias": nnx.Param(jax.random.normal(keys[1], (3,))),
        },
        "table": {"embedding": nnx.Param(jax.random.normal(keys[2], (4, 2)), **table())},
    }


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
    state, params = config.init(_problem()), _problem()
    their_state, average = theirs.init(params), _problem()
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
    config, params = OptimizerConfig(method=method), _problem()
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


# Clips --------------------------------------------------------------------------------------------------------------


def test_buckets_are_drawn_by_their_shares():
    buckets = tuple(Bucket(kind="plain", frames=5, batch=1, share=share) for share in (5.0, 3.0, 2.0, 0.0))
    drawn = [choose(buckets, 7, index) for index in range(4000)]
    assert drawn[:100] == [choose(buckets, 7, index) for index in range(100)]
    assert drawn[:100] != [choose(buckets, 8, index) for index in range(100)]
    counts = Counter(drawn)
    for bucket, share in enumerate((0.5, 0.3, 0.2, 0.0)):
        # Five standard deviations of a binomial.
        assert abs(counts[bucket] / 4000 - share) <= 5 * math.sqrt(share * (1 - share) / 4000)


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


# Checkpoints --------------------------------------------------------------------------------------------------------


def _states():
    first = OptimizerConfig().init(_problem())
    return first, first._replace(step=first.step + 1, params=jax.tree.map(lambda p: 2.0 * p, first.params))


def _damage(folder: Path, how: str) -> None:
    data = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    if how == "missing":
        data.unlink()
    elif how == "truncated":
        data.write_bytes(content[: len(content) // 2])
    elif how == "flipped bit":
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif how == "not sealed":
        (folder / "seal.json").unlink()
    else:
        (folder / "seal.json").write_text('{"files": ')


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped bit", "not sealed", "torn seal"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, how):
    first, second = _states()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(8, first)
        checkpoints.save(16, second)
    _damage(tmp_path / "16", how)
    said: list[str] = []
    with Checkpoints(tmp_path) as checkpoints:
        chex.assert_trees_all_equal(checkpoints.restore(second, report=said.append), first)
        assert len(said) == 1
        assert str(tmp_path / "16") in said[0]
        checkpoints.save(16, second)  # its step is free again
    with Checkpoints(tmp_path) as checkpoints:
        chex.assert_trees_all_equal(checkpoints.restore(first, report=said.append), second)
    assert len(said) == 1


def test_where_no_checkpoint_is_whole_there_is_none(tmp_path):
    first, _ = _states()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(first) is None
        checkpoints.save(8, first)
    _damage(tmp_path / "8", "truncated")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(first, report=lambda _: None) is None


def test_the_newest_two_are_kept(tmp_path):
    first, _ = _states()
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, first)
    assert sorted(os.listdir(tmp_path)) == ["2", "3"]


def test_checkpoints_of_another_model_are_named_and_kept(tmp_path):
    first, _ = _states()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(8, first)
    wider = OptimizerConfig().init(_problem() | {"more": jnp.zeros(3)})
    other = OptimizerConfig().init(_problem() | {"table": {"embedding": nnx.Param(jnp.zeros((4, 2), jnp.bfloat16))}})
    for template, words in [(wider, r"more.*missing there"), (other, r"float32\[4,2\] there and bfloat16\[4,2\] here")]:
        with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=words):
            checkpoints.restore(template)
    assert (tmp_path / "8").is_dir()


# The loop -----------------------------------------------------------------------------------------------------------

_TOY = OptimizerConfig(learning_rate=0.05)


@jax.jit
def _toy_step(state, key):
    gradients = jax.tree.map(lambda p: p + jax.random.normal(key, p.shape), state.params)
    return _TOY.apply(state, gradients, jnp.float32(0.01)), optax.tree.norm(state.params)


def _toy_run(folder: Path, *, steps: int, hook=lambda step: None, checkpoint_seconds: float = 0.0):
    """Rounds of two steps, whose noise depends on the step alone."""
    console = Console(file=StringIO(), width=200)

    def advance(state, step):
        hook(step)
        for i in range(2):
            state, norm = _toy_step(state, jax.random.fold_in(jax.random.key(0), step + i))
        return state, {"norm": norm}

    state = run(
        _TOY.init(_problem()),
        advance,
        steps=steps,
        steps_per_advance=2,
        folder=folder,
        checkpoint_seconds=checkpoint_seconds,
        console=console,
    )
    return state, console.file.getvalue()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_call_continues(tmp_path, number):
    whole, _ = _toy_run(tmp_path / "whole", steps=12)

    def interrupt(step: int) -> None:
        if step == 4:
            os.kill(os.getpid(), number)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped) as stop:
        _toy_run(tmp_path / "cut", steps=12, hook=interrupt, checkpoint_seconds=60.0)
    assert (stop.value.signal_number, stop.value.step) == (number, 6)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    resumed, said = _toy_run(tmp_path / "cut", steps=12)
    assert "resumed from step 6" in said
    chex.assert_trees_all_equal(resumed, whole)
    entries = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["from_step"]) for entry in entries] == [(6, 0), (8, 6), (10, 6), (12, 6)]
    # A run that is done is not done again.
    again, _ = _toy_run(tmp_path / "cut", steps=12, hook=lambda step: pytest.fail("a step was made"))
    chex.assert_trees_all_equal(again, whole)


def test_a_second_signal_does_not_wait(tmp_path):
    def insist(_: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        _toy_run(tmp_path, steps=12, hook=insist)


def test_the_loop_runs_outside_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(_toy_run(tmp_path, steps=4)))
    thread.start()
    thread.join()
    assert int(results[0][0].step) == 4


def test_a_run_that_diverges_stops_and_saves_nothing_of_it(tmp_path):
    calls = []

    def advance(state, step):
        calls.append(step)
        return state._replace(step=state.step + 1), {"loss": jnp.array([1.0, jnp.nan if step == 2 else 1.0])}

    with pytest.raises(RehyatError, match=r"not finite at step 3.*learning rate"):
        run(_TOY.init(_problem()), advance, steps=9, steps_per_advance=1, folder=tmp_path, checkpoint_seconds=0.0)
    assert calls == [0, 1, 2]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]


def test_on_a_terminal_there_is_a_bar(tmp_path):
    console = Console(file=StringIO(), force_terminal=True, width=120)
    run(
        _TOY.init(_problem()),
        lambda state, step: (state, {"loss": jnp.ones(2)}),
        steps=2,
        steps_per_advance=1,
        folder=tmp_path,
        log_seconds=0.0,
        console=console,
    )
    assert "━" in console.file.getvalue()
    assert "step 2/2  loss 1" in console.file.getvalue()


# The networks -------------------------------------------------------------------------------------------------------


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

"""Models that take images, and those of two experts, are finetuned and converted; what is not trained is said."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from shared.devices import largest_difference, on_devices
from shared.families import CLIP, tiny_a14b, tiny_i2v
from shared.training import distillation, finetuning, forcing, log_of, random_module
from shared.videos import PROMPT, image_of

from rehyat_jax import HybridConfig, TextToVideo
from rehyat_jax.errors import ConfigError
from rehyat_jax.models.checkpoints import load_vae
from rehyat_jax.models.clip.config import ImageEncoderConfig, Preparation
from rehyat_jax.models.clip.encoder import ImageEncoder
from rehyat_jax.models.clip.features import ImageFeatures
from rehyat_jax.models.networks import open_component
from rehyat_jax.models.wan.config import VAEConfig, WanConfig
from rehyat_jax.models.wan.forced import forced
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.runtime.devices import Devices
from rehyat_jax.runtime.mesh_config import MeshConfig
from rehyat_jax.sampling.codec import Codec
from rehyat_jax.text.prompt_encoder import TEXT_LENGTH
from train.data.clips import Bucket
from train.data.pools import Pool
from train.data.rollouts import Rollouts, rows_back
from train.data.sources import Source
from train.engine.stage import Models
from train.stages.aims import guess
from train.stages.forced import ForcedTraining
from train.stages.from_image import FromImage, prepared_frames, shown, takes_image

HYBRID = HybridConfig(chunk_frames=1, overlap_frames=1)
SHORT = {
    "hybrid": HYBRID,
    "buckets": (Bucket(kind="plain", frames=5, batch=2),),
    "steps": 2,
    "steps_per_round": 2,
    "reuse": 1,
    "teacher_frames": 5,
    "shift": 5.0,
}
#: Two chunks of two latent frames.
FORCED = Bucket(kind="plain", frames=13, batch=2)
SIZE = {"height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 1.0, "seed": 3}


@pytest.fixture(scope="module")
def from_image(tmp_path_factory):
    folder = tmp_path_factory.mktemp("i2v")
    tiny_i2v(folder, **CLIP)
    return folder


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a14b")
    tiny_a14b(folder)
    return folder


def test_a_clip_is_shown_its_own_first_frame(from_image):
    """As a call's condition of that frame: by sampling's codec, and by transformers' preparation, whose eight bits
    leave half a level of 255 before the division by 0.26."""
    vae, features = load_vae(from_image), ImageFeatures(from_image)
    model = open_component(from_image, "transformer").config
    assert takes_image(model, vae.config)
    assert not takes_image(WanConfig.t2v_14b(), vae.config)
    images = FromImage.of(model, vae.config, features)
    latents = np.random.default_rng(0).standard_normal((2, 3, 4, 6, 16), np.float32)
    made = {role: nnx.split(each.make()) for role, each in images.networks(lambda: vae, features).items()}
    models = {role: graph for role, (graph, _) in made.items()}, {role: state for role, (_, state) in made.items()}
    seen = jax.jit(lambda frozen, x: images.condition(Models(models[0], frozen=frozen), x))(models[1], latents)
    codec = Codec(vae)
    first = np.asarray(jax.jit(lambda x: vae.decode(vae.denormalize(x)))(latents[:, :1]), np.float32)
    clip = np.full((2, 9, 32, 48, 3), 127.5, np.float32)
    clip[:, 0] = (first[:, 0] + 1) * 127.5
    np.testing.assert_allclose(seen.channels[..., 4:], codec.encode(clip, frames_per_step=1), atol=1e-4, rtol=0)
    np.testing.assert_array_equal(seen.channels[:, 0, ..., :4], 1)
    np.testing.assert_array_equal(seen.channels[:, 1:, ..., :4], 0)
    assert seen.image.shape == (2, 5, 20)
    picture = image_of(64, 96)
    ours = prepared_frames(jnp.asarray(picture[None], jnp.float32) / 255, features.preparation)[0]
    assert np.abs(ours - features.preparation(picture)).max() < 1.5 / 255 / 0.26
    assert ours.std() > 0.3


def test_an_expert_learns_at_its_own_noise_levels(experts, tmp_path):
    """Of a thousand levels of shift 5 none is the other's, and the whole of its own is met."""
    pool, empty = Pool(jnp.zeros((1000, 1, 1, 1, 1)), jnp.zeros((1000, 1, 1))), jnp.zeros((1, 1, 1))
    found = {}
    for expert in ("high", "low"):
        training = finetuning(experts, tmp_path / "out", expert=expert, teacher=None, teacher_weight=0.0, **SHORT)
        times = training.at_its_levels().batch(pool, empty, jax.random.key(0)).timesteps
        found[expert] = float(times.min()), float(times.max())
    assert found["high"][0] == pytest.approx(875, abs=1.5)
    assert found["high"][1] == pytest.approx(1000, abs=1.5)
    assert found["low"][0] == pytest.approx(0, abs=10)
    assert found["low"][1] == pytest.approx(875, abs=1.5)
    assert found["low"][1] <= 875 <= found["high"][0]


def test_what_is_not_trained_is_said(experts, from_image, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="has two experts by noise level, of which rehyat distill and finetune"):
        _ = distillation(experts, out).stage()
    with pytest.raises(ConfigError, match="has one transformer: leave expert out"):
        _ = distillation(from_image, out, expert="high").stage()
    with pytest.raises(ConfigError, match="has two experts by noise level"):
        _ = finetuning(experts, out).stage().source
    with pytest.raises(ConfigError, match="has one transformer: leave expert out"):
        _ = finetuning(from_image, out, expert="low").stage()
    with pytest.raises(ConfigError, match="an expert has noise levels of its own"):
        _ = finetuning(experts, out, expert="low", levels_of=(0.5, 1.0)).stage()
    with pytest.raises(ConfigError, match="the clips of 'plain' captions are 64x64, and the source says 32x32"):
        _ = distillation(from_image, out).stage().devices
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    alone = {"sources": (Source(prompts=str(tmp_path / "prompts.txt"), frames=5, batch=4),)}
    with pytest.raises(ConfigError, match="has prompts and no clips, of which this teacher needs their first frames"):
        _ = distillation(from_image, out, **alone).stage().devices
    with pytest.raises(ConfigError, match="needs what the lower expert begins with: give a prepared folder"):
        _ = distillation(experts, out, expert="low", **alone).stage().devices
    with pytest.raises(ConfigError, match="begin at one noise level: give one of the shifts"):
        _ = distillation(experts, out, expert="low", shifts=(3.0, 5.0)).stage().devices
    with pytest.raises(ConfigError, match="of 1 steps none is at noise levels from 0 to"):
        _ = distillation(experts, out, expert="low", num_inference_steps=1).stage().devices
    switching = (Rollouts(clips=FORCED, windows=2, switches=0.5),)
    with pytest.raises(ConfigError, match="makes videos from an image, which a row keeps: leave switches out"):
        _ = forcing(from_image, out, buckets=switching).stage().images
    with pytest.raises(ConfigError, match="latents, text or images are of other widths"):
        _ = forcing(from_image, out, teacher=experts, buckets=(Rollouts(clips=FORCED),)).stage()._teacher()


def _on_a_mesh():
    """What eight clips are shown on four devices: how far from one device's, and a device's operations as a share."""
    config = VAEConfig(base_dim=4, dim_mult=(1, 1), temperal_downsample=(True,), num_res_blocks=1)
    clip = ImageEncoderConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28
    )
    images = FromImage(vae=config, prepare=Preparation.of(clip))
    modules = {
        "vae": random_module(lambda: WanVAE(config, rngs=nnx.Rngs(0)), 0),
        "image": ImageEncoder(clip, rngs=nnx.Rngs(1)),
    }
    graphs, states = ({role: nnx.split(each)[i] for role, each in modules.items()} for i in (0, 1))
    latents = jnp.asarray(np.random.default_rng(0).standard_normal((8, 3, 4, 4, 16), np.float32))

    def shown(frozen, latents):
        condition = images.condition(Models(graphs, frozen=frozen), latents)
        return condition.channels, condition.image

    def on(devices):
        arrays = devices.parameters(states), devices.batch(latents, latents)
        program = devices.lower(shown, *arrays).compile()
        turns = re.findall(r'"known_trip_count":\{"n":"(\d+)"\}', program.as_text())
        found = jax.tree.map(np.asarray, program(*arrays))
        return found, program.cost_analysis()["flops"] * math.prod(map(int, turns))

    (one, whole), (four, own) = on(Devices(None)), on(Devices(MeshConfig(data=2, fsdp=2).make(jax.devices()[:4])))
    return largest_difference(one, four), own / whole


@pytest.mark.full
def test_each_device_shows_its_own_clips():
    apart, share = on_devices("test_images_and_experts", "_on_a_mesh", devices=4)
    assert apart <= 1e-5
    assert share < 0.3


@pytest.mark.full
def test_an_image_to_video_model_is_converted_and_streams(from_image, tmp_path):
    training = finetuning(from_image, tmp_path / "student", teacher=from_image, **SHORT)
    training.run()
    assert all(np.isfinite(entry["loss"]) and np.isfinite(entry["teacher"]) for entry in log_of(training))
    pipe = TextToVideo.from_pretrained(training.out, cache_dir=tmp_path / "cache")
    assert pipe.transformer.hybrid == HYBRID
    stream = pipe.open_stream(PROMPT, image=image_of(64, 64), **SIZE)
    blocks = [next(stream), next(stream)]
    stream.save(tmp_path / "kept")
    np.testing.assert_array_equal(next(pipe.resume_stream(tmp_path / "kept")), next(stream))
    other = pipe.open_stream(PROMPT, image=image_of(64, 64, seed=2), **SIZE)
    assert (next(other) != blocks[0]).mean() > 0.2


@pytest.mark.full
def test_two_experts_are_converted_one_after_the_other_and_stream(experts, tmp_path):
    source, how = experts, {"teacher": None, "teacher_weight": 0.0}
    for expert in ("high", "low"):
        training = finetuning(source, tmp_path / expert, expert=expert, **SHORT | how)
        training.run()
        assert all(np.isfinite(entry["loss"]) for entry in log_of(training))
        source = training.out
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "low" / weights).read_bytes() == (tmp_path / "high" / weights).read_bytes()
    assert TextToVideo.from_pretrained(tmp_path / "high").why_not_stream() is not None
    pipe = TextToVideo.from_pretrained(source, cache_dir=tmp_path / "cache")
    stream = pipe.open_stream(PROMPT, **SIZE)
    next(stream)
    stream.save(tmp_path / "kept")
    np.testing.assert_array_equal(next(pipe.resume_stream(tmp_path / "kept")), next(stream))


def _errors(training):
    """Of held-out clips' trajectories, before the first step and at the end: a number a block."""
    lines = [json.loads(line) for line in (training.train_folder / "blocks.jsonl").read_text().splitlines()]
    return np.asarray(lines[0]["error"]), np.asarray(lines[-1]["error"])


DISTILLING = {"sources": (Source(frames=9, batch=2),), "steps": 96, "measure_rounds": 24, "held_out": 2}


@pytest.mark.full
def test_an_image_to_video_model_is_distilled_and_streams(from_image, tmp_path):
    """On its own trajectories, each from the first frame of a clip, with guidance; and on clips with noise."""
    clips = Source(frames=9, batch=2, videos=True)
    training = distillation(
        from_image, tmp_path / "student", **DISTILLING | {"sources": (*DISTILLING["sources"], clips)}
    )
    training.run()
    first, last = _errors(training)
    assert (last < 0.98 * first).all()
    kept = [name for name in ("image_encoder", "image_processor") if (training.out / name).is_dir()]
    assert kept == ["image_encoder", "image_processor"]
    pipe = TextToVideo.from_pretrained(training.out, cache_dir=tmp_path / "cache")
    assert pipe.transformer.hybrid == HYBRID
    stream = pipe.open_stream(PROMPT, image=image_of(64, 64), **SIZE)
    next(stream)
    stream.save(tmp_path / "kept")
    np.testing.assert_array_equal(next(pipe.resume_stream(tmp_path / "kept")), next(stream))


@pytest.mark.full
def test_two_experts_are_distilled_one_after_the_other_and_stream(experts, tmp_path):
    teacher = experts
    for expert in ("high", "low"):
        training = distillation(teacher, tmp_path / expert, expert=expert, **DISTILLING)
        training.run()
        first, last = _errors(training)
        assert (last < 0.98 * first).all()
        teacher = training.out
    assert TextToVideo.from_pretrained(tmp_path / "high").why_not_stream() is not None
    for part in ("config.json", "features.safetensors"):
        own = [folder / "transformer" / "rehyat" / part for folder in (tmp_path / "low", tmp_path / "high")]
        assert own[0].read_bytes() == own[1].read_bytes()
    pipe = TextToVideo.from_pretrained(teacher, cache_dir=tmp_path / "cache")
    stream = pipe.open_stream(PROMPT, **SIZE)
    next(stream)
    stream.save(tmp_path / "kept")
    np.testing.assert_array_equal(next(pipe.resume_stream(tmp_path / "kept")), next(stream))


@pytest.mark.full
def test_own_videos_from_an_image_are_replayed_as_they_were_made(from_image, tmp_path):
    """Of one step a chunk, the guess at the exit is what was made, in a second window too; whoever is shown another
    image makes another. The scores are shown the true clip's first frame, then the window's own."""
    rollouts = Rollouts(clips=FORCED, windows=2)
    training = forcing(from_image, tmp_path / "out", buckets=(rollouts,), num_inference_steps=1)
    stage = training.stage()
    data, modules = stage.data()[0], {role: network.make() for role, network in stage.networks.items()}
    graphs, states = ({role: nnx.split(module)[i] for role, module in modules.items()} for i in (0, 1))

    @jax.jit
    def draw(states, carried, host, frozen):
        models = Models(graphs, frozen=states)
        pool = data.feed.pool(host[0], frozen, models)
        carried, batch = data.draw(models, carried, host, frozen)
        batch = batch(jnp.int32(0))
        student, (rows, _, height, width, _) = models["student"], batch.video.shape
        like = jax.eval_shape(lambda: student.init_state(rows, height, width))
        seen, image = shown(batch.condition, batch.noisy)
        velocity = forced(
            student,
            seen,
            batch.times,
            student.precompute_text_kv(batch.text, TEXT_LENGTH, **image),
            rows_back(batch.state, like, axis=1),
            past=shown(batch.condition, batch.past)[0],
            past_times=batch.past_times,
            first_frame=batch.first_frame[0],
            text_tokens=TEXT_LENGTH,
        ).velocity
        true = stage.images.condition(models, pool.latents)
        own = stage.images.condition(models, batch.video)
        return (
            carried,
            batch,
            guess(batch.noisy, velocity, batch.sigma),
            true,
            own,
            training.scores(models, batch, batch.video),
        )

    carried, (turn, key, _) = data.begin(Devices(None)), data.host(0)
    for window in (0, 1):
        host = turn, key, np.asarray([0, window], np.int32)
        carried, batch, found, true, own, scores = draw(states, carried, host, data.frozen)
        np.testing.assert_allclose(found[:, window:], batch.video[:, window:], atol=1e-4)
        np.testing.assert_allclose(batch.scored.image, (own if window else true).image, atol=1e-5)
        np.testing.assert_allclose(batch.condition.image, true.image, atol=1e-5)
        for row in np.asarray(batch.condition.channels[..., :4]).any((2, 3, 4)):
            assert row.tolist() == [window == 0, False, False, False]
        assert all(np.isfinite(each).all() for each in scores)


@pytest.mark.full
def test_an_image_to_video_student_learns_from_its_own_videos(from_image, tmp_path):
    training = forcing(from_image, tmp_path / "student", buckets=(Rollouts(clips=FORCED, windows=2, given=1),))
    training.run()
    log = log_of(training)
    assert {"critic/loss", "student/loss", "student/gap"} <= log[-1].keys()
    assert np.isfinite([value for entry in log for value in entry.values()]).all()
    pipe = TextToVideo.from_pretrained(training.out, cache_dir=tmp_path / "cache")
    stream = pipe.open_stream(PROMPT, image=image_of(64, 64), height=64, width=64, seed=3)
    assert [len(next(stream)) for _ in range(2)] == [5, 8]


@pytest.mark.full
def test_an_image_to_video_student_learns_through_its_state(from_image, tmp_path):
    training = ForcedTraining(
        out=tmp_path / "student",
        source=from_image,
        **SHORT | {"teacher_frames": 129},
        grid_levels=4,
        guidance_scale=2.0,
        num_inference_steps=2,
        first_chunk_steps=None,
        dtype="float32",
        checkpoint_seconds=0.0,
    )
    training.run()
    assert all(np.isfinite(entry["loss"]) for entry in log_of(training))
    pipe = TextToVideo.from_pretrained(training.out, cache_dir=tmp_path / "cache")
    assert pipe.settings().num_inference_steps == 2
    assert len(next(pipe.open_stream(PROMPT, image=image_of(64, 64), height=64, width=64, seed=3))) == 1


@pytest.mark.full
def test_a_model_between_two_images_is_distilled_and_has_no_streams(tmp_path):
    """It is shown a clip's first and last frame, as a call's condition of these is."""
    folder = tmp_path / "flf2v"
    tiny_i2v(folder, **CLIP, pos_embed_seq_len=10)
    training = distillation(folder, tmp_path / "student", **DISTILLING | {"steps": 4, "measure_rounds": 0})
    stage = training.stage()
    latents = np.random.default_rng(0).standard_normal((1, 3, 8, 8, 16), np.float32)
    seen = stage.shown.condition(stage.shown.arrays, jnp.asarray(latents))
    vae = stage.vae_module
    frames = np.asarray(vae.decode(vae.denormalize(jnp.asarray(latents))), np.float32)
    clip = np.full((1, 9, 64, 64, 3), 127.5, np.float32)
    clip[:, 0], clip[:, -1] = ((frames[:, place] + 1) * 127.5 for place in (0, -1))
    np.testing.assert_allclose(seen.channels[..., 4:], Codec(vae).encode(clip, frames_per_step=1), atol=1e-4, rtol=0)
    np.testing.assert_array_equal(seen.channels[0, :, 0, 0, :4], [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]])
    assert seen.image.shape == (1, 10, 20)
    training.run()
    pipe = TextToVideo.from_pretrained(training.out, cache_dir=tmp_path / "cache")
    images = {"image": image_of(64, 64), "last_image": image_of(64, 64, seed=2)}
    assert pipe(PROMPT, **images, num_frames=9, **SIZE).shape == (9, 64, 64, 3)
    with pytest.raises(ConfigError, match="makes videos between two images: it has no streams to learn from"):
        _ = forcing(folder, tmp_path / "out", buckets=(Rollouts(clips=FORCED),)).stage().images

"""A few-step student's sampling: fresh noise at each step, as by diffusers' stochastic Euler; a folder that says so."""

import json
import shutil
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from shared.checkpoint import save_tiny_checkpoint

from rehyat_jax import HybridConfig, TextToVideo, load_transformer
from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.models.checkpoints import convert, describe, save_transformer
from rehyat_jax.models.folder import DEFAULTS_FILE, read_defaults
from rehyat_jax.runtime.variables import MixerParam
from rehyat_jax.sampling import FlowSchedule, Renoise, UniPC, sampling_steps
from rehyat_jax.sampling.noise import ChunkNoise, video_keys

HYBRID = HybridConfig(chunk_frames=2, overlap_frames=1)
PROMPT = "a lemon"


def test_a_step_is_diffusers_stochastic_step() -> None:
    """Levels of ``FlowMatchEulerDiscreteScheduler``, its own draws of noise; float32 on both sides."""
    shape, count = (2, 3, 4, 5, 16), 4
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0, stochastic_sampling=True)
    scheduler.set_timesteps(count)
    steps = sampling_steps(FlowSchedule(grid="diffusers-euler", shift=5.0), Renoise(), num_steps=count)
    rng = np.random.default_rng(0)
    start, velocities = rng.standard_normal(shape, np.float32), rng.standard_normal((count, *shape), np.float32)
    theirs, ours = torch.from_numpy(start), Renoise().init(jnp.asarray(start))
    for number in range(count):
        torch.manual_seed(number)
        noise = torch.randn(shape).numpy()
        torch.manual_seed(number)
        velocity = torch.from_numpy(velocities[number])
        theirs = scheduler.step(velocity, scheduler.timesteps[number], theirs).prev_sample
        row = jax.tree.map(lambda table, number=number: jnp.asarray(table[number]), steps)
        velocity = jnp.asarray(velocities[number])
        ours = Renoise().step(ours, velocity, coefficients=row.coefficients, noise=jnp.asarray(noise))
        np.testing.assert_allclose(ours.latents, theirs.numpy(), atol=1e-5)


def test_without_noise_it_is_a_sentence() -> None:
    row = Renoise().coefficients(np.asarray([1.0, 0.5, 0.0]))
    row = jax.tree.map(lambda table: jnp.float32(table[0]), row)
    x = jnp.zeros((1, 2))
    with pytest.raises(ConfigError, match="needs fresh noise"):
        Renoise().step(Renoise().init(x), x, coefficients=row)


def test_fresh_noise_is_a_frames_own_and_a_steps_own() -> None:
    keys, size = video_keys(3, count=2), (4, 5, 16)
    whole = ChunkNoise(keys).fresh((6, *size), 2)
    parts = [ChunkNoise(keys, first).fresh((3, *size), jnp.int32(2)) for first in (0, 3)]
    np.testing.assert_array_equal(whole, jnp.concatenate(parts, axis=1))
    others = [
        ChunkNoise(keys).fresh((6, *size), 1),
        ChunkNoise(keys).initial((6, *size)),
        ChunkNoise(keys).context((6, *size)),
    ]
    for other in others:
        # Of 11,520 pairs of independent numbers: a correlation's standard deviation is 0.009.
        assert abs(float(jnp.corrcoef(whole.reshape(-1), other.reshape(-1))[0, 1])) < 0.05


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A few-step student, that says what it is sampled with."""
    folder = tmp_path_factory.mktemp("few")
    save_tiny_checkpoint(folder)
    student = load_transformer(folder, hybrid=HYBRID)
    rng = np.random.default_rng(0)
    state = nnx.state(student, MixerParam)
    nnx.update(student, jax.tree.map(lambda p: jnp.asarray(p + 0.3 * rng.standard_normal(p.shape, np.float32)), state))
    shutil.rmtree(folder / "transformer")
    save_transformer(student, folder / "transformer")
    defaults = {
        "height": 32,
        "width": 48,
        "num_frames": 9,
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
        "remember": 0.0,
        "solver": "Renoise",
        "first_chunk_steps": 3,
    }
    (folder / DEFAULTS_FILE).write_text(json.dumps(defaults), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def pipe(folder, cache) -> TextToVideo:
    return TextToVideo.from_pretrained(folder, cache_dir=cache)


def test_a_folders_defaults_are_enough_and_a_call_is_its_stream(pipe) -> None:
    settings = pipe.settings()
    assert (settings.solver, settings.remember, settings.first_chunk_steps) == (Renoise(), 0.0, 3)
    seen = []
    video = pipe(PROMPT, seed=5, on_step=lambda *what: seen.append(what))
    stream = pipe.stream(PROMPT, seed=5)
    np.testing.assert_array_equal(video, np.concatenate([next(stream), next(stream)])[: len(video)])
    # Two chunks of three latent frames' two: nine frames are three latent frames.
    assert [what for what in seen if what[0] == "denoise"] == [("denoise", done, 2) for done in range(3)]


def test_the_first_chunk_has_its_own_steps(pipe) -> None:
    first = next(pipe.stream(PROMPT, seed=5))
    np.testing.assert_array_equal(first, next(pipe.stream(PROMPT, seed=5, num_inference_steps=3)))
    alike = pipe.stream(PROMPT, seed=5, first_chunk_steps=1)
    assert np.abs(first.astype(int) - next(alike)).max() > 0
    # More steps than the first chunk's are the first chunk's too.
    assert len(pipe.settings(num_inference_steps=20).steps(of_first_chunk=True).timestep) == 20


def test_a_stream_is_kept_and_gone_on_with(pipe, tmp_path) -> None:
    stream = pipe.open_stream(PROMPT, seed=5)
    next(stream)
    stream.save(tmp_path)
    np.testing.assert_array_equal(next(stream), next(pipe.resume_stream(tmp_path)))


def test_a_student_beside_its_teacher_keeps_its_defaults_and_the_teacher_its_own(folder, tmp_path) -> None:
    teacher, both = tmp_path / "teacher", tmp_path / "both"
    save_tiny_checkpoint(teacher)
    theirs = {"height": 32, "width": 48, "num_inference_steps": 30, "guidance_scale": 5.0}
    (teacher / DEFAULTS_FILE).write_text(json.dumps(theirs), encoding="utf-8")
    convert(folder, both, teacher=teacher)
    for again in (both, tmp_path / "again"):
        if again != both:
            convert(both, again)
        student, alone = read_defaults(again), read_defaults(again, student=False)
        assert (student.num_inference_steps, student.guidance_scale, student.solver) == (1, 1.0, "Renoise")
        assert (alone.num_inference_steps, alone.guidance_scale, alone.solver) == (30, 5.0, None)
    assert "rehyat/rehyat_defaults.json" in str(describe(both))
    assert TextToVideo.from_pretrained(both, hybrid=None).settings().solver == UniPC()


def test_what_cannot_be_is_a_sentence(pipe, folder, tmp_path) -> None:
    with pytest.raises(RehyatError, match="draws its own noise"):
        pipe(PROMPT, noise=np.zeros((1, 3, 4, 6, 16), np.float32))
    with pytest.raises(ConfigError, match="needs finished chunks"):
        pipe.settings(remember="steps", solver=UniPC())
    other = shutil.copytree(folder, tmp_path / "other")
    content = json.loads((other / DEFAULTS_FILE).read_text(encoding="utf-8"))
    (other / DEFAULTS_FILE).write_text(json.dumps(content | {"solver": "DDIM"}), encoding="utf-8")
    with pytest.raises(ConfigError, match="there is no solver 'DDIM'"):
        TextToVideo.from_pretrained(other)

"""A public few-step file of windowed softmax becomes a student with a state: converted, distilled, saved, streamed."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file
from shared.training import distillation, write_teacher

from rehyat_jax import TextToVideo
from rehyat_jax.cli import main
from rehyat_jax.errors import ConfigError
from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.checkpoints import load_transformer
from rehyat_jax.models.wan.forced import forced
from rehyat_jax.models.wan.rows import TRANSFORMER
from rehyat_jax.sampling import FlowSchedule
from rehyat_jax.sampling.solvers import Renoise
from rehyat_jax.weights.rows import renamed
from train.data.sources import Source
from train.data.trajectories import Points
from train.stages.attending import Streamed
from train.stages.blockwise import observe
from train.stages.streamed_distill import StreamedDistillStage

HYBRID = HybridConfig(chunk_frames=3, overlap_frames=1)
#: The teacher's videos: three chunks of three latent frames, frames of 16 tokens.
SOURCES = (Source(frames=17, height=32, width=32, batch=2),)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """As these trainings write, and `rehyat convert` makes of it."""
    base = write_teacher(tmp_path_factory.mktemp("base"))
    tensors = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    named = {renamed(name, TRANSFORMER, "diffusers", "original")[0]: tensor for name, tensor in tensors.items()}
    published = tmp_path_factory.mktemp("published")
    torch.save({"generator_ema": {f"model.{k}": v for k, v in named.items()}}, published / "self_forcing_dmd.pt")
    (published / "config.json").write_bytes((base / "transformer" / "config.json").read_bytes())
    (base / "transformer").rename(base / "softmax")
    assert main(["convert", str(published / "self_forcing_dmd.pt"), str(base / "transformer")]) == 0
    (base / "rehyat_defaults.json").write_text(json.dumps({"height": 32, "width": 32, "num_frames": 5}))
    return base


def configured(teacher, out, **more):
    plain = {"hybrid": HYBRID, "sources": SOURCES, "num_inference_steps": 20, "guidance_scale": 4.0}
    return distillation(teacher, out, **plain | more)


@pytest.fixture(scope="module")
def trained(teacher, tmp_path_factory):
    training = configured(teacher, tmp_path_factory.mktemp("run") / "student", held_out=2, measure_rounds=16)
    training.run()
    return training


@pytest.mark.full
def test_it_learns_what_its_teacher_streams_with(trained):
    measured = [json.loads(line) for line in (trained.train_folder / "blocks.jsonl").read_text().splitlines()]
    for first, last in zip(measured[0]["error"], measured[-1]["error"], strict=True):
        assert last < 0.95 * first
    # Of each of its four levels.
    assert len(measured[0]["error_by_sampling_step"]) == 4


@pytest.mark.full
def test_the_student_streams_in_the_files_own_levels_with_a_constant_state(trained, teacher, tmp_path):
    student, theirs = (TextToVideo.from_pretrained(path, cache_dir=tmp_path) for path in (trained.out, teacher))
    settings = student.settings()
    assert (settings.num_inference_steps, settings.guidance_scale, settings.remember) == (4, 1.0, 0.0)
    assert (settings.schedule, settings.solver) == (FlowSchedule(grid="warped", shift=5.0), Renoise())
    assert settings == theirs.settings()
    assert student.transformer.hybrid == HYBRID
    streams = [pipe.open_stream("a lemon moving down", seed=3) for pipe in (student, theirs)]
    kept = []
    for stream in streams:
        next(stream)
        first = [x.shape for x in jax.tree.leaves(stream.state)]
        assert np.isfinite(next(stream)).all()
        assert [x.shape for x in jax.tree.leaves(stream.state)] == first
        kept.append({x.shape[4] for x in jax.tree.leaves(stream.state.states) if x.ndim == 7})
    # Frames of four tokens: the one before a chunk and the sums of two heads, and the 18 of the teacher's window.
    assert kept == [{4, 2}, {72, 0}]
    streams[0].save(tmp_path / "kept")
    block = next(streams[0])
    np.testing.assert_array_equal(next(student.resume_stream(tmp_path / "kept")), block)


def test_what_is_looked_at_is_the_streams_own(teacher):
    """The pass over both rows gives the velocity of `forced`, which tests compare with streams: float32, two blocks."""
    stage = configured(teacher, teacher.parent / "none").stage()
    assert isinstance(stage, StreamedDistillStage)
    model, shape = load_transformer(teacher), (1, 9, 16, 16, 4)
    rng = np.random.default_rng(0)
    noisy, past = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2))
    times, text = jnp.full((1, 9), 625.0), jnp.asarray(rng.standard_normal((1, 5, 16)), jnp.float32)
    graph, weights = nnx.split(model)

    @jax.jit
    def both(weights):
        model = nnx.merge(graph, weights)
        how = {"past": past, "past_times": jnp.zeros((1, 9))}
        expected = forced(
            model, noisy, times, model.precompute_text_kv(text), model.init_state(1, 16, 16), **how
        ).velocity
        rows = [jnp.concatenate(pair) for pair in ((noisy, past), (times, jnp.zeros((1, 9))), (text, text))]
        return expected, observe(model, Points(*rows), [], [], attending=Streamed(model.mixing.groups[0]))[0][0::2]

    expected, found = both(weights)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_inference_steps": 5}, "sampled at its own num_inference_steps, 4"),
        ({"guidance_scale": 3.0}, "sampled at its own guidance_scale, 1"),
        ({"hybrid": HybridConfig(chunk_frames=1)}, "chunks of 3 latent frames, and so must"),
        ({"loss": "score"}, "by the l1 loss"),
        ({"sources": (dataclasses.replace(SOURCES[0], frames=9),)}, "9 frames are 5 latent ones, and no whole number"),
        ({"sources": (dataclasses.replace(SOURCES[0], batch=1),)}, "1 videos cannot be cut into 2"),
    ],
)
def test_what_does_not_fit_is_a_sentence(change, words, teacher, tmp_path):
    with pytest.raises(ConfigError, match=words):
        configured(teacher, tmp_path / "out", **change).run()

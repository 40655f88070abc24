"""A value passes a room once: no chain of calls comes back into a room that it had left, as real runs are traced.

What is followed are calls in Python, so that a program's own way is walked while JAX traces it. Errors and the
machine (``rehyat_jax.runtime``) are at hand everywhere and no rooms of a trip.
"""

import pytest
from shared.training import HYBRID, finetuning, write_teacher
from shared.trips import walked

import rehyat_jax as rj
from train.data.clips import Bucket
from train.engine.engine import Engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("trips") / "model")


def _passed(trips, *rooms):
    """That these were walked through at all."""
    assert {f"rehyat_jax/{room}" for room in rooms} <= set(trips.rooms)


def _one_video(folder, **how):
    pipe = rj.TextToVideo.from_pretrained(folder, **how)
    pipe.text.warm_up()  # its network is read when a prompt first needs it, here or never: another trip
    return pipe


@pytest.mark.full
def test_prompt_to_pixels_all_frames_at_each_step(folder):
    pipe = _one_video(folder, hybrid=None)
    with walked() as trips:
        pipe("a lemon", num_frames=5, num_inference_steps=1)
    _passed(trips, "pipeline.py", "text", "sampling", "models", "adapters", "attention")
    assert not trips.returns


def test_prompt_to_pixels_chunk_after_chunk(folder):
    pipe = _one_video(folder, hybrid=HYBRID)
    with walked() as trips:
        stream = pipe.open_stream("a lemon", num_inference_steps=1)
        next(stream)
        next(stream)
    _passed(trips, "pipeline.py", "text", "streams", "sampling", "models", "mixers", "attention")
    assert not trips.returns


def test_checkpoint_to_parameters(folder):
    """The weights' engine asks models what they have, by names and shapes alone: no tensor goes back."""
    with walked() as trips:
        rj.load_transformer(folder)
        rj.load_vae(folder)
        rj.load_text_encoder(folder)
    _passed(trips, "models", "weights")
    assert not trips.carrying
    asked = {(room, by) for room, by, _ in trips.returns}
    models, weights = "rehyat_jax/models", "rehyat_jax/weights"
    assert asked <= {(models, weights), (weights, models)}


@pytest.mark.full
def test_clip_to_gradient(folder, tmp_path):
    """A round as the engine has it: its clips from the host, and its program, traced and not compiled. Checkpoints are
    read in it as above, and the program's arithmetic is counted.

    Two returns carry arrays: clips that are drawn are given their stage's reading of captions, and a loss is a mean of
    the engine's kind.
    """
    buckets = (Bucket(kind="plain", frames=5, batch=2),)
    run = finetuning(folder, tmp_path / "out", steps=1, steps_per_round=1, reuse=1, buckets=buckets)
    with walked() as trips:
        engine = Engine(run.stage(), steps=1)
        for kind, each in engine.rounds.items():
            each.inputs.host(0)
            engine.lower(kind)
    assert {"train/engine", "train/stages", "train/data"} <= set(trips.rooms)
    _passed(trips, "models", "mixers", "attention", "sprites")
    assert set(trips.carrying) == {
        ("train/stages", "train/data", "finetune.FinetuneStage.read"),
        ("train/engine", "train/stages", "gradients.Mean.of"),
    }

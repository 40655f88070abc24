"""Attention Surgery's choice as a command: candidates are measured, blocks are chosen, and the model is used."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from shared.training import WAN, distillation, finetuning, write_teacher

import train.stages.candidates
from rehyat_jax import TextToVideo
from rehyat_jax.errors import CheckpointError, ConfigError
from rehyat_jax.mixers import BlockMixers, Hybrid, Linear, Softmax, Window
from rehyat_jax.models.checkpoints import load_transformer
from train.data.clips import Bucket
from train.stages.choice import Choice, Chosen, choose, mixer_milliseconds

CANDIDATES = (Hybrid(chunk_frames=1, degree=1), Hybrid(chunk_frames=2, overlap_frames=0), Window(chunk_frames=1))
#: Of softmax and the candidates. 5.5 are for a window (1) and the second hybrid (4.5), or two that are cheaper.
TIMES = dict(zip((Softmax(), *CANDIDATES), (8.0, 6.0, 4.5, 1.0), strict=True))
CHOICE = Choice(candidates=CANDIDATES, budget=5.5 / 16, steps=8)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def chosen(teacher, tmp_path_factory):
    """A run with times that are known."""
    out = tmp_path_factory.mktemp("chosen") / "student"
    training = distillation(teacher, out, choice=CHOICE, steps=8, measure_rounds=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.stages.candidates, "mixer_milliseconds", lambda mixer, *_, **__: TIMES[mixer])
        training.run()
    return training


@pytest.mark.full
def test_the_choice_is_the_least_error_within_the_budget_of_what_was_measured(chosen):
    """Against every one of the 16 choices; each candidate learned in every block, but the window, which has nothing
    to learn."""
    found = Chosen.read(chosen.choice_file)
    assert found.candidates == (Softmax(), *CANDIDATES)
    assert found.milliseconds == tuple(TIMES.values())
    np.testing.assert_array_equal(found.errors[:, 0], 0)
    assert found.errors.shape == (2, 4)
    assert found.errors[:, 1:].min() > 0
    possible = [
        (found.errors[0, i] + found.errors[1, j], (i, j))
        for i in range(4)
        for j in range(4)
        if found.milliseconds[i] + found.milliseconds[j] <= 5.5
    ]
    assert found.numbers == min(possible)[1]
    log = [json.loads(x) for x in (chosen.train_folder / "choice-train" / "metrics.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 8


@pytest.mark.full
def test_the_chosen_model_is_distilled_loaded_and_generated_with(chosen):
    mixers = Chosen.read(chosen.choice_file).mixers
    student = load_transformer(chosen.out)
    assert student.hybrid == mixers
    assert mixers.distinct()
    video = TextToVideo.from_pretrained(chosen.out)("a red circle", num_frames=5, num_inference_steps=1)
    assert video.shape == (5, 32, 32, 3)


@pytest.mark.full
def test_the_chosen_model_is_finetuned(chosen, tmp_path):
    mixers = Chosen.read(chosen.choice_file).mixers
    buckets = (Bucket(kind="plain", frames=5, batch=4),)
    options = {"hybrid": None, "teacher": None, "teacher_weight": 0.0, "steps": 8, "buckets": buckets}
    training = finetuning(chosen.out, tmp_path / "tuned", **options)
    training.run()
    assert load_transformer(tmp_path / "tuned").hybrid == mixers


@pytest.mark.full
def test_a_choice_that_was_made_is_kept(chosen):
    """What was measured on one day is not chosen from again on another: the times would be others."""
    assert chosen.chosen().hybrid == Chosen.read(chosen.choice_file).mixers
    other = dataclasses.replace(chosen, choice=dataclasses.replace(CHOICE, budget=0.9))
    with pytest.raises(ConfigError, match="other candidates or another budget"):
        other.chosen()
    with pytest.raises(CheckpointError, match="no choice was made yet"):
        dataclasses.replace(chosen, out=chosen.out.with_name("none")).chosen()


def test_a_mixer_is_timed_at_the_models_shapes():
    """Twice the frames are more work for softmax: a time that says nothing would not grow."""
    short, long = (mixer_milliseconds(Softmax(), WAN, shape=(n, 64, 64), dtype=jnp.float32) for n in (1, 32))
    assert 0 < short < long
    assert mixer_milliseconds(Linear(), WAN, shape=(3, 16, 16), dtype=jnp.float32) > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"candidates": ()}, "mixers that convert a block"),
        ({"candidates": (Softmax(),)}, "mixers that convert a block"),
        ({"candidates": (Hybrid(), Hybrid())}, "twice"),
        ({"budget": 0.0}, "budget above 0"),
        ({"steps": 0}, "at least one step"),
    ],
    ids=str,
)
def test_impossible_choices_are_named(change, words):
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(CHOICE, **change)


def test_what_no_budget_decides_is_said():
    errors = np.array([[0.0, 0.5]] * 2)
    with pytest.raises(ConfigError, match="every block can keep softmax"):
        choose(Choice(candidates=(Hybrid(),), budget=1.0), errors, [2.0, 1.0])
    with pytest.raises(ConfigError, match=r"no choice takes 2\.0 ms or less: the fastest takes 4 ms"):
        choose(Choice(candidates=(Hybrid(),), budget=0.5), errors, [2.0, 3.0])
    mixed = choose(Choice(candidates=(Hybrid(),), budget=0.75), np.array([[0.0, 0.5], [0.0, 0.1]]), [2.0, 1.0])
    assert mixed.mixers == BlockMixers((Softmax(), Hybrid()))
    assert "chosen: 3.000 ms of 3.000 ms; by softmax it were 4.000 ms" in str(mixed)


def test_a_damaged_choice_is_one_sentence(tmp_path):
    file = tmp_path / "choice.json"
    for text in ("", "{}", '{"candidates": [{"mixer": "magic"}]}', "[" * 100):
        file.write_text(text)
        with pytest.raises(CheckpointError, match="remove it, and the choice is made again"):
            Chosen.read(file)


def test_a_choice_and_the_best_blocks_exclude_each_other(teacher, tmp_path):
    with pytest.raises(ConfigError, match="one of them"):
        distillation(teacher, tmp_path / "out", choice=CHOICE, best=1)

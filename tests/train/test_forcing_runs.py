"""Training on own videos: whole runs of a tiny student against a tiny teacher, which compile more than they compute."""

import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from shared.training import forcing, log_of, write_teacher

from rehyat_jax import TextToVideo
from rehyat_jax.adapters.training import LoraConfig
from rehyat_jax.models.checkpoints import load_transformer
from rehyat_jax.weights.files import read_json
from rehyat_jax.weights.plan import parameters
from train.data.clips import Bucket
from train.data.rollouts import Rollouts
from train.stages.flow import Validation
from train.stages.forcing import ForcingTraining
from train.stages.rewards import MotionReward

#: Two chunks of two latent frames.
CLIPS = Bucket(kind="plain", frames=7, batch=4)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def state_of(run: ForcingTraining, step: int) -> dict[str, bytes]:
    with ocp.StandardCheckpointer() as reader:
        state = reader.restore(run.train_folder / "checkpoints" / str(step) / "default")
    return {jax.tree_util.keystr(path): x.tobytes() for path, x in jax.tree_util.tree_leaves_with_path(state)}


@pytest.mark.full
def test_resumed_in_the_middle_of_a_cycle_it_is_uninterrupted_bit_for_bit(teacher, tmp_path) -> None:
    """Each round another: rows that go on, others that begin, captions that change."""
    rollouts = Rollouts(clips=CLIPS, given=1, windows=3, groups=2, switches=0.5, forks=2)
    options = {
        "buckets": (rollouts,),
        "steps": 6,
        "steps_per_round": 1,
        "every": 3,
        "remember": 0.05,
        "reward": MotionReward(),
        "accumulate": 2,
        "validation": Validation(every=3, clips=4),
    }
    whole, again = (forcing(teacher, tmp_path / name, **options) for name in ("whole", "again"))
    whole.run()
    shutil.copytree(whole.train_folder, again.train_folder)
    for step in (5, 6):
        shutil.rmtree(again.train_folder / "checkpoints" / str(step))
    again.run()
    # The best is kept by the reward that is measured, with its step.
    measured = {entry["step"]: entry["validation/0-reward"] for entry in log_of(whole) if entry["step"] in (3, 6)}
    kept = read_json(whole.train_folder / "best.json")
    assert kept == {"step": max(measured, key=measured.get), "reward": pytest.approx(max(measured.values()))}
    assert TextToVideo.from_pretrained(whole.train_folder / "best").settings().num_inference_steps == 2
    one, two = state_of(whole, 6), state_of(again, 6)
    assert one == two
    assert {name.split("]")[0] for name in one} == {"['step'", "['learners'", "['carried'"}
    # The forks of a row go on from one state, with noise of their own.
    states, keys = (
        [np.frombuffer(x, np.uint8).reshape(4, -1) for name, x in one.items() if f"['{part}']" in name]
        for part in ("states", "keys")
    )
    assert len(states) == 6
    assert all(np.array_equal(x[::2], x[1::2]) for x in states)
    assert all((x[::2] != x[1::2]).any() for x in keys)


def test_a_student_learns_from_its_own_videos_and_needs_no_option(teacher, tmp_path) -> None:
    run = forcing(teacher, tmp_path / "student")
    run.run()
    log = log_of(run)
    assert {"critic/loss", "student/loss", "student/gap", "student/learning_rate"} <= log[-1].keys()
    assert np.isfinite([value for entry in log for value in entry.values()]).all()
    settings = TextToVideo.from_pretrained(run.out).settings()
    assert (settings.num_inference_steps, settings.guidance_scale, settings.remember) == (2, 1.0, 0.0)
    assert type(settings.solver).__name__ == "Renoise"


@pytest.mark.full
def test_adapters_learn_in_the_place_of_both_networks(teacher, tmp_path):
    """The student's base stays as it was, and the LoRA that is written is all that it has learned; the critic has no
    second copy in float32. Folded and cast to bfloat16: 2⁻⁸ of each number."""
    folder, lora = teacher, LoraConfig(rank=2, alpha=4.0)
    training = forcing(folder, tmp_path / "student", lora=lora, critic_lora=lora)
    stage = training.stage()
    networks = stage.networks
    for role in ("student", "critic"):
        module = networks[role].make()
        learned = nnx.state(module, networks[role].trainable)
        assert (
            0
            < sum(x.size for x in jax.tree.leaves(learned))
            < 0.5 * sum(x.size for x in jax.tree.leaves(nnx.state(module)))
        )
    training.run()
    base, made = (load_transformer(path, hybrid=None) for path in (folder, training.out))
    (file,) = training.out.glob("lora_comfyui.safetensors")
    again = load_transformer(folder, hybrid=None, loras=[file])
    changed = 0
    for path, variable in parameters(nnx.state(made)).items():
        found, wanted, before = (
            np.asarray(x, np.float32)
            for x in (
                variable.get_value(),
                parameters(nnx.state(again))[path].get_value(),
                parameters(nnx.state(base))[path].get_value(),
            )
        )
        np.testing.assert_allclose(found, wanted, rtol=2**-7, atol=1e-4)
        changed += not np.array_equal(wanted, before)
    assert changed == 10

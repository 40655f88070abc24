"""Finetuning: a tiny converted model learns, is resumed bit for bit, streams; and what does not fit is said."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from shared.training import HYBRID, finetuning, log_of, models_of, write_teacher

from rehyat_jax import TextToVideo, cli
from rehyat_jax.errors import CheckpointError, ConfigError, RehyatError
from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.checkpoints import load_transformer
from rehyat_jax.video.io import read_video
from train.cli.config_files import load_config
from train.cli.finetune import main
from train.data.clips import Bucket
from train.engine.gradients import gradients_of
from train.engine.stage import Models
from train.stages.finetune import FinetuneTraining
from train.stages.flow import Batch, Validation
from train.stages.history import History
from train.stages.students import student_of


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def _run_alone(model: Path, out: Path, *, die_at: int | None = None) -> subprocess.CompletedProcess[str]:
    """A training in a process of its own, killed by SIGKILL as soon as the checkpoint of step ``die_at`` is written.

    Bits are compared between such processes alone: what a test before has compiled decides about the last one.
    """
    script = f"""
import os, signal, sys
sys.path[:0] = {[str(Path(__file__).parents[1]), str(Path(__file__).parent)]!r}
from pathlib import Path
import conftest, jax, shared.training
from rehyat_jax.runtime.compilation import cache_folder, keep_compiled
from train.engine.checkpoint import Checkpoints

save = Checkpoints.save

def save_and_die(self, step, state):
    save(self, step, state)
    if step == {die_at}:
        os.kill(os.getpid(), signal.SIGKILL)

Checkpoints.save = save_and_die
keep_compiled(cache_folder())
shared.training.finetuning(Path({str(model)!r}), Path({str(out)!r})).run()
"""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory) -> FinetuneTraining:
    """A run without a stop."""
    training = finetuning(teacher, tmp_path_factory.mktemp("whole") / "student")
    done = _run_alone(teacher, training.out)
    assert done.returncode == 0, done.stderr
    return training


@pytest.mark.full
def test_the_loss_falls_over_clips_of_both_lengths(whole):
    log = log_of(whole)
    # Clips longer than the teacher's are not compared with it.
    assert {"teacher" in entry for entry in log} == {True, False}
    assert len(log) == 6
    assert log[-1]["loss"] < 0.75 * log[0]["loss"]


@pytest.mark.full
def test_the_result_is_a_whole_model_that_streams(whole, teacher):
    assert {path.name for path in whole.out.iterdir()} == {
        "model_index.json",
        "rehyat_defaults.json",
        "scheduler",
        "text_encoder",
        "tokenizer",
        "transformer",
        "vae",
    }
    for name in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "model_index.json"):
        assert (whole.out / name).read_bytes() == (teacher / name).read_bytes()
    student, before = load_transformer(whole.out), load_transformer(teacher)
    assert student.hybrid == HYBRID
    # Everything learned, φ and decay as well as the teacher's own.
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), nnx.state(student.blocks), nnx.state(before.blocks))
    assert min(jax.tree.leaves(moved)) > 0
    fresh = before.with_hybrid(HYBRID, rngs=nnx.Rngs(0))
    for ours, theirs in zip(*(jax.tree.leaves(nnx.state(m.hybrid_blocks)) for m in (student, fresh)), strict=True):
        assert np.abs(np.asarray(ours) - np.asarray(theirs)).max() > 0
    rng = np.random.default_rng(0)
    latents, text = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 5, 32, 32, 4), (1, 7, 16)))
    state, read = student.init_state(1, 32, 32), student.precompute_text_kv(text)
    pieces, time = [], jnp.array([500.0])
    for first in range(5):
        velocity, state = student.stream(latents[:, first : first + 1], time, read, state, first_frame=first)
        pieces.append(velocity)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), student(latents, time, text), atol=1e-4)
    assert TextToVideo.from_pretrained(whole.out).defaults.num_inference_steps == 2


@pytest.mark.full
def test_anew_a_student_is_its_teacher_converted(whole):
    begun = finetuning(whole.out, Path("unused"), anew=True).student(whole.out)
    softmax = load_transformer(whole.out, hybrid=None)
    chex.assert_trees_all_equal(nnx.state(begun), nnx.state(softmax.with_hybrid(HYBRID, rngs=nnx.Rngs(0))))


@pytest.mark.full
def test_stopped_and_continued_is_uninterrupted_bit_for_bit(whole, teacher, tmp_path):
    """Three rounds, SIGKILL, and three more: parameters, optimiser, order of the data, result."""
    training = finetuning(teacher, tmp_path / "student")
    killed = _run_alone(teacher, training.out, die_at=24)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(os.listdir(tmp_path)) == ["student-train"]
    resumed = _run_alone(teacher, training.out)
    assert resumed.returncode == 0, resumed.stderr
    assert [entry["from_step"] for entry in log_of(training)] == [0, 0, 0, 24, 24, 24]
    assert [entry["loss"] for entry in log_of(training)[3:]] == [entry["loss"] for entry in log_of(whole)[3:]]
    chex.assert_trees_all_equal(_newest(training.train_folder), _newest(whole.train_folder))
    for path in whole.out.rglob("*"):
        if path.is_file():
            assert (training.out / path.relative_to(whole.out)).read_bytes() == path.read_bytes(), path


def _newest(folder: Path) -> object:
    with ocp.StandardCheckpointer() as reader:
        return reader.restore((folder / "checkpoints" / "48" / "default").absolute())


def test_history_is_cleaner_and_not_learned(teacher):
    """Of 512 clips of five frames in chunks of two, 384 with history, half of their chunks; the others at one level."""
    training = finetuning(
        teacher,
        Path("unused"),
        teacher=None,
        teacher_weight=0.0,
        hybrid=HybridConfig(chunk_frames=2),
        history=History(share=0.75, clean=0.5, noise=0.05),
    )
    even = (jnp.arange(512, dtype=jnp.float32) + 0.5) / 512
    levels, weights = jax.jit(lambda even, key: training.levels(even, key, frames=5))(even, jax.random.key(0))
    for x in (levels, weights):
        np.testing.assert_array_equal(x[:, [0, 2]], x[:, [1, 3]])
    chunks, learned = np.asarray(levels)[:, ::2], np.asarray(weights)[:, ::2] == 1
    alike = (chunks == chunks[:, :1]).all(1)
    assert alike.sum() == 128
    np.testing.assert_array_equal(chunks[alike, 0], np.asarray(even)[alike])
    assert learned[alike].all()
    assert abs(learned[~alike].mean() - 0.5) < 0.05  # 1152 draws: 0.015 of standard deviation
    assert chunks[~learned].max() <= 0.05
    # The other chunks' are of all the levels, independent of their neighbours'.
    assert np.isin(chunks[learned], np.asarray(even)).all()
    assert abs(chunks[learned].mean() - 0.5) < 0.05
    both = learned[:, 0] & learned[:, 1] & ~alike
    assert abs(np.corrcoef(chunks[both, 0], chunks[both, 1])[0, 1]) < 0.4

    # What counts nothing cannot be felt.
    model = load_transformer(teacher).with_hybrid(HybridConfig(chunk_frames=2), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    noisy, velocity, text = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 5, 16, 16, 4), (2, 5, 16, 16, 4), (2, 7, 16))
    )
    counted = jnp.array([[0.0, 0.0, 1.0, 1.0, 1.0]] * 2)

    loss = jax.jit(lambda batch: training.loss(models_of(student=model), batch, longest=1)["loss"].value)
    times = levels[:2] * 1000
    batch = Batch(noisy, times, text, velocity, counted)
    value = loss(batch)
    assert value == loss(batch._replace(velocity=velocity.at[:, :2].set(9.0)))
    whole = jax.jit(lambda noisy: model(noisy, times, text, text_tokens=512))(noisy)
    out = whole[:, 2:] - velocity[:, 2:]
    np.testing.assert_allclose(value, np.mean(np.square(out)), rtol=1e-5)
    # None at all: nothing is learned, and nothing is divided by zero.
    assert loss(batch._replace(weights=jnp.zeros((2, 5)))) == 0


@pytest.mark.full
def test_a_student_that_remembers_says_so(teacher, tmp_path):
    """Trained with history: its folder's default, which a stream follows with one state for all steps."""
    training = finetuning(
        teacher,
        tmp_path / "student",
        teacher=None,
        teacher_weight=0.0,
        steps=8,
        history=History(share=1.0),
        remember=0.1,
        buckets=(Bucket(kind="plain", frames=5, batch=4),),
    )
    training.run()
    assert log_of(training)[0]["loss"] > 0
    pipe = TextToVideo.from_pretrained(training.out)
    assert pipe.defaults.remember == 0.1
    stream = pipe.open_stream("a lemon")
    assert {x.shape[0] for x in jax.tree.leaves(stream.state.states)} == {1}
    assert {x.shape[0] for x in jax.tree.leaves(pipe.open_stream("a lemon", remember="steps").state.states)} == {2}
    next(stream)
    stream.save(tmp_path / "saved")
    np.testing.assert_array_equal(next(pipe.resume_stream(tmp_path / "saved")), next(stream))
    again = finetuning(training.out, tmp_path / "again", teacher=None, teacher_weight=0.0)
    again.write(again.out, training.out, load_transformer(training.out))
    assert TextToVideo.from_pretrained(again.out).defaults.remember == "steps"


@pytest.mark.parametrize(("chunk", "longest", "expected"), [(3, 3, 0.0), (2, 3, 1e-6), (3, 2, None)])
def test_the_teachers_term_is_zero_where_a_chunk_is_the_whole_clip(teacher, chunk, longest, expected):
    """At the start, but for float32's rounding: 1e-6, squared. A smaller chunk differs, and long clips have no term."""
    training = finetuning(teacher, Path("unused"))
    model = load_transformer(teacher)
    student = model.with_hybrid(HybridConfig(chunk_frames=chunk, overlap_frames=0), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    noisy, velocity, text = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 3, 16, 16, 4), (2, 3, 16, 16, 4), (2, 7, 16))
    )
    batch = Batch(noisy, jnp.array([900.0, 100.0]), text, velocity)
    models = models_of(student=student, teacher=model)
    weights = {}

    @jax.jit
    def values(batch):
        means = training.loss(models, batch, longest=longest)
        weights.update({name: mean.weight for name, mean in means.items()})
        return {name: mean.value for name, mean in means.items()}

    metrics = values(batch)
    assert metrics["loss"] > 1
    assert weights["loss"] == 1
    if expected is None:
        assert "teacher" not in metrics
        return
    assert weights["teacher"] == 0.1
    assert metrics["teacher"] < 1e-11 if expected == 0 else metrics["teacher"] > expected


def test_a_student_keeps_its_feature_maps_and_gains_what_it_lacks(teacher):
    plain = dataclasses.replace(HYBRID, decay=False, length_norm=False)
    source = load_transformer(teacher).with_hybrid(plain, rngs=nnx.Rngs(5))
    student = student_of(source, dataclasses.replace(HYBRID, chunk_frames=2), where=Path("there"))
    ours, theirs = nnx.state(student.hybrid_blocks), nnx.state(source.hybrid_blocks)
    for added in ("decay_rate", "length_power"):
        np.testing.assert_array_equal(ours.pop(added).get_value(), np.zeros((2, 2)))
    chex.assert_trees_all_equal(ours, theirs)
    assert student.hybrid.chunk_frames == 2
    for other in (dataclasses.replace(plain, degree=3), dataclasses.replace(plain, blocks=(1,))):
        with pytest.raises(ConfigError, match="there has other hybrid blocks"):
            student_of(source, other, where=Path("there"))
    with pytest.raises(ConfigError, match="other hybrid blocks"):
        student_of(student, plain, where=Path("there"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teacher_weight": -1.0}, "teacher_weight"),
        ({"hybrid_rate": float("nan")}, "hybrid_rate"),
        ({"gate_rate": -1.0}, "gate_rate"),
        ({"teacher": None}, "teacher_weight needs a teacher"),
        ({"teacher_weight": 0.0}, "above 0"),
        ({"teacher_frames": 4}, r"teacher_frames \(4\)"),
        ({"steps": 0}, "steps"),
        ({"reuse": 3}, "multiple"),
        ({"accumulate": 3}, "accumulate = 3"),
        ({"most_skipped": 0}, "most_skipped"),
        ({"remember": 1.0}, "remember must be"),
        ({"history": History(share=0.5)}, "cannot be beside history"),
        ({"history": History(share=0.5), "teacher": None, "teacher_weight": 0.0, "hybrid": None}, "say by hybrid"),
    ],
)
def test_impossible_settings_are_named(change, words):
    with pytest.raises(ConfigError, match=words):
        finetuning(Path("unused"), Path("unused"), **change)


@pytest.mark.full
def test_what_does_not_fit_is_one_sentence(whole, teacher, tmp_path):
    out = tmp_path / "out"
    short = (Bucket(kind="plain", frames=4, batch=4),)
    alone = {"teacher": None, "teacher_weight": 0.0}
    for change, error, words in [
        ({"out": whole.out}, RehyatError, "already"),
        ({"source": tmp_path / "nowhere"}, CheckpointError, "nowhere"),
        ({"source": teacher / "transformer"}, CheckpointError, "rehyat convert"),
        ({"hybrid": None}, ConfigError, "softmax model"),
        ({"hybrid": HybridConfig(blocks=(7,))}, ConfigError, "block 7"),
        ({"buckets": short} | alone, ConfigError, r"4 frames are not 2k \+ 1"),
        ({"teacher": Path("mini-sprites")}, ConfigError, "of different sizes"),
    ]:
        with pytest.raises(error, match=words) as raised:
            finetuning(teacher, change.pop("out", out), **change).run()
        assert "\n" not in str(raised.value)
    assert not out.exists()


def test_fields_of_the_hybrid_are_options_of_the_command(teacher, tmp_path, capsys):
    file = tmp_path / "config.py"
    file.write_text(
        "from pathlib import Path\nfrom rehyat_jax.mixers.config import HybridConfig\n"
        "from train.stages.finetune import FinetuneTraining\n"
        f"config = FinetuneTraining(out=Path({str(tmp_path / 'out')!r}), source=Path({str(teacher)!r}), "
        "hybrid=HybridConfig())"
    )
    assert main([]) == 2
    assert "train.stages.finetune.FinetuneTraining" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(file), "--help"])
    said = capsys.readouterr().out
    for field in ("--hybrid.chunk-frames", "--teacher-weight", "--hybrid-rate", "--optimizer.learning-rate"):
        assert field in said
    with pytest.raises(ConfigError, match="block 9"):
        main([str(file), "--hybrid.blocks", "9"])


def test_the_configuration_that_ships():
    config, about = load_config("sprites_finetune", kinds=(FinetuneTraining,))
    assert config.out == Path("out/sprites-student")
    assert max(bucket.frames for bucket in config.buckets) == 257
    for word in ("rehyat finetune sprites_finetune", "Cost:"):
        assert word in about


def test_parts_of_a_batch_give_the_gradient_of_the_batch(teacher):
    """Float32: sums in another order, of a gradient whose largest numbers are of order one."""
    training = finetuning(teacher, Path("unused"), teacher=None, teacher_weight=0.0)
    (graph, params), rng = nnx.split(load_transformer(teacher)), np.random.default_rng(0)
    shapes = ((8, 2, 16, 16, 4), (8,), (8, 7, 16), (8, 2, 16, 16, 4))
    noisy, time, text, velocity = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    batch = Batch(noisy, 500.0 + 100.0 * time, text, velocity)

    def loss(params, part):
        return training.loss(Models({"student": graph}, params={"student": params}), part, longest=9)

    gradients = [
        jax.jit(lambda params, parts=parts: gradients_of(loss, params, batch, parts=parts))(params) for parts in (1, 4)
    ]
    chex.assert_trees_all_close(*gradients, atol=1e-5, rtol=1e-4)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(gradients)} == {"float32"}


@pytest.mark.full
def test_validation_measures_and_shows_the_average(teacher, tmp_path):
    training = finetuning(
        teacher,
        tmp_path / "student",
        steps=16,
        teacher=None,
        teacher_weight=0.0,
        accumulate=2,
        buckets=(Bucket(kind="plain", frames=5, batch=4),),
        validation=Validation(every=8, clips=3, prompts=("a lemon moving down",)),
    )
    training.run()
    first, last = (entry["validation/loss"] for entry in log_of(training))
    assert last < first
    videos = [read_video(training.train_folder / "videos" / f"step-0000{step}" / "0.mp4") for step in ("08", "16")]
    assert [video.shape[0] for video in videos] == [5, 5]
    assert not np.array_equal(*videos)
    assert all(entry["tflops_per_s"] > 0 for entry in log_of(training))


@pytest.mark.full
def test_the_last_checkpoint_exports_the_model_of_the_run(whole, teacher, tmp_path, capsys):
    file = tmp_path / "config.py"
    file.write_text(
        f"import sys\nsys.path[:0] = {[str(Path(__file__).parents[1]), str(Path(__file__).parent)]!r}\n"
        "from pathlib import Path\nimport shared.training\n"
        f"config = shared.training.finetuning(Path({str(teacher)!r}), Path('elsewhere'))"
    )
    out = tmp_path / "exported"
    assert cli.main(["export", str(file), str(out), "--", "--out", str(whole.out)]) == 0
    for path in whole.out.rglob("*"):
        if path.is_file():
            assert (out / path.relative_to(whole.out)).read_bytes() == path.read_bytes(), path
    earlier = tmp_path / "earlier"
    assert cli.main(["export", str(file), str(earlier), "--step", "40", "--", "--out", str(whole.out)]) == 0
    before, after = (load_transformer(folder).proj_out.kernel[...] for folder in (earlier, out))
    assert float(jnp.abs(before - after).max()) > 0
    capsys.readouterr()
    for more, words in [
        (["--", "--out", str(tmp_path / "none")], "there are no checkpoints in"),
        (["--step", "7", "--", "--out", str(whole.out)], "has no checkpoint of step 7 (there are 40, 48)"),
        (["--", "--out", str(whole.out), "--hybrid.no-decay"], "is of another model"),
    ]:
        assert cli.main(["export", str(file), str(tmp_path / "more"), *more]) == 2
        said = capsys.readouterr().err.strip().split("\n")[-1]
        assert said.startswith("rehyat: ")
        assert words in said
    assert not (tmp_path / "more").exists()

"""Distillation: a run learns, is resumed bit for bit, makes a whole model; and what does not fit is said."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from shared.training import DISTILLED, distillation, write_teacher

import train.engine.engine
import train.stages.distill_stage
from rehyat_jax import TextToVideo
from rehyat_jax.errors import CheckpointError, ConfigError, RehyatError
from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.checkpoints import load_transformer
from train.cli.config_files import load_config
from train.cli.distill import main
from train.data.sources import Source
from train.engine.checkpoint import Checkpoints
from train.stages.distill import DistillTraining


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> DistillTraining:
    """A run without a stop."""
    training = distillation(folder, tmp_path_factory.mktemp("whole") / "student", best=1)
    training.run()
    return training


def test_the_error_on_held_out_prompts_falls_in_every_block(whole):
    measured = _lines(whole.train_folder / "blocks.jsonl")
    assert [entry["step"] for entry in measured] == [0, 32, 64]
    assert measured[0]["block"] == [0, 1]
    for first, last in zip(measured[0]["error"], measured[-1]["error"], strict=True):
        assert last < 0.95 * first
    assert len(measured[0]["error_by_sampling_step"]) == 4
    # φ begins so small that it has no share, and 4 of 5 frames have a past.
    assert max(measured[0]["share"]) < 0.01 < 0.05 < min(measured[-1]["share"])
    log = _lines(whole.train_folder / "metrics.jsonl")
    assert {"loss", "held_out", "share", "steps_per_s"} <= log[-1].keys()


def test_the_result_is_the_teacher_with_a_part_more(whole, folder):
    theirs = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    ours = {path.relative_to(whole.out) for path in whole.out.rglob("*") if path.is_file()}
    assert ours - theirs == {Path("transformer/rehyat/config.json"), Path("transformer/rehyat/features.safetensors")}
    assert all((whole.out / name).read_bytes() == (folder / name).read_bytes() for name in theirs)
    # Of two blocks the better one was kept.
    errors = _lines(whole.train_folder / "blocks.jsonl")[-1]["error"]
    assert load_transformer(whole.out).hybrid == dataclasses.replace(DISTILLED, blocks=(int(np.argmin(errors)),))
    assert TextToVideo.from_pretrained(whole.out).defaults.num_frames == 5


class Killed(BaseException):
    """As good as SIGKILL: nothing between the checkpoint and the end of the process runs."""


@pytest.mark.full
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(whole, folder, tmp_path, monkeypatch):
    """Checkpoint of step 36 (an odd round, trajectories at different steps), the end, and the rest from there."""
    save = Checkpoints.save

    def save_and_die(self, step, state):
        save(self, step, state)
        if step == 36:
            raise Killed

    training = dataclasses.replace(whole, out=tmp_path / "student", best=None)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_die)
        with pytest.raises(Killed):
            training.run()
    assert not training.out.exists()
    training.run()
    assert _lines(training.train_folder / "metrics.jsonl")[-1]["from_step"] == 36
    one, two = (
        {
            path.relative_to(t.train_folder): path
            for path in (t.train_folder / "checkpoints" / "64").rglob("*")
            if path.is_file()
        }
        for t in (whole, training)
    )
    assert _arrays(one) == _arrays(two)
    errors = [_lines(t.train_folder / "blocks.jsonl")[-1]["error"] for t in (whole, training)]
    assert errors[0] == errors[1]
    # All blocks are converted here: it streams, and equals itself as a whole.
    student = load_transformer(training.out)
    assert student.hybrid == DISTILLED
    rng = np.random.default_rng(0)
    latents, text = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 3, 16, 16, 4), (1, 7, 16)))
    state, read = student.init_state(1, 16, 16), student.precompute_text_kv(text)
    pieces, time = [], jnp.array([500.0])
    for first in range(3):
        velocity, state = student.stream(latents[:, first : first + 1], time, read, state, first_frame=first)
        pieces.append(velocity)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), student(latents, time, text), atol=1e-4)


def _arrays(files: dict[Path, Path]) -> dict[str, bytes]:
    root = next(path for name, path in files.items() if name.name == "seal.json").parent
    with ocp.StandardCheckpointer() as reader:
        tree = reader.restore(root / "default")
    return {
        jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "steps"),
        ({"minibatches": 3}, "8 points .* into 3"),
        ({"sources": ()}, "share"),
        ({"hybrid": HybridConfig(kind="window")}, "window"),
        ({"hybrid": HybridConfig(kind="linear"), "loss": "score"}, "score"),
        ({"held_out": 0}, "held_out"),
    ],
)
def test_impossible_settings_are_named(change, words):
    with pytest.raises(ConfigError, match=words):
        distillation(Path("unused"), Path("unused"), **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"frames": 0}, "frames"),
        ({"batch": 0}, "batch"),
        ({"share": -1.0}, "share"),
        ({"videos": True, "width": 96}, "videos"),
        ({"videos": True, "prompts": "a.txt"}, "a.txt"),
    ],
)
def test_impossible_sources_are_named(change, words):
    with pytest.raises(ConfigError, match=words):
        Source(**{"frames": 9, "batch": 1} | change)


def test_what_does_not_fit_is_one_sentence(whole, folder, tmp_path):
    (tmp_path / "few.txt").write_text("one\ntwo\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")

    def source(**options) -> tuple[Source, ...]:
        return (Source(**{"frames": 9, "batch": 4, "height": 32, "width": 32} | options),)

    for change, kind, words in [
        ({"out": whole.out}, RehyatError, "already"),
        ({"teacher": folder / "transformer"}, CheckpointError, "convert"),
        ({"teacher": tmp_path / "none"}, CheckpointError, "none"),
        ({"best": 3}, ConfigError, "best 3 of 2"),
        ({"hybrid": HybridConfig(blocks=(5,))}, ConfigError, "block 5"),
        ({"sources": source(frames=8)}, ConfigError, "8 frames are not 2k"),
        ({"sources": source(width=40)}, ConfigError, "40 is no multiple of 16"),
        ({"sources": source(prompts="nowhere.txt")}, ConfigError, "nowhere.txt"),
        ({"sources": source(prompts=str(tmp_path / "few.txt"))}, ConfigError, "2 prompts, of which 2"),
        ({"sources": source(prompts=str(tmp_path / "bytes.txt"))}, ConfigError, "not a text file"),
        ({"num_inference_steps": 1001}, ConfigError, "1001"),
    ]:
        training = distillation(folder, tmp_path / "out")
        with pytest.raises(kind, match=words):
            dataclasses.replace(training, **change).run()
        assert not (tmp_path / "out").exists()


def test_prompts_of_a_file_are_embedded_as_captions_are(folder, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a lemon\nb")
    texts = ["a lemon moving down slowly on a blue background", ""]
    dtype = jnp.dtype(jnp.float32)
    one = train.stages.distill_stage._embeddings(folder, (Source(frames=9, batch=1),), dtype, repair=True)(texts)
    listed = (Source(prompts=str(path), frames=9, batch=1),)
    two = train.stages.distill_stage._embeddings(folder, listed, dtype, repair=True)(texts)
    assert one.shape == (2, 512, 16)
    np.testing.assert_allclose(one, two, atol=1e-5)


def test_the_command_tells_its_fields(capsys):
    assert main(["--help"]) == 0
    assert "rehyat distill CONFIG" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["sprites_distill", "--help"])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    for field in ("--hybrid.chunk-frames", "--sources.0.batch", "--updates-per-point", "--best", "Cost:"):
        assert field in told


def test_the_configuration_that_ships():
    config, about = load_config("sprites_distill", kinds=(DistillTraining,))
    assert (config.out, config.teacher) == (Path("out/sprites-distilled"), Path("mini-sprites"))
    for word in ("rehyat distill sprites_distill", "Cost:", "Result:"):
        assert word in about


def test_the_last_checkpoint_exports_the_model_of_the_run(whole, tmp_path):
    whole.export(tmp_path / "exported")
    for path in whole.out.rglob("*"):
        if path.is_file():
            assert (tmp_path / "exported" / path.relative_to(whole.out)).read_bytes() == path.read_bytes(), path

"""Checkpoints against damage, and of another model."""

import os
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from shared.training import problem

from rehyat_jax.errors import CheckpointError, RehyatError
from train.engine.checkpoint import Checkpoints
from train.engine.optimizer import OptimizerConfig


def _states():
    first = OptimizerConfig().init(problem())
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
    wider = OptimizerConfig().init(problem() | {"more": jnp.zeros(3)})
    other = OptimizerConfig().init(problem() | {"table": {"embedding": nnx.Param(jnp.zeros((4, 2), jnp.bfloat16))}})
    for template, words in [(wider, r"more.*missing there"), (other, r"float32\[4,2\] there and bfloat16\[4,2\] here")]:
        with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=words):
            checkpoints.restore(template)
    assert (tmp_path / "8").is_dir()


def test_a_disk_without_room_is_known_before_a_checkpoint_is_begun(tmp_path, monkeypatch):
    """At the start of a run, and before each checkpoint; what there was stays."""
    first, second = _states()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, first)
        before = sorted(tmp_path.rglob("*"))
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
        with pytest.raises(RehyatError, match=r"a checkpoint needs .* has 10 bytes left"):
            checkpoints.save(1, second)
        assert sorted(tmp_path.rglob("*")) == before
        assert checkpoints.restore(second) is not None
    with Checkpoints(tmp_path / "new") as checkpoints, pytest.raises(RehyatError, match="has 10 bytes left"):
        checkpoints.restore(first)

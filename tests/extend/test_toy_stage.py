"""A stage outside the package, as docs/extend/stage.md has it: two learners, killed inside a cycle, resumed."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from rehyat_jax import cli
from train.engine.checkpoint import VERSION, Checkpoints

PAGE = Path(__file__).parents[2] / "docs" / "extend" / "stage.md"
#: Stops as soon as the checkpoint of this step is written: two rounds into a cycle of five.
_DIE_AT = 62


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Iterator[Path]:
    """The page's configuration, with its module beside it."""
    folder = tmp_path_factory.mktemp("toy")
    module, config = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    (folder / "gaussian.py").write_text(module)
    (folder / "narrow.py").write_text(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder / "narrow.py"


def _alone(toy: Path, *argv: object, die_at: int | None = None) -> subprocess.CompletedProcess[str]:
    """The page's command, killed by SIGKILL once the checkpoint of a step is written."""
    program = f"""
import os, signal, sys
sys.path[:0] = [{str(toy.parent)!r}, {str(Path(__file__).parents[2])!r}]
import gaussian
from train.engine.checkpoint import Checkpoints

save = Checkpoints.save

def save_and_die(self, step, state):
    save(self, step, state)
    if step == {die_at}:
        os.kill(os.getpid(), signal.SIGKILL)

Checkpoints.save = save_and_die
sys.exit(gaussian.main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", program, str(toy), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory) -> Path:
    """The command of the page, in this process."""
    out = tmp_path_factory.mktemp("whole") / "result"
    assert importlib.import_module("gaussian").main([str(toy), "--out", str(out), "--checkpoint-seconds", "1e9"]) == 0
    return out


def test_the_student_draws_as_its_teacher(trained):
    found = json.loads((trained / "gaussian.json").read_text())
    np.testing.assert_allclose([found["mean"], found["deviation"]], [2.0, 0.5], atol=0.05)


def test_metrics_tell_learners_apart(trained):
    lines = (trained.with_name("result-train") / "metrics.jsonl").read_text().splitlines()
    assert {"critic/loss", "student/loss"} <= json.loads(lines[-1]).keys()  # 1000 is the last round of a cycle
    assert json.loads(trained.with_suffix(".json").read_text())["settings"]["rows"] == 256


def test_each_learner_has_as_many_steps_as_are_due(trained):
    state = _state(trained, 1000)
    assert int(state["step"]) == int(state["learners"]["critic"]["step"]) == 1000
    assert int(state["learners"]["student"]["step"]) == 200


def test_a_checkpoint_exports_its_result(toy, trained, tmp_path):
    assert cli.main(["export", str(toy), str(tmp_path / "out"), "--", "--out", str(trained)]) == 0
    assert (tmp_path / "out" / "gaussian.json").read_bytes() == (trained / "gaussian.json").read_bytes()


def test_a_checkpoint_of_another_version_is_named(toy, trained, tmp_path, capsys):
    """A seal without a version is of the first."""
    seal = trained.with_name("result-train") / "checkpoints" / "1000" / "seal.json"
    written = json.loads(seal.read_text())
    assert written.pop("version") == VERSION
    seal.write_text(json.dumps(written))
    try:
        assert cli.main(["export", str(toy), str(tmp_path / "out"), "--", "--out", str(trained)]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert "holds checkpoints of version 1, and this program reads version 2" in said
    finally:
        seal.write_text(json.dumps(written | {"version": VERSION}))
    with Checkpoints(seal.parents[1]) as checkpoints:
        assert checkpoints.read({"step": jax.ShapeDtypeStruct((), np.int32)}) == {"step": 1000}


@pytest.mark.full
def test_killed_in_the_middle_of_a_cycle_and_resumed_is_uninterrupted_bit_for_bit(toy, tmp_path):
    options = "--steps", 80, "--checkpoint-seconds", 0
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert _alone(toy, "--out", whole, *options).returncode == 0
    assert _alone(toy, "--out", killed, *options, die_at=_DIE_AT).returncode == -signal.SIGKILL
    assert not killed.exists()
    done = _alone(toy, "--out", killed, *options)
    assert done.returncode == 0, done.stderr
    assert f"resumed from step {_DIE_AT}" in done.stderr
    one, two = (
        {jax.tree_util.keystr(path): x.tobytes() for path, x in jax.tree_util.tree_leaves_with_path(_state(out, 80))}
        for out in (whole, killed)
    )
    assert one == two
    assert {name.split("]")[0] for name in one} == {"['step'", "['learners'", "['carried'"}
    assert (whole / "gaussian.json").read_bytes() == (killed / "gaussian.json").read_bytes()


def _state(out: Path, step: int):
    """As Orbax reads it by itself."""
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(out.with_name(f"{out.name}-train") / "checkpoints" / str(step) / "default")

"""Training in two real processes of four devices each, over the loopback: killed while writing, and restarted."""

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shared.devices import environment
from shared.training import finetuning, log_of, write_teacher

from rehyat_jax.errors import ConfigError
from rehyat_jax.runtime.compilation import cache_folder, keep_compiled
from rehyat_jax.runtime.mesh_config import MeshConfig
from rehyat_jax.runtime.processes import Processes
from train.data.clips import Bucket
from train.engine.checkpoint import Checkpoints
from train.stages.finetune import FinetuneTraining

MESH = MeshConfig(data=2, fsdp=2, context=2)


def _run_of(model: Path, out: Path, **options) -> FinetuneTraining:
    return finetuning(
        model,
        out,
        mesh=MESH,
        teacher_frames=9,
        steps=8,
        steps_per_round=1,
        reuse=1,
        buckets=(Bucket(kind="plain", frames=9, batch=8),),
        **options,
    )


def train(model: str, out: str, index: int, port: int, die_at: int | None) -> None:
    """One of the two processes. It ends by SIGKILL in the middle of writing the checkpoint of step ``die_at``."""
    save = Checkpoints.save

    def save_and_die(self, step, state):
        if step == die_at:  # Orbax gives a whole checkpoint its name by renaming it
            os.rename = os.replace = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        save(self, step, state)

    Checkpoints.save = save_and_die
    processes = Processes(distributed=True, coordinator=f"127.0.0.1:{port}", count=2, index=index)
    processes.join()
    keep_compiled(cache_folder())
    _run_of(Path(model), Path(out), processes=processes).run()


def _in_two(model: Path, out: Path, *, die_at: int | None = None) -> str:
    """What the first process says. Once one of the two is dead the other is killed as well, as launchers do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for index in range(2):
        given = str(model), str(out), index, port, None if index else die_at
        program = f"import conftest, test_processes; test_processes.train(*{given!r})"
        with (out.parent / f"said-{index}").open("w") as said:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-c", program], env=environment(4), stdout=said, stderr=subprocess.STDOUT
                )
            )
    end = time.monotonic() + 300
    while any(process.poll() is None for process in started):
        if any(process.poll() for process in started) or time.monotonic() > end:
            for process in started:
                process.kill()
        time.sleep(0.1)
    texts = [(out.parent / f"said-{index}").read_text() for index in range(2)]
    first, second = (process.wait() for process in started)
    said = "\n".join(text[-3000:] for text in texts)
    assert first == (-signal.SIGKILL if die_at else 0), said
    # Whether the other is killed in time, or its runtime has already given up for want of the first.
    assert (second != 0) == bool(die_at), said
    return texts[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run without a stop; one that was killed; and what that one said when it was started again."""
    folder = tmp_path_factory.mktemp("processes")
    model = write_teacher(folder / "teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REHYAT_CACHE_DIR", str(folder / "cache"))
        _in_two(model, folder / "whole")
        _in_two(model, folder / "killed", die_at=5)
        said = _in_two(model, folder / "killed")
    return _run_of(model, folder / "whole"), _run_of(model, folder / "killed"), said


@pytest.mark.full
def test_killed_and_restarted_is_uninterrupted_bit_for_bit(runs):
    whole, killed, _ = runs
    entries = log_of(killed)
    # Logging lags: the fourth round may not be logged when the process dies, and an entry may be of two rounds.
    assert [entry["from_step"] for entry in entries] in ([0] * 4 + [4] * 3, [0] * 3 + [4] * 3)
    losses = {entry["step"]: (entry["loss"], entry["teacher"]) for entry in log_of(whole)}
    of_one = [new for old, new in itertools.pairwise(entries) if new["step"] == old["step"] + 1]
    assert len(losses) == 7
    assert of_one[-1]["step"] == 8
    for entry in of_one:
        assert (entry["loss"], entry["teacher"]) == losses[entry["step"]]
    for path in whole.out.rglob("*"):
        if path.is_file():
            assert (killed.out / path.relative_to(whole.out)).read_bytes() == path.read_bytes(), path


@pytest.mark.full
def test_a_torn_checkpoint_is_passed_over_and_said(runs):
    _, killed, said = runs
    assert re.search(r"the checkpoint \S+/5\S* was not finished: passed over and removed", said)
    assert "resumed from step 4" in said
    assert not list((killed.train_folder / "checkpoints").glob("*tmp*"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"count": 2}, "need processes.distributed"),
        ({"distributed": True, "count": 2}, "go together"),
        ({"distributed": True, "coordinator": "127.0.0.1:1", "count": 2, "index": 2}, "index must be 0 to 1, not 2"),
    ],
)
def test_processes_that_cannot_be(given, words):
    with pytest.raises(ConfigError, match=words):
        Processes(**given).join()

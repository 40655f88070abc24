"""Training killed at random moments goes on from its newest checkpoint, and ends as if nothing had been."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import pytest
from shared.kills import KILLS
from shared.toy_loop import toy_run

KILLED = f"""
import sys
sys.path[:0] = [{os.path.dirname(os.path.dirname(__file__))!r}]
from pathlib import Path
from shared.toy_loop import toy_run
toy_run(Path(sys.argv[1]), steps=1_000_000)
"""


def newest(folder: Path) -> int:
    """The last step of a whole checkpoint."""
    return max((int(seal.parent.name) for seal in (folder / "checkpoints").glob("[0-9]*/seal.json")), default=0)


@pytest.mark.full
def test_killed_at_random_moments_it_ends_as_if_nothing_had_been(tmp_path):
    """SIGKILL, many times, up to a second after the first checkpoint of a process: no step is lost that a checkpoint
    had, and metrics never go back."""
    folder, chance = tmp_path / "killed", random.Random(2)
    for _ in range(KILLS):
        before = newest(folder)
        with subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], stderr=subprocess.DEVNULL) as process:
            while newest(folder) == before and process.poll() is None:
                time.sleep(0.02)
            assert process.poll() is None
            time.sleep(chance.uniform(0, 1))
            process.send_signal(signal.SIGKILL)
        assert newest(folder) > before
    last = newest(folder) + 4
    state, _ = toy_run(folder, steps=last)
    chex.assert_trees_all_equal(state, toy_run(tmp_path / "whole", steps=last, checkpoint_seconds=60.0)[0])
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert steps[-1] == last

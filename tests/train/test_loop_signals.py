"""The loop against itself uninterrupted: signals, divergence, what a terminal shows."""

import json
import os
import signal
import threading
from io import StringIO

import chex
import jax.numpy as jnp
import pytest
from rich.console import Console
from shared.toy_loop import TOY, toy_run
from shared.training import problem

from rehyat_jax.errors import RehyatError
from train.engine.loop import Rhythm, Stopped, run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_call_continues(tmp_path, number):
    whole, _ = toy_run(tmp_path / "whole", steps=12)

    def interrupt(step: int) -> None:
        if step == 4:
            os.kill(os.getpid(), number)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped) as stop:
        toy_run(tmp_path / "cut", steps=12, hook=interrupt, checkpoint_seconds=60.0)
    assert (stop.value.signal_number, stop.value.step) == (number, 6)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    resumed, said = toy_run(tmp_path / "cut", steps=12)
    assert "resumed from step 6" in said
    chex.assert_trees_all_equal(resumed, whole)
    entries = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["from_step"]) for entry in entries] == [(6, 0), (8, 6), (10, 6), (12, 6)]
    # A run that is done is not done again.
    again, _ = toy_run(tmp_path / "cut", steps=12, hook=lambda step: pytest.fail("a step was made"))
    chex.assert_trees_all_equal(again, whole)


def test_a_second_signal_does_not_wait(tmp_path):
    def insist(_: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        toy_run(tmp_path, steps=12, hook=insist)


def test_the_loop_runs_outside_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(toy_run(tmp_path, steps=4)))
    thread.start()
    thread.join()
    assert int(results[0][0].step) == 4


def test_a_run_that_diverges_stops_and_saves_nothing_of_it(tmp_path):
    calls = []

    def advance(state, step):
        calls.append(step)
        return state._replace(step=state.step + 1), {"loss": jnp.array([1.0, jnp.nan if step == 2 else 1.0])}

    rhythm = Rhythm(steps=9, steps_per_advance=1, checkpoint_seconds=0.0)
    with pytest.raises(RehyatError, match=r"not finite at step 3.*learning rate"):
        run(TOY.init(problem()), advance, rhythm, folder=tmp_path)
    assert calls == [0, 1, 2]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]


def test_on_a_terminal_there_is_a_bar(tmp_path):
    console = Console(file=StringIO(), force_terminal=True, width=120)
    run(
        TOY.init(problem()),
        lambda state, step: (state, {"loss": jnp.ones(2)}),
        Rhythm(steps=2, steps_per_advance=1, log_seconds=0.0),
        folder=tmp_path,
        console=console,
    )
    assert "━" in console.file.getvalue()
    assert "step 2/2  loss 1" in console.file.getvalue()

"""A host that makes several streams at once: who is in a batch, what a failure costs; and its logs."""

import json
import logging
import sys
import time

import numpy as np
import pytest
from shared.numbered import Numbered

from rehyat_jax.errors import RehyatError
from rehyat_jax.serve.host import Host
from rehyat_jax.serve.logs import JsonLines
from rehyat_jax.serve.steerable import Pace
from rehyat_jax.serve.wish import Wish
from rehyat_jax.video.io import read_video


class Pairs:
    """Two streams a batch, with a note of who was advanced with whom; a stream of the prompt "bad" fails in one."""

    def __init__(self) -> None:
        self.made: list[list[int]] = []
        self.closed = False

    def batches(self, streams):
        numbers = list(range(len(streams)))
        return [numbers[i : i + 2] for i in range(0, len(numbers), 2)]

    def advance(self, streams):
        self.made.append([stream._seed for stream in streams])
        return [RehyatError("not finite") if s.prompt == "bad" else next(s) for s in streams]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def pairs():
    return Pairs()


@pytest.fixture
def host(tmp_path, pairs):
    pace = Pace(fps=16, ahead=2.0, alone=1e9)
    host = Host(lambda wish: Numbered(wish.prompt, wish.seed), together=pairs, folder=tmp_path, pace=pace)
    yield host
    host.close()
    assert pairs.closed


def until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_rows_of_a_batch_are_the_streams_and_turns_are_fair(host, pairs):
    """Three streams: two seconds ahead are eight chunks each, whoever they were made with."""
    names = [host.begin(Wish(prompt="a cat", seed=seed)).result(10) for seed in range(3)]
    lives = [host.get(name) for name in names]
    until(lambda: all(len(live.chunks) == 8 for live in lives))
    assert {len(batch) for batch in pairs.made} <= {2}
    assert host.largest_batch == 2
    until(lambda: host.chunks_made == 24)
    for seed, live in enumerate(lives):
        alone = Numbered("a cat", seed)
        want = np.concatenate([next(alone) for _ in range(8)])
        # H.264 of flat colours (enlarged eight times): three levels.
        assert np.abs(read_video(live.path)[:, ::8, ::8].astype(int) - want).max() <= 3


def test_a_row_that_fails_ends_alone_and_sentences_change_in_a_batch(host):
    names = [host.begin(Wish(prompt=prompt, seed=seed)).result(10) for seed, prompt in enumerate(["a cat", "bad"])]
    good, bad = (host.get(name) for name in names)
    until(lambda: len(good.chunks) == 8)
    if bad.failed is None:  # it was alone at first
        bad.join(position=bad.seconds)
        good.join(position=good.seconds)
    until(lambda: bad.failed == "not finite")
    viewer = good.join(position=good.seconds)
    changed = good.change_prompt("a dog")
    number = changed.result(10)
    until(lambda: len(good.chunks) > number)
    assert good.chunks[number].prompt == "a dog"
    assert good.failed is None
    viewer.close()


def test_logs_are_an_object_a_line():
    record = logging.makeLogRecord(
        {"name": "a", "levelname": "INFO", "msg": "stream %s", "args": ("x",), "stream": "1f"}
    )
    told = json.loads(JsonLines().format(record))
    assert {k: told[k] for k in ("level", "logger", "message", "stream")} == {
        "level": "info",
        "logger": "a",
        "message": "stream x",
        "stream": "1f",
    }
    try:
        raise ValueError("no\nlines")
    except ValueError:
        line = JsonLines().format(logging.makeLogRecord({"msg": "failed", "exc_info": sys.exc_info()}))
    assert "\n" not in line
    assert "no\nlines" in json.loads(line)["traceback"]

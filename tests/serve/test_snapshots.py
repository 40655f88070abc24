"""What a live stream keeps to go back to: bounded in bytes, whatever it is told, and sparse of long ago."""

import itertools

import numpy as np
from shared.numbered import Numbered

from rehyat_jax.serve.live import LiveStream
from rehyat_jax.serve.snapshots import Snapshots
from rehyat_jax.serve.steerable import Pace

SIZE = 32  # bytes of a Numbered's state


class Told(Numbered):
    """With a sentence of its own size beside the state, shared by forks until it changes, as an embedding is."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.text = np.zeros(1000, np.uint8)

    @property
    def state(self):
        return (self._own, self.text)

    @state.setter
    def state(self, value) -> None:
        (self._own,) = value

    def fork(self, *, seed: int | None = None) -> "Told":
        other = Told(self.prompt, self._seed, self._past, self.frames_done)
        other.text = self.text
        return other

    def change_prompt(self, prompt: str) -> None:
        super().change_prompt(prompt)
        self.text = np.zeros(1000, np.uint8)


def bytes_held(live: LiveStream) -> int:
    kept = [live._snapshots[number] for number in live._snapshots.up_to(1 << 30)]
    return sum({id(part): part.nbytes for stream in kept for part in stream.state}.values())


def test_sentences_count_in_the_budget(tmp_path):
    """A sentence a chunk: each snapshot holds its own. The same one all along: they share it."""
    for changes, least in ((True, 3), (False, 92)):
        live = LiveStream(Told("a"), tmp_path / f"{changes}.mp4", pace=Pace(ahead=1e9, snapshot_bytes=4_000))
        live.join()
        for number in range(100):
            if changes:
                live.change_prompt(str(number))
            live.work()
            assert bytes_held(live) <= 4_000
        assert len(live._snapshots) >= least
        live.close()


def test_old_snapshots_are_sparse_and_their_count_stays():
    kept = Snapshots(20 * SIZE, {0: Numbered("a")})
    counts = []
    for number in range(1, 1001):
        kept.put(number, Numbered("a"))
        counts.append(len(kept))
    assert set(counts[20:]) == {20}
    numbers = sorted(kept.up_to(1000))
    assert (numbers[0], numbers[-1]) == (0, 1000)
    # The way back to one is at most half of the way that it leads back.
    assert all(b - a <= max(1, (1000 - a) / 2) for a, b in itertools.pairwise(numbers))
    assert numbers[-3:] == [998, 999, 1000]
    assert kept.nearest(500) <= 500
    kept.cut(400)
    assert kept.nearest(1000) <= 400

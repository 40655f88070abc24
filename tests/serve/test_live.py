"""A live stream, with a stream of numbered frames in a model's place: what is made, gone back to, branched, paced."""

import io

import numpy as np
import pytest
from PIL import Image
from shared.numbered import Numbered

from rehyat_jax.errors import RehyatError
from rehyat_jax.serve.live import LiveStream
from rehyat_jax.serve.steerable import Pace
from rehyat_jax.video.io import read_video


@pytest.fixture
def live(tmp_path):
    stream = LiveStream(Numbered("a cat"), tmp_path / "live.mp4", pace=Pace(fps=16, ahead=1e9))
    stream.join()
    yield stream
    stream.close()


def make(live: LiveStream, chunks: int) -> None:
    while len(live.chunks) < chunks:
        live.work()


def bytes_of(live: LiveStream) -> bytes:
    return live.head + b"".join(live.fragment(i, epoch=live.epoch) for i in range(len(live.chunks)))


def test_fragments_are_the_file(live):
    make(live, 3)
    assert bytes_of(live) == live.path.read_bytes()
    assert [(c.number, c.first_frame, c.frames, c.prompt) for c in live.chunks] == [
        (0, 0, 4, "a cat"),
        (1, 4, 4, "a cat"),
        (2, 8, 4, "a cat"),
    ]
    assert live.codec.startswith("avc1.")
    assert len(read_video(live.path)) == 12


def test_a_sentence_counts_from_the_next_chunk_on(live):
    make(live, 2)
    asked = live.change_prompt("a dog")
    make(live, 3)
    assert asked.result(0) == 2
    assert [c.prompt for c in live.chunks] == ["a cat", "a cat", "a dog"]


@pytest.mark.parametrize("number", [0, 1, 3])
@pytest.mark.parametrize("snapshots", [2, 100])
def test_going_back_and_the_same_sentence_is_the_same_bytes(tmp_path, number, snapshots):
    """With every snapshot kept, and with two: then chunks between are made again."""
    live = LiveStream(Numbered("a cat"), tmp_path / "live.mp4", pace=Pace(ahead=1e9, snapshot_bytes=snapshots * 32))
    live.join()
    make(live, 2)
    live.change_prompt("a dog")
    make(live, 5)
    before, epoch = bytes_of(live), live.epoch
    live.change_prompt("a cat" if number < 2 else "a dog")
    gone = live.rewind(number)
    live.work()
    assert gone.result(0) == number
    assert live.epoch == epoch + 1
    assert live.fragment(0, epoch=epoch) is None
    make(live, 2)
    live.change_prompt("a dog")
    make(live, 5)
    assert bytes_of(live) == before
    live.close()


def test_another_sentence_from_a_chunk_on(live):
    make(live, 4)
    before = [live.fragment(i, epoch=0) for i in range(4)]
    live.change_prompt("a dog")
    live.rewind(2)
    live.work()
    make(live, 4)
    after = [live.fragment(i, epoch=1) for i in range(4)]
    assert after[:2] == before[:2]
    assert after[2:] != before[2:]
    assert [c.prompt for c in live.chunks] == ["a cat", "a cat", "a dog", "a dog"]


def test_a_branch_goes_its_own_way(live, tmp_path):
    make(live, 4)
    before = bytes_of(live)
    branched = live.branch(2, tmp_path / "other.mp4", seed=7)
    live.work()
    other = branched.result(0)
    other.join()
    make(other, 4)
    assert bytes_of(live)[: len(before)] == before
    assert [other.fragment(i, epoch=0) for i in range(2)] == [live.fragment(i, epoch=0) for i in range(2)]
    assert other.fragment(2, epoch=0) != live.fragment(2, epoch=0)
    assert len(read_video(other.path)) == 16
    other.close()


def test_no_further_ahead_than_the_pace(tmp_path):
    live = LiveStream(Numbered("a cat"), tmp_path / "live.mp4", pace=Pace(fps=16, ahead=1.0, alone=1e9))
    for _ in range(100):
        live.work()
    assert live.seconds == 1.0  # nobody watches: as much as a first viewer needs
    slow, quick = live.join(position=0.0), live.join(position=0.0)
    slow.at(0.0)
    quick.at(1.0)
    for _ in range(100):
        live.work()
    assert live.seconds == 2.0  # the furthest viewer is waited for, not the slowest
    slow.close()
    quick.close()
    assert live.viewers == 0
    live.close()


def test_mistakes_are_sentences(live):
    make(live, 1)
    gone = live.rewind(5)
    live.work()
    with pytest.raises(RehyatError, match="there is no chunk 5"):
        gone.result(0)
    live.close()
    with pytest.raises(RehyatError, match="has ended"):
        live.change_prompt("a dog").result(0)


def test_a_stream_that_fails_ends_with_its_reason(tmp_path):
    class Failing(Numbered):
        def __next__(self) -> np.ndarray:
            raise RehyatError("not finite")

    live = LiveStream(Failing("a cat"), tmp_path / "live.mp4", pace=Pace())
    live.work()
    assert live.closed
    assert live.failed == "not finite"


def test_a_stream_whose_file_cannot_be_written_ends_with_the_reason(tmp_path):
    live = LiveStream(Numbered("a cat"), tmp_path / "live.mp4", pace=Pace(ahead=1e9))
    live.join()
    make(live, 1)
    live.path.unlink()
    live.work()
    assert live.closed
    assert "it was removed meanwhile" in live.failed


def test_pictures_of_chunks_are_at_hand_or_read_from_the_file(live, monkeypatch):
    """Of the last frame: made when the chunk was, or, once others took its place, of the video (H.264: three levels of
    plain colours)."""
    make(live, 2)
    first = live.thumbnail(0)
    live._thumbnails.cut(0)
    again = live.thumbnail(0)
    pictures = [np.asarray(Image.open(io.BytesIO(png)).convert("RGB").resize((1, 1))) for png in (first, again)]
    assert np.abs(np.subtract(*(p.astype(int) for p in pictures))).max() <= 3
    with pytest.raises(RehyatError, match="no such chunk: 2"):
        live.thumbnail(2)

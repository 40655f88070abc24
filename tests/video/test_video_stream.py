"""A growing video: it plays at every moment, no frame is lost or doubled by a kill, and memory stays."""

import itertools
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from shared.kills import KILLS
from shared.numbered_frames import frames, numbers
from shared.tiers import chosen

from rehyat_jax.errors import RehyatError
from rehyat_jax.video.growing import GrowingVideo, finish_video, reopen_video, spaced_frames, whole_frames
from rehyat_jax.video.io import read_video

#: As a stream of chunks of three latent frames makes them: 9 frames, then 12 each.
CUTS = [0, 9, 21, 33, 45]


def grow(path, *, keep: int = 0, until: int = CUTS[-1], **how) -> None:
    with GrowingVideo(path, **how) as video:
        if keep:
            video.go_on(after=keep)
        for start, stop in itertools.pairwise(CUTS):
            if keep <= start and stop <= until:
                video.append(frames(start, stop))
                assert video.frames == stop


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "a.mp4"
    grow(path)
    return path


def test_every_block_is_on_the_disk_and_plays_at_once(tmp_path):
    path = tmp_path / "new" / "a.mp4"
    with GrowingVideo(path) as video:
        for start, stop in itertools.pairwise(CUTS):
            video.append(frames(start, stop))
            assert read_video(path).shape == (stop, 256, 256, 3)
            assert list(whole_frames(path))[-1] == stop
        video.append(frames(0, 0))
        assert video.frames == CUTS[-1]
    assert numbers(read_video(path)) == list(range(CUTS[-1]))


@pytest.mark.parametrize("keep", CUTS)
def test_a_video_gone_on_with_is_the_same_bytes(tmp_path, whole, keep):
    """At any fragment, whatever follows it: nothing, other fragments, or a torn one."""
    path = tmp_path / "a.mp4"
    for left in (whole.stat().st_size, whole.stat().st_size - 1):
        path.write_bytes(whole.read_bytes()[:left])
        if keep == CUTS[-1] and left < whole.stat().st_size:
            with pytest.raises(RehyatError, match=r"after 45 frames: it holds 33"):
                grow(path, keep=keep)
            continue
        grow(path, keep=keep)
        assert path.read_bytes() == whole.read_bytes()


@pytest.mark.wider
def test_cut_at_any_byte_it_plays_up_to_the_last_whole_fragment(tmp_path, whole):
    data, path = whole.read_bytes(), tmp_path / "a.mp4"
    for length in [0, 1, 700, *chosen(random.Random(0).sample(range(len(data)), 40), test=10), len(data)]:
        path.write_bytes(data[:length])
        kept = [0, *whole_frames(path)][-1]
        assert kept in CUTS
        grow(path, keep=kept)
        assert path.read_bytes() == data
    assert list(whole_frames(tmp_path / "missing.mp4")) == []


def test_a_write_that_a_kill_cuts_short_is_not_seen(tmp_path, monkeypatch):
    """At each 97th byte of a fragment: what stands in the file is what stood there before, for every reader."""
    path = tmp_path / "a.mp4"
    with GrowingVideo(path) as video:
        video.append(frames(0, 9))
        end, write = path.stat().st_size, GrowingVideo._write
        monkeypatch.setattr(GrowingVideo, "_write", lambda self, data: fragments.append(data) or write(self, data))
        fragments: list[bytes] = []
        video.append(frames(9, 21))
        order = [(8, fragments[0][8:]), (0, fragments[0][:8])]
        for made in range(0, len(fragments[0]), 97):
            os.truncate(path, end)
            with open(path, "r+b") as file:
                for start, part in order:
                    file.seek(end + start)
                    file.write(part[:made])
                    made -= len(part)
                    if made <= 0:
                        break
            assert numbers(read_video(path)) == list(range(9))
            assert list(whole_frames(path)) == [9]


def test_the_finished_video_is_an_ordinary_one_and_can_be_reopened(tmp_path, whole):
    once, again, open_, last = (tmp_path / name for name in ("once.mp4", "again.mp4", "open.mp4", "last.mp4"))
    finish_video(whole, once)
    assert b"moof" not in once.read_bytes()
    assert numbers(read_video(once)) == list(range(CUTS[-1]))
    reopen_video(once, open_)
    finish_video(open_, again)
    assert again.read_bytes() == once.read_bytes()
    grow(open_, keep=21)
    finish_video(open_, last)
    assert last.read_bytes() == once.read_bytes()


@pytest.mark.parametrize("count", [1, 2, 5, 12, 99])
def test_spaced_frames(tmp_path, whole, count):
    finish_video(whole, tmp_path / "a.mp4")
    want = np.unique(np.linspace(0, CUTS[-1] - 1, count).round())
    assert numbers(spaced_frames(tmp_path / "a.mp4", count=count, fps=16)) == want.tolist()


def test_lossless(tmp_path):
    video = np.random.default_rng(0).integers(0, 256, (5, 7, 9, 3), dtype=np.uint8)
    with GrowingVideo(tmp_path / "a.mp4", codec="rgb") as growing:
        growing.append(video[:1])
        growing.append(video[1:])
    np.testing.assert_array_equal(read_video(tmp_path / "a.mp4"), video)


KILLED = """
import sys
sys.path[:0] = [{tests!r}]
from shared.numbered_frames import frames
from rehyat_jax.video.growing import GrowingVideo, whole_frames
start = [0, *whole_frames({path!r})][-1]
with GrowingVideo({path!r}) as video:
    if start:
        video.go_on(after=start)
    print("ready", flush=True)
    for start in range(start, 60000, 6):
        video.append(frames(start, start + 6))
"""


@pytest.mark.full
def test_killed_at_random_moments_and_gone_on_with(tmp_path):
    """SIGKILL, so many times, from 0 to 0.3 s into the writing: all frames are there, once and in order."""
    path, chance = tmp_path / "a.mp4", random.Random(1)
    code = textwrap.dedent(KILLED).format(tests=os.path.dirname(os.path.dirname(__file__)), path=str(path))
    before = 0
    for _ in range(KILLS):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(chance.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
        now = [0, *whole_frames(path)][-1]
        assert now >= before
        before = now
    assert before > 6
    assert numbers(read_video(path))[:before] == list(range(before))


def append_often(video, block) -> None:
    for _ in range(99):
        video.append(block)


def test_a_full_disk_leaves_what_plays(tmp_path, small_disk):
    path = small_disk / "a.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    with GrowingVideo(path) as video:
        with pytest.raises(RehyatError, match=r"cannot write .*a\.mp4: (no space is left|the file is larger)"):
            append_often(video, noise)
        made = video.frames
    assert made >= 12
    assert list(whole_frames(path))[-1] == made
    assert len(read_video(path)) == made


def test_a_video_stays_as_it_was_until_the_first_block_of_a_new_one(tmp_path, whole):
    path = tmp_path / "a.mp4"
    path.write_bytes(whole.read_bytes())
    with GrowingVideo(path):
        pass
    assert path.read_bytes() == whole.read_bytes()
    with GrowingVideo(path) as video:
        video.append(frames(0, 9))
    assert list(whole_frames(path)) == [9]
    with GrowingVideo(tmp_path / "new.mp4"):
        assert (tmp_path / "new.mp4").exists()
    assert not (tmp_path / "new.mp4").exists()


def test_mistakes_are_sentences(tmp_path, whole):
    path = tmp_path / "a.mp4"
    with pytest.raises(RehyatError, match=r"cannot go on with .*a\.mp4 after 9 frames: it holds 0"):
        grow(path, keep=9)
    assert not path.exists()
    path.write_text("no video")
    with pytest.raises(RehyatError, match=r"after 9 frames: it holds 0"):
        grow(path, keep=9)
    path.write_bytes(whole.read_bytes())
    with pytest.raises(RehyatError, match="after 10 frames: it holds 45"):
        grow(path, keep=10)
    assert path.read_bytes() == whole.read_bytes()
    with GrowingVideo(path) as video:
        with pytest.raises(RehyatError, match="another process is writing it"):
            GrowingVideo(path)
        video.go_on(after=9)
        with pytest.raises(RehyatError, match="frames' size"):
            video.append(frames(9, 12, size=32))
    with GrowingVideo(path) as video:
        video.append(frames(0, 9))
        path.unlink()
        with pytest.raises(RehyatError, match="removed meanwhile"):
            video.append(frames(9, 12))
    (tmp_path / "file").write_text("")
    with pytest.raises(RehyatError, match="is a file, not a folder"):
        GrowingVideo(tmp_path / "file" / "a.mp4")
    for source in ("missing.mp4", "file"):
        with pytest.raises(RehyatError):
            finish_video(tmp_path / source, tmp_path / "b.mp4")
        with pytest.raises(RehyatError, match="cannot read a video"):
            spaced_frames(tmp_path / source, count=3, fps=16)
    assert not (tmp_path / "b.mp4").exists()

"""Frames written as the name says, read back by Pillow and FFmpeg."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from rehyat_jax.errors import RehyatError
from rehyat_jax.video.formats import format_of, write_raw, write_video
from rehyat_jax.video.reading import read_video

#: Frames of one colour each, which every codec keeps well.
FRAMES = np.broadcast_to(
    np.arange(10, 250, 30, dtype=np.uint8)[:, None, None, None] * np.array([1, 0, 1], np.uint8), (8, 16, 32, 3)
)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.mp4", "mp4"), ("a.WEBP", "webp"), ("b/a.gif", "gif"), ("a", "png"), ("v1.2/", "png"), ("-", "raw")],
)
def test_the_name_says_the_format(name, kind):
    assert format_of(name) == kind


@pytest.mark.parametrize(("name", "tick", "off"), [("a.webp", 1, 3), ("a.gif", 10, 0)])
def test_animations_show_the_frames_for_their_time(tmp_path, name, tick, off):
    """16 frames a second are 62.5 ms each; rounded to the format's ticks, so that all together are 0.5 s."""
    write_video(tmp_path / name, iter([FRAMES[:3], FRAMES[3:]]), quality=90)
    with Image.open(tmp_path / name) as image:
        assert image.info["loop"] == 0
        lasts, frames = [], []
        for number in range(image.n_frames):
            image.seek(number)
            frames.append(np.asarray(image.convert("RGB")))
            lasts.append(image.info["duration"])
    assert sum(lasts) == 500
    assert set(lasts) <= {tick * (62.5 // tick), tick * (62.5 // tick + 1)}
    assert np.abs(np.stack(frames).astype(int) - FRAMES).max() <= off  # WebP's own loss at quality 90, of flat colours


def test_a_folder_of_pictures(tmp_path):
    write_video(tmp_path / "a", FRAMES, scale=2)
    names = sorted(os.listdir(tmp_path / "a"))
    assert names == [f"{number:06d}.png" for number in range(8)]
    picture = np.asarray(Image.open(tmp_path / "a" / names[5]))
    np.testing.assert_array_equal(picture, FRAMES[5].repeat(2, 0).repeat(2, 1))
    with pytest.raises(RehyatError, match="not empty"):
        write_video(tmp_path / "a", FRAMES)
    assert sorted(os.listdir(tmp_path)) == ["a"]


def test_an_mp4_is_as_before(tmp_path):
    write_video(tmp_path / "a.mp4", FRAMES, codec="rgb")
    np.testing.assert_array_equal(read_video(tmp_path / "a.mp4"), FRAMES)


class Narrow(io.BytesIO):
    """Takes 100 bytes a call, as an unbuffered pipe takes what it has room for."""

    def write(self, data) -> int:
        return super().write(data[:100])


@pytest.mark.parametrize("kind", [io.BytesIO, Narrow])
def test_raw_frames_are_their_bytes(kind):
    file = kind()
    write_raw(file, FRAMES)
    assert file.getvalue() == FRAMES.tobytes()


def test_a_reader_that_ends_is_a_sentence():
    code = (
        "import numpy as np, rehyat_jax as rj\n"
        "from rehyat_jax.errors import RehyatError\n"
        "try:\n    rj.write_video('-', (np.zeros((1, 256, 256, 3), np.uint8) for _ in range(99)))\n"
        "except RehyatError as error:\n    import sys; print(error, file=sys.stderr)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read().decode().startswith("the reader of the pipe ended after ")
        assert process.wait() == 0


@pytest.mark.parametrize("name", ["a.webp", "a.gif", "a"])
def test_mistakes_are_sentences_and_leave_nothing(tmp_path, name):
    def torn():
        yield FRAMES
        raise KeyboardInterrupt

    for frames, words in (
        (FRAMES[:0], "no frames"),
        (iter([FRAMES, FRAMES[:, :8]]), "frames of"),
        (iter([FRAMES / 255]), "uint8"),
    ):
        with pytest.raises(RehyatError, match=words):
            write_video(tmp_path / name, frames)
    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / name, torn())
    with pytest.raises(RehyatError, match=r"out must end in .mp4"):
        write_video(tmp_path / "a.avi", FRAMES)
    assert os.listdir(tmp_path) == []

"""Videos on disk: what is written is read back, and what cannot be written is one sentence and no file."""

import json
import os
import resource
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shared.tiers import examples

from rehyat_jax.errors import RehyatError
from rehyat_jax.runtime import record
from rehyat_jax.runtime.compilation import cache_folder
from rehyat_jax.runtime.files import check_writable, whole_file
from rehyat_jax.video.io import contact_sheet, read_video, write_video


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(frames: int, height: int, width: int) -> np.ndarray:
    """A gradient that drifts: what 4:2:0 keeps."""
    f, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    rgb = np.stack([2 * x + f, 255 - y - f, x + y], axis=-1)
    return np.clip(rgb, 0, 255).astype(np.uint8)


@pytest.fixture
def full_disk(tmp_path):
    """A folder on a real file system of 16 KiB; where mounting is not allowed, a limit on file sizes."""
    folder = tmp_path / "full"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", folder], capture_output=True).returncode == 0:
        yield folder
        subprocess.run(["umount", folder], check=True)
        return
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, before[1]))
    yield folder
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def read_only(tmp_path):
    """A folder that nobody can write to: a read-only mount, or permissions where one is not allowed to mount."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True).returncode == 0:
        yield folder
        subprocess.run(["umount", folder], check=True)
        return
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)


@settings(max_examples=examples(6), deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 40), st.integers(1, 3))
def test_rgb_is_lossless(tmp_path_factory, frames, height, width, scale):
    path = tmp_path_factory.mktemp("rgb") / "a.mp4"
    video = noise(frames, height, width, 3)
    write_video(path, video, codec="rgb", scale=scale)
    np.testing.assert_array_equal(read_video(path)[:, ::scale, ::scale], video)


@pytest.mark.parametrize(
    ("height", "width", "shown"),
    [(64, 64, (256, 256)), (64, 96, (256, 384)), (33, 51, (264, 408)), (257, 300, (514, 600)), (256, 320, (256, 320))],
)
def test_small_frames_are_enlarged_by_a_whole_even_number(tmp_path, height, width, shown):
    write_video(tmp_path / "a.mp4", smooth(2, height, width))
    assert read_video(tmp_path / "a.mp4").shape == (2, *shown, 3)


def test_h264_for_people_keeps_the_picture(tmp_path):
    video = smooth(9, 64, 64)
    write_video(tmp_path / "a.mp4", video)
    back = read_video(tmp_path / "a.mp4")[:, 1::4, 1::4].astype(float)
    mse = np.mean((back - video) ** 2)
    # Enlarged before 4:2:0, a smooth picture keeps what the quantiser (crf 16) leaves: 38 dB is its usual floor.
    assert 10 * np.log10(255**2 / mse) > 38


def test_blocks_of_a_stream_make_the_same_file_as_the_whole(tmp_path):
    video = noise(9, 16, 24, 3)
    write_video(tmp_path / "whole.mp4", video, codec="rgb")
    write_video(tmp_path / "blocks.mp4", iter([video[:0], video[:1], video[1:5], video[5:]]), codec="rgb")
    assert (tmp_path / "whole.mp4").read_bytes() == (tmp_path / "blocks.mp4").read_bytes()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_an_interrupted_stream_leaves_the_old_file_and_no_partial(tmp_path, stop):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")

    def blocks():
        yield noise(40, 64, 64, 3)
        raise stop

    with pytest.raises(stop):
        write_video(path, blocks())
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_full_disk_is_one_sentence_and_no_file(full_disk):
    with pytest.raises(RehyatError, match=r"cannot write .*a\.mp4: (no space is left|the file is larger)"):
        write_video(full_disk / "a.mp4", noise(40, 64, 64, 3))
    with pytest.raises(RehyatError, match=r"cannot write .*a\.png: (no space is left|the file is larger)"):
        contact_sheet(full_disk / "a.png", noise(40, 64, 64, 3), output=full_disk / "a.mp4")
    assert os.listdir(full_disk) == []


def test_read_only_folder_is_one_sentence(read_only):
    for write in (lambda p: write_video(p, noise(1, 16, 16, 3)), check_writable):
        with pytest.raises(RehyatError, match=r"cannot write .*a\.mp4: (the file system is read-only|permission)"):
            write(read_only / "a.mp4")


@pytest.mark.parametrize("name", ["file/a.mp4", "folder", "x" * 300 + ".mp4", "file/b/c.mp4"])
def test_impossible_paths_are_known_before_the_work(tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RehyatError, match="cannot write"):
        check_writable(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_check_writable_leaves_nothing_and_keeps_what_is_there(tmp_path):
    (tmp_path / "a.mp4").write_text("old")
    check_writable(tmp_path / "a.mp4")
    check_writable(tmp_path / "new" / "b.mp4")
    assert (tmp_path / "a.mp4").read_text() == "old"
    assert os.listdir(tmp_path / "new") == []


def test_mistakes_are_sentences(tmp_path):
    for frames, kwargs, match in [
        (noise(0, 16, 16, 3), {}, "no frames"),
        (iter([]), {}, "no frames"),
        (noise(1, 15, 16, 3), {"scale": 1}, "even sides"),
        (noise(1, 16, 16, 3), {"scale": 0}, "at least 1"),
        (noise(1, 16, 16, 3), {"fps": 0}, "at least 1"),
        (iter([noise(1, 16, 16, 3), noise(1, 16, 32, 3)]), {}, "follow frames"),
    ]:
        with pytest.raises(RehyatError, match=match):
            write_video(tmp_path / "a.mp4", frames, **kwargs)
    (tmp_path / "text.mp4").write_text("no video")
    for name in ("missing.mp4", "text.mp4"):
        with pytest.raises(RehyatError, match=f"cannot read a video from .*{name}"):
            read_video(tmp_path / name)
    assert os.listdir(tmp_path) == ["text.mp4"]


@pytest.mark.parametrize(("count", "shape"), [(1, (128, 128)), (3, (128, 388)), (12, (388, 518)), (81, (388, 518))])
def test_contact_sheet(tmp_path, count, shape):
    video = np.broadcast_to(np.linspace(0, 250, count).astype(np.uint8)[:, None, None, None], (count, 8, 8, 3)).copy()
    contact_sheet(tmp_path / "a.png", video, output="a.mp4")
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert sheet.shape == (*shape, 3)
    assert sheet[0, 0, 0] == video[0, 0, 0, 0]
    assert sheet[-1, -1, 0] == (video[-1, 0, 0, 0] if count > 1 else 0)


def test_record_says_what_when_and_how_much(tmp_path):
    phases = record.Phases()
    for _ in range(2):
        with phases.measure("denoise"):
            block = np.ones(30_000_000, np.uint8)
    what = {"command": "rehyat generate", "settings": {"seed": 7}, "phases": phases, "output": "a.mp4"}
    record.write_record(tmp_path / "a.json", **what, frames=81)
    told = json.loads((tmp_path / "a.json").read_text())
    assert told["settings"] == {"seed": 7}
    assert told["frames"] == 81
    assert {"python", "jax", "flax", "rehyat-jax"} <= set(told["versions"])
    assert told["device"]["count"] >= 1
    denoise = told["phases"]["denoise"]
    assert denoise["milliseconds"] > 0
    assert denoise["host_peak_bytes"] > block.nbytes


def test_an_unwritable_cache_is_no_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert cache_folder(tmp_path / "file" / "cache") is None
    monkeypatch.setenv("REHYAT_CACHE_DIR", str(tmp_path / "from-env"))
    assert cache_folder() == tmp_path / "from-env"
    assert cache_folder(tmp_path / "named") == tmp_path / "named"
    monkeypatch.delenv("REHYAT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "rehyat_jax"


def test_a_whole_file_is_readable_by_others(tmp_path):
    """Its permissions are those of any new file, not a temporary file's."""
    (tmp_path / "plain").touch()
    with whole_file(tmp_path / "a") as partial:
        Path(partial).write_text("whole")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode

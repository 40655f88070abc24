"""Where a conversion goes: what can be known of the destination is known before the first byte."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
from diffusers import WanTransformer3DModel
from shared.kills import KILLS

from rehyat_jax import cli
from rehyat_jax.errors import CheckpointError
from rehyat_jax.models.checkpoints import convert, load_transformer


@pytest.fixture
def source(tmp_path):
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=8, freq_dim=8, ffn_dim=16, num_layers=1
    )
    model.save_pretrained(tmp_path / "in")
    return tmp_path / "in"


def nothing_is_written(done, total):
    raise AssertionError("written before it was known that the destination does not do")


@pytest.mark.parametrize("name", [".", "", "../here"])
def test_the_current_folder_is_refused_before_the_first_byte(name, source, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(CheckpointError, match="current folder"):
        convert(source, name, progress=nothing_is_written)
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("file", "exists and is not empty"),
        ("full", "exists and is not empty"),
        ("file/a", "a part of the path is a file"),
        ("x" * 300, "the name is too long"),
    ],
)
def test_what_no_folder_can_replace_is_refused_before_the_first_byte(name, words, source, tmp_path):
    (tmp_path / "full").mkdir()
    for file in ("file", "full/a"):
        (tmp_path / file).touch()
    with pytest.raises(CheckpointError, match=words):
        convert(source, tmp_path / name, progress=nothing_is_written)


def test_a_mount_is_refused_before_the_first_byte(source):
    mount = next(path for path in ("/proc/sys/fs/binfmt_misc", "/dev/shm", "/proc") if os.path.ismount(path))
    with pytest.raises(CheckpointError, match=r"root of a disk|not empty"):
        convert(source, mount, progress=nothing_is_written)


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_followed(exists, source, tmp_path):
    if exists:
        (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    convert(source, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    load_transformer(tmp_path / "real")
    assert not [file for file in tmp_path.iterdir() if file.name.endswith(".partial")]


def test_no_room_is_known_before_the_first_byte(source, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(Exception, match="the checkpoint needs"):
        convert(source, tmp_path / "out", progress=nothing_is_written)
    assert not (tmp_path / "out").exists()


def test_the_record_beside_replaces_nothing_of_the_users(source, tmp_path, capsys):
    (tmp_path / "out.json").write_text(json.dumps({"mine": 1}))
    assert cli.main(["convert", str(source), str(tmp_path / "out")]) == 2
    assert "out.json would be replaced" in capsys.readouterr().err
    assert json.loads((tmp_path / "out.json").read_text()) == {"mine": 1}
    assert not (tmp_path / "out").exists()
    (tmp_path / "out.json").unlink()
    assert cli.main(["convert", str(source), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["command"] == "rehyat convert"
    # Its own record it may replace.
    os.rename(tmp_path / "out", tmp_path / "away")
    assert cli.main(["convert", str(source), str(tmp_path / "out")]) == 0


def test_what_a_kill_left_is_removed_by_the_next_run(source, tmp_path, recwarn):
    left = tmp_path / ".out.0123abcd.partial"
    left.mkdir()
    (left / "big").write_bytes(bytes(1000))
    assert cli.main(["convert", str(source), str(tmp_path / "out")]) == 0
    assert not left.exists()


KILLED = """
import itertools, sys
from pathlib import Path
import rehyat_jax.models.checkpoints
from rehyat_jax import cli
source, out = map(Path, sys.argv[1:])
print("ready", flush=True)
for number in itertools.count():
    if not (out / f"{number}.json").exists():
        cli.main(["convert", str(source), str(out / str(number))])
"""


@pytest.mark.full
def test_killed_at_random_moments_a_conversion_is_whole_or_not_there(source, tmp_path):
    """SIGKILL, many times, into commands that write one folder after the other, up to twice the seconds that the first
    takes; the next process begins with the one that was cut, and takes away what was left of it."""
    out, chance = tmp_path / "out", random.Random(3)
    out.mkdir()

    def killed_after(wait: Callable[[], None]) -> None:
        command = [sys.executable, "-c", KILLED, str(source), str(out)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout.readline() == b"ready\n"
            wait()
            assert process.poll() is None
            process.send_signal(signal.SIGKILL)

    def first() -> None:
        begun = time.monotonic()
        while not (out / "0.json").exists():
            time.sleep(0.01)
        seconds.append(time.monotonic() - begun)

    seconds: list[float] = []
    killed_after(first)
    for _ in range(KILLS):
        killed_after(lambda: time.sleep(chance.uniform(0, 2 * seconds[0])))
    last = len([*out.glob("[0-9]*/")])
    # Killed between a result and its record, the same command is refused, and takes away what is left of the record.
    assert cli.main(["convert", str(source), str(out / str(last - 1))]) == 2
    assert cli.main(["convert", str(source), str(out / str(last))]) == 0
    whole = sorted((path for path in out.iterdir() if path.is_dir() and path.name.isdigit()), key=lambda x: int(x.name))
    assert [int(path.name) for path in whole] == list(range(len(whole)))
    assert len(whole) > KILLS // 10
    contents = {tuple(sorted((file.name, file.read_bytes()) for file in path.iterdir())) for path in whole}
    assert len(contents) == 1
    load_transformer(whole[0])
    # The lock of a process that was killed between its result and its end is an empty file, and nobody's.
    assert not [path for path in out.iterdir() if path.name.startswith(".") and not path.name.endswith(".lock")]

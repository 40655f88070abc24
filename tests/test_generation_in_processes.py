"""`rehyat generate` in two real processes of four devices each, over the loopback: the video, a kill, and going on."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shared.devices import environment
from shared.training import write_teacher

from rehyat_jax import cli

#: Of some thirty chunks of two latent frames: time to kill it in.
STREAM = ["--hybrid", "2+1", "--frames", "119", "--sweep", "per-chunk"]
WHOLE = ["--hybrid", "2+1", "--frames", "15", "--sweep", "per-step"]


def _command(folder: Path, out: str, *options: str) -> list[str]:
    how = ["--model", str(folder / "model"), "--cache-dir", str(folder / "cache"), "--out", str(folder / out)]
    return ["generate", "a red square", *how, *options]


def _begun(command: list[str], folder: Path) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for index in range(2):
        where = ["--processes.coordinator", f"127.0.0.1:{port}", "--processes.count", "2"]
        asked = [*command, "--mesh.automatic", "--processes.distributed", *where, "--processes.index", str(index)]
        program = f"import conftest, sys; from rehyat_jax.cli import main; sys.argv[1:] = {asked!r}; sys.exit(main())"
        with (folder / f"said-{index}").open("w") as said:
            run = [sys.executable, "-c", program]
            started.append(subprocess.Popen(run, env=environment(4), stdout=said, stderr=subprocess.STDOUT))
    return started


def _ended(processes: list[subprocess.Popen], folder: Path) -> tuple[list[int], list[str]]:
    """Exit codes, and what was said."""
    try:
        codes = [process.wait(300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return codes, [(folder / f"said-{index}").read_text() for index in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    write_teacher(folder / "model")
    return folder


@pytest.mark.full
def test_two_processes_make_the_video_of_one_device(folder):
    """By the sheet, which is made of the frames before H.264: a rounding of float32 at the edge of a pixel's level."""
    codes, said = _ended(_begun(_command(folder, "whole.mp4", *WHOLE), folder), folder)
    assert codes == [0, 0], said
    assert "whole.mp4: 15 frames" in said[0]
    assert "whole.mp4" not in said[1]
    assert cli.main(_command(folder, "one.mp4", *WHOLE)) == 0
    together, alone = (np.asarray(Image.open(folder / name)).astype(int) for name in ("whole.png", "one.png"))
    assert together.std() > 10
    assert np.abs(together - alone).max() <= 1


@pytest.mark.full
def test_a_dead_peer_ends_the_other_with_a_sentence_and_the_video_goes_on(folder):
    codes, said = _ended(_begun(_command(folder, "whole-stream.mp4", *STREAM), folder), folder)
    assert codes == [0, 0], said
    processes = _begun(_command(folder, "killed.mp4", *STREAM), folder)
    end = time.monotonic() + 300
    while not list(folder.glob("killed.mp4.state/stream.safetensors")) and time.monotonic() < end:
        time.sleep(0.02)
    processes[1].kill()
    (first, second), said = _ended(processes, folder)
    assert (first, second) == (1, -signal.SIGKILL), said
    assert "rehyat: process 1 of this run has ended before its time" in said[0]
    assert "Traceback" not in said[0]
    codes, said = _ended(_begun(_command(folder, "killed.mp4", *STREAM, "--resume"), folder), folder)
    assert codes == [0, 0], said
    assert (folder / "killed.mp4").read_bytes() == (folder / "whole-stream.mp4").read_bytes()
    assert not (folder / "killed.mp4.state").exists()


def test_what_several_processes_cannot_make_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ours = ["generate", "a koala", "--processes.distributed"]
    assert cli.main(ours) == 2
    assert "several processes need a mesh over the devices of all" in capsys.readouterr().err
    assert cli.main([*ours, "--mesh.automatic", "--steps", "auto"]) == 2
    assert "several processes make one mp4 together" in capsys.readouterr().err
    assert cli.main(["generate", "a koala", "--processes.index", "1"]) == 2
    assert "need processes.distributed" in capsys.readouterr().err

"""``rehyat serve`` as a process of its own: it drains and saves on SIGTERM, and goes on after SIGKILL, bit for bit."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack, contextmanager

import pytest
from shared.devices import environment
from websockets.sync.client import connect

from rehyat_jax import TextToVideo, cli
from rehyat_jax.sprites.verifier import detect
from rehyat_jax.sprites.world import NAMES
from rehyat_jax.video.growing import GrowingVideo
from rehyat_jax.video.io import read_video

PROMPT = "a koala moving right quickly on a red background"
HOW = {"seed": 3, "num_inference_steps": 1, "guidance_scale": 1}
#: Enough for several saved states on a slow machine.
BEFORE, AFTER = 3, 3


@contextmanager
def serving(folder, *options, devices=1):
    """The process and its address."""
    command = [sys.executable, "-m", "rehyat_jax", "serve", "--port", "0", "--folder", str(folder), "--ahead", "60"]
    # Where libtpu is installed it has words of its own for a machine without a TPU.
    how = os.environ | {"JAX_PLATFORMS": "cpu"} if devices == 1 else environment(devices)
    command = [*command, "--log", "json", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=how) as process:
        try:
            for line in process.stderr:
                if found := re.search(r"http://[^/]+", line):
                    yield process, found[0]
                    break
                json.loads(line)  # a log is an object a line
        finally:
            process.kill()


def told(address: str, path: str = "") -> dict:
    with urllib.request.urlopen(f"{address}/v1/streams{path}") as answer:
        return json.load(answer)


def watch(address: str, name: str | None, chunks: int) -> str:
    """Watch a stream, a new one if it has no name, until it has so many chunks; its name."""
    with connect(address.replace("http", "ws") + "/v1/realtime/video", max_size=None) as socket:
        message = {"type": "session.join", "id": name} if name else {"type": "session.start", "prompt": PROMPT, **HOW}
        socket.send(json.dumps(message))
        end = time.monotonic() + 300
        while time.monotonic() < end:
            heard = socket.recv(timeout=300)
            if isinstance(heard, str):
                content = json.loads(heard)
                assert content["type"] != "error", content
                name = content.get("id", name)
                if content["type"] == "video.chunk_metadata" and content["generation_chunk_index"] >= chunks - 1:
                    return name
    raise AssertionError("the stream did not grow")


@pytest.mark.full
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_ends_goes_on_bit_for_bit(tmp_path, how):
    kept, reference = tmp_path / "kept", tmp_path / "whole.mp4"
    with serving(kept) as (process, address):
        name = watch(address, None, BEFORE)
        time.sleep(1)  # into a chunk, or a state that is being saved
        process.send_signal(how)
        process.wait(60)
        assert process.returncode == (143 if how == signal.SIGTERM else -signal.SIGKILL)
    with serving(kept) as (process, address):
        there = told(address)["data"]
        assert [stream["id"] for stream in there] == [name]
        made = len(there[0]["chunks"])
        assert made >= (BEFORE if how == signal.SIGTERM else 1)
        watch(address, name, made + AFTER)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    chunks = json.loads((kept / f"{name}.json").read_text())["chunks"]
    assert len(chunks) >= made + AFTER
    stream = TextToVideo.from_pretrained("mini-sprites").open_stream(PROMPT, **HOW)
    with GrowingVideo(reference) as video:
        for _ in chunks:
            video.begin_chapter(PROMPT)
            video.append(next(stream))
    assert (kept / f"{name}.mp4").read_bytes()[: reference.stat().st_size] == reference.read_bytes()


@pytest.mark.full
def test_the_downloaded_video_is_what_generate_makes_until_the_first_event(tmp_path):
    """Frame for frame, with the bundled model's own settings; what it shows is the sentence's, by the verifier."""
    other = PROMPT.replace("koala", "lemon")
    with serving(tmp_path / "kept") as (_, address):
        with connect(address.replace("http", "ws") + "/v1/realtime/video", max_size=None) as socket:
            socket.send(json.dumps({"type": "session.start", "prompt": PROMPT, "seed": 3}))
            event = {"event_id": "e", "event": {"prompt": other}}
            chunks: list[dict] = []
            while len(chunks) < 5 or chunks[-1]["prompt"] != other:
                heard = socket.recv(timeout=300)
                if isinstance(heard, str) and json.loads(heard)["type"] == "video.chunk_metadata":
                    chunks.append(json.loads(heard))
                    if len(chunks) == 3:
                        socket.send(json.dumps({"type": "session.interaction", "interaction": event}))
        name = told(address)["data"][0]["id"]
        with urllib.request.urlopen(f"{address}/v1/streams/{name}/whole.mp4") as answer:
            (tmp_path / "whole.mp4").write_bytes(answer.read())
    count = next(chunk["first_frame"] for chunk in chunks if chunk["prompt"] == other)
    how = ["--seed", "3", "--frames", str(count), "--out", str(tmp_path / "a.mp4")]
    assert cli.main(["generate", PROMPT, *how]) == 0
    served, alone = read_video(tmp_path / "whole.mp4"), read_video(tmp_path / "a.mp4")
    assert (served[:count] == alone).all()
    seen = detect(served[None, :count, ::4, ::4])  # the file's frames are enlarged four times
    assert (seen.objects[0, :, 0] == NAMES.index("koala")).mean() > 0.9


@pytest.mark.full
def test_a_server_on_two_devices_makes_two_streams_at_once(tmp_path):
    """Each device has one of the batch's rows; what is seen is what each sentence says."""
    kept, others = tmp_path / "kept", [PROMPT, PROMPT.replace("koala", "lemon")]
    with serving(kept, "--mesh.data", "2", "--batch", "2", devices=2) as (_, address):
        with ExitStack() as stack:
            sockets = [
                stack.enter_context(connect(address.replace("http", "ws") + "/v1/realtime/video", max_size=None))
                for _ in others
            ]
            for socket, prompt in zip(sockets, others, strict=True):
                socket.send(json.dumps({"type": "session.start", "prompt": prompt, **HOW}))
            end = time.monotonic() + 300
            while time.monotonic() < end:
                with urllib.request.urlopen(f"{address}/metrics") as answer:
                    if "rehyat_batch_rows_max 2" in answer.read().decode():
                        break
                time.sleep(0.5)
            else:
                raise AssertionError("no batch of two was made")
            made = {stream["prompt"]: len(stream["chunks"]) for stream in told(address)["data"]}
        names = {stream["prompt"]: stream["id"] for stream in told(address)["data"]}
        for prompt in others:
            watch(address, names[prompt], made[prompt] + 1)
            path = tmp_path / f"{names[prompt]}.mp4"
            with urllib.request.urlopen(f"{address}/v1/streams/{names[prompt]}/whole.mp4") as answer:
                path.write_bytes(answer.read())
            seen = detect(read_video(path)[None, :, ::4, ::4])
            what = "koala" if "koala" in prompt else "lemon"
            assert (seen.objects[0, :, 0] == NAMES.index(what)).mean() > 0.9

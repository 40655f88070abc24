"""``rehyat generate --sweep per-chunk``: what it makes; that it cannot be ended so that frames are lost or doubled."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from shared import tiers
from shared.checkpoint import save_tiny_checkpoint
from shared.kills import KILLS

from rehyat_jax import cli
from rehyat_jax.cli.generate_stream import Outputs
from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.checkpoints import save_transformer
from rehyat_jax.pipeline import TextToVideo
from rehyat_jax.video.growing import GrowingVideo, whole_frames
from rehyat_jax.video.io import read_video

#: Chunks of two latent frames: 5 frames, then 8 each.
SMALL = ["--hybrid", "2+1", "--size", "16x16", "--steps", "2", "--guidance", "1"]
FILES = ["a.json", "a.mp4", "a.png"]
#: Four chunks and a part of a fifth.
SHORT = 32
#: Thirteen chunks.
LONG = 101


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_checkpoint(folder)
    return folder


@pytest.fixture
def rehyat(capsys, checkpoint):
    """Run ``rehyat generate`` in this process: (exit code, standard output, standard error)."""

    def run(out: Path, *options: object, prompt: str = "a cat", model: Path = checkpoint, how=SMALL):
        argv = ["generate", prompt, "--model", model, *how, "--out", out, *options]
        code = cli.main([str(argument) for argument in argv])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def short(checkpoint, tmp_path_factory) -> Path:
    """The video of SHORT frames that was never interrupted."""
    out = tmp_path_factory.mktemp("short") / "a.mp4"
    assert (
        cli.main(
            [
                "generate",
                "a cat",
                "--model",
                str(checkpoint),
                *SMALL,
                "--sweep",
                "per-chunk",
                "--frames",
                str(SHORT),
                "--out",
                str(out),
            ]
        )
        == 0
    )
    return out


@pytest.fixture(scope="module")
def killed(checkpoint, tmp_path_factory):
    """A folder of a run of SHORT frames that was killed after so many chunks, before the state of the last one was
    saved."""

    @functools.cache
    def kill(chunks: int) -> Path:
        folder, append, made = tmp_path_factory.mktemp("killed"), GrowingVideo.append, []
        argv = ["generate", "a cat", "--model", checkpoint, *SMALL, "--out", folder / "a.mp4", "--sweep", "per-chunk"]

        def last(self, block):
            append(self, block)
            made.append(block)
            if len(made) == chunks:
                raise Killed

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GrowingVideo, "append", last)
            patch.setattr("rehyat_jax.cli.generate_stream._PATIENCE", 0)
            with pytest.raises(Killed):
                cli.main([str(argument) for argument in (*argv, "--frames", SHORT)])
        return folder

    return kill


@pytest.fixture
def stopped(killed, capsys, tmp_path):
    """Such a run's video, in a folder of its own."""

    def stop(chunks: int) -> Path:
        shutil.copytree(killed(chunks), tmp_path, dirs_exist_ok=True)
        capsys.readouterr()
        return tmp_path / "a.mp4"

    return stop


class Killed(Exception):
    """Reaches no handler, as a kill."""


def assert_sentence(result, *words: str) -> None:
    code, output, error = result
    assert (code, output) == (2, "")
    last = error.strip().split("\n")[-1]
    assert last.startswith("rehyat: ")
    assert "Traceback" not in error
    for word in words:
        assert word in last


def test_a_stream_becomes_an_ordinary_video_with_sheet_and_record(short, checkpoint):
    """Any number of frames, those of the stream in Python; mean error of the encoder at crf 16, below 4 of 255."""
    assert sorted(os.listdir(short.parent)) == FILES
    assert b"moof" not in short.read_bytes()
    pipe = TextToVideo.from_pretrained(checkpoint, hybrid=HybridConfig(chunk_frames=2, overlap_frames=1))
    stream = pipe.open_stream("a cat", height=16, width=16, num_inference_steps=2, guidance_scale=1.0)
    want = np.concatenate([next(stream) for _ in range(5)])[:SHORT]
    video = read_video(short)
    assert video.shape == (SHORT, 256, 256, 3)
    assert np.abs(video[:, 8::16, 8::16].astype(float) - want).mean() < 4
    record = json.loads(short.with_suffix(".json").read_text())
    for key, value in {
        "sweep": "per-chunk",
        "num_frames": SHORT,
        "hybrid": "2+1",
        "prompt": "a cat",
        "seed": 0,
        "num_inference_steps": 2,
        "resumed_after": 0,
    }.items():
        assert record["settings"][key] == value
    assert set(record["phases"]) == {"load", "text", "chunks", "encode", "save", "write"}


def test_untrained_feature_maps_are_said_once(rehyat, tmp_path):
    code, output, error = rehyat(tmp_path / "a.mp4", "--frames", 6)
    assert (code, error.count("untrained")) == (0, 1)
    assert "6 frames of 16x16" in output
    assert "frames: 6/6" in error


def test_the_sweep_is_the_one_the_model_can_do(rehyat, checkpoint, tmp_path):
    """Softmax: per step. All blocks converted: per chunk, which makes the video of a per-step sweep."""
    pipe = TextToVideo.from_pretrained(checkpoint, hybrid=HybridConfig(chunk_frames=2, overlap_frames=1))
    student = shutil.copytree(checkpoint, tmp_path / "student")
    shutil.rmtree(student / "transformer")
    save_transformer(pipe.transformer, student / "transformer")
    how, videos = [*SMALL[2:], "--frames", 13], {}
    for name, model, options, sweep in [
        ("teacher", checkpoint, [], "per-step"),
        ("student", student, [], "per-chunk"),
        ("whole", student, ["--sweep", "per-step"], "per-step"),
    ]:
        out = tmp_path / f"{name}.mp4"
        code, _, error = rehyat(out, *options, model=model, how=how)
        assert code == 0, error
        assert json.loads(out.with_suffix(".json").read_text())["settings"]["sweep"] == sweep
        videos[name] = read_video(out).astype(float)
    assert np.abs(videos["whole"] - videos["student"]).mean() < 4


@pytest.mark.full
def test_what_a_stream_remembers_is_its_own(rehyat, stopped, checkpoint, tmp_path):
    """The stream of Python with the same ``remember``; a run that was begun otherwise is not gone on with."""
    out = tmp_path / "clean.mp4"
    code, _, error = rehyat(out, "--frames", 13, "--remember", 0.25)
    assert code == 0, error
    assert json.loads(out.with_suffix(".json").read_text())["settings"]["remember"] == 0.25
    pipe = TextToVideo.from_pretrained(checkpoint, hybrid=HybridConfig(chunk_frames=2, overlap_frames=1))
    how = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 1.0}
    videos = [
        np.concatenate([next(stream) for _ in range(2)])
        for stream in (pipe.open_stream("a cat", remember=each, **how) for each in (0.25, "steps"))
    ]
    assert np.abs(read_video(out)[:, 8::16, 8::16].astype(float) - videos[0]).mean() < 4
    assert (videos[0] != videos[1]).any()
    out = stopped(2)
    for option in ("0.25", "nothing", "1"):
        words = ["was begun with remember steps, not 0.25"] if option == "0.25" else ["remember must be"]
        assert_sentence(rehyat(out, "--resume", "--frames", SHORT, "--remember", option), *words)
    assert_sentence(rehyat(tmp_path / "b.mp4", "--sweep", "per-step", "--remember", "0"), "per-chunk sweep")


def test_a_model_that_cannot_stream_names_its_blocks(rehyat, tmp_path):
    for option in ("--sweep=per-chunk", "--resume"):
        result = rehyat(tmp_path / "a.mp4", option, how=SMALL[2:])
        assert_sentence(result, "cannot stream", "blocks 0-1 of 2", "softmax")
    assert os.listdir(tmp_path) == []


def test_chapters_and_settings_are_in_the_video(rehyat, stopped, tmp_path):
    """The prompts of a run that went on with another one, from frame 13 on; metadata of the first command."""
    out = stopped(3)
    assert rehyat(out, "--resume", "--frames", SHORT, prompt="a dog")[0] == 0
    with av.open(str(out)) as container:
        chapters, told = container.chapters(), container.metadata
    assert [chapter["metadata"]["title"] for chapter in chapters] == ["a cat", "a dog"]
    assert round(float(chapters[1]["start"] * chapters[1]["time_base"]) * 16) == 13
    assert told["parameters"].startswith("a cat\nSteps: 2")
    assert json.loads(told["comment"])["settings"]["width"] == 16


@pytest.mark.parametrize("chunks", [2, *map(tiers.full, (1, 4, 5))])
def test_a_run_that_ended_anywhere_is_gone_on_with(rehyat, stopped, short, chunks):
    out = stopped(chunks)
    assert len(read_video(out)) == min(5 + 8 * (chunks - 1), SHORT)
    code, _, error = rehyat(out, "--resume", "--frames", SHORT)
    assert code == 0, error
    assert out.read_bytes() == short.read_bytes()
    assert sorted(os.listdir(out.parent)) == FILES


@pytest.mark.full
def test_a_run_killed_when_the_video_is_whole_already(rehyat, short, tmp_path, monkeypatch):
    """Between the renaming of the files and the removal of the state."""
    out, forget = tmp_path / "a.mp4", Outputs.forget

    def killed(self):
        if self.video.exists() and self.video.stat().st_size:
            raise Killed
        forget(self)

    with monkeypatch.context() as patch:
        patch.setattr(Outputs, "forget", killed)
        with pytest.raises(Killed):
            rehyat(out, "--frames", SHORT)
    assert out.read_bytes() == short.read_bytes()
    code, _, error = rehyat(out, "--resume", "--frames", SHORT)
    assert code == 0, error
    assert out.read_bytes() == short.read_bytes()
    assert sorted(os.listdir(tmp_path)) == FILES


def run_alone(checkpoint: Path, out: Path, *options: str, ending: str = "none", chunk: int = 0):
    """The command in a process of its own, which at a chunk, its frames written or not, sends itself a signal."""
    script = f"""
import os, signal, sys
from rehyat_jax import cli
from rehyat_jax.cli import generate_stream
from rehyat_jax.video.growing import GrowingVideo

append, made = GrowingVideo.append, []

def counted(self, block):
    made.append(block)
    if ({ending!r}, {chunk}) == ("before", len(made)):
        os.kill(os.getpid(), signal.SIGKILL)
    append(self, block)
    if {ending!r} in ("after", "interrupt") and len(made) == {chunk}:
        os.kill(os.getpid(), signal.SIGINT if {ending!r} == "interrupt" else signal.SIGKILL)

GrowingVideo.append = counted
generate_stream._PATIENCE = 0  # a state after every chunk
sys.exit(cli.main(sys.argv[1:]))
"""
    argv = ["generate", "a cat", "--model", str(checkpoint), *SMALL, "--out", str(out), "--frames", str(LONG), *options]
    return subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True)


@pytest.mark.full
def test_signals_cost_no_frame(checkpoint, tmp_path):
    """SIGKILL in the first chunk, twice in the middle, then Ctrl-C: in the end the bytes of an undisturbed run."""
    calm, out = tmp_path / "calm" / "a.mp4", tmp_path / "a.mp4"
    undisturbed = run_alone(checkpoint, calm)
    assert undisturbed.returncode == 0, undisturbed.stderr
    killed = run_alone(checkpoint, out, ending="before", chunk=1)
    assert (killed.returncode, max(whole_frames(out), default=0)) == (-signal.SIGKILL, 0)
    for ending, chunk in (("after", 1), ("before", 4), ("after", 3), ("interrupt", 2)):
        before = max(whole_frames(out), default=0)
        ended = run_alone(checkpoint, out, "--resume", ending=ending, chunk=chunk)
        made = max(whole_frames(out), default=0)
        assert len(read_video(out)) == made > 0
        # One chunk at most is made again: the one whose state the kill did not let be saved.
        assert made >= before + 8 * (chunk - (ending == "before") - 1) - 3
        assert ended.returncode == (130 if ending == "interrupt" else -signal.SIGKILL), ended.stderr
    assert ended.stderr.strip().split("\n")[-1] == (
        f"rehyat: interrupted; {out} plays as it is, {made} frames; the same command with --resume goes on"
    )
    assert made < LONG
    rest = run_alone(checkpoint, out, "--resume")
    assert rest.returncode == 0, rest.stderr
    assert json.loads((tmp_path / "a.json").read_text())["settings"]["resumed_after"] > 20
    assert out.read_bytes() == calm.read_bytes()
    assert sorted(os.listdir(tmp_path)) == [*FILES, "calm"]


@pytest.mark.full
def test_a_full_disk_is_a_sentence_and_loses_nothing(rehyat, short, tmp_path, small_disk):
    out = small_disk / "a.mp4"
    result = rehyat(out, "--frames", 100_000)
    assert_sentence(result, "no space is left", "a.mp4 plays as it is", "--resume goes on")
    made = len(read_video(out))
    assert f"{made} frames" in result[2]
    roomy = tmp_path / "roomy"
    shutil.copytree(small_disk, roomy)
    code, _, error = rehyat(roomy / "a.mp4", "--frames", made, "--resume")
    assert code == 0, error
    # The first chunks are those of the short video.
    np.testing.assert_array_equal(read_video(roomy / "a.mp4")[:29], read_video(short)[: min(made, 29)])


def test_a_folder_that_cannot_be_written(rehyat):
    """Nobody makes files in /sys; said before the model, which is none, is looked for."""
    assert_sentence(rehyat(Path("/sys/a.mp4"), "--sweep", "per-chunk", model=Path("none")), "cannot write /sys/a.mp4")


def test_another_process_holds_the_file(rehyat, tmp_path):
    with GrowingVideo(tmp_path / "a.mp4") as video:
        video.append(np.zeros((1, 16, 16, 3), np.uint8))
        before = (tmp_path / "a.mp4").read_bytes()
        assert_sentence(rehyat(tmp_path / "a.mp4", "--frames", 6, "--overwrite"), "another process is writing it")
        assert (tmp_path / "a.mp4").read_bytes() == before


@pytest.mark.full
def test_the_rest_may_show_another_prompt(rehyat, stopped, short):
    out = stopped(3)
    code, _, error = rehyat(out, "--resume", "--frames", SHORT, prompt="a dog")
    assert code == 0, error
    assert "from frame 13 on" in error  # the state of the second chunk
    video, before = read_video(out), read_video(short)
    np.testing.assert_array_equal(video[:13], before[:13])
    assert (video[13:] != before[13:]).any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "3"], ["begun with num_inference_steps 2, not 3"]),
        (["--size", "32x16"], ["begun with width 16, not 32"]),
        (["--solver", "euler"], ["begun with solver"]),
        (["--seed", "1"], ["another seed than 1"]),
        (["--frames", "4"], ["has 5 frames already", "4"]),
        (["--hybrid", "3+1"], ["another model"]),
        (["--sweep", "per-step"], ["per-chunk"]),
    ],
)
def test_a_stream_is_gone_on_with_as_it_was_begun(rehyat, stopped, options, words):
    out = stopped(2)
    files = [out, *Outputs(video=out, sheet=out, record=out).saved()]
    before = [file.read_bytes() for file in files]
    assert_sentence(rehyat(out, "--resume", "--frames", SHORT, *options), *words)
    assert [file.read_bytes() for file in files] == before
    assert len(files) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--hybrid", "3"], ["--hybrid", "3+1"]),
        (["--hybrid", "0+1"], ["chunk_frames"]),
        (["--frames", "0"], ["frames"]),
        (["--frames", "999999999999"], ["frames"]),
        (["--size", "8x8"], ["too small"]),
        (["--steps", "0"], ["steps"]),
        (["--seed", "-1"], ["seed"]),
    ],
)
def test_a_mistake_is_one_sentence_and_no_file(rehyat, tmp_path, options, words):
    assert_sentence(rehyat(tmp_path / "a.mp4", "--frames", 6, *options), *words)
    assert os.listdir(tmp_path) == []


def test_states_that_are_none(rehyat, tmp_path):
    out, state = tmp_path / "a.mp4", tmp_path / "a.mp4.state"
    out.write_bytes(b"mine")
    assert_sentence(rehyat(out, "--resume"), "cannot be gone on with", "a.mp4.state", "missing")
    state.write_bytes(b"")
    for options in ([], ["--resume"]):
        assert_sentence(rehyat(out, *options), "a.mp4.state", "is a file, not a folder")
    state.unlink()
    state.mkdir()
    (state / "stream.safetensors").write_bytes(b"torn")
    assert_sentence(rehyat(out, "--resume"), "damaged")
    assert out.read_bytes() == b"mine"
    assert_sentence(rehyat(out, "--frames", 6), "exists already", "--overwrite", "--resume goes on with it")
    code, _, error = rehyat(out, "--frames", 6, "--overwrite")
    assert code == 0, error
    assert sorted(os.listdir(tmp_path)) == FILES


#: Runs that make one video after the other, each gone on with where it was left: a line asks for a process, another
#: tells how it ended. What does not change from process to process is imported once, and in a process read once.
KILLED = f"""
import functools, itertools, os, sys
from pathlib import Path
import rehyat_jax.streams.stream, rehyat_jax.video.growing, rehyat_jax.video.io
from rehyat_jax import cli
from rehyat_jax.cli import generate_stream
from rehyat_jax.pipeline import TextToVideo

read = TextToVideo.from_pretrained
kept = functools.lru_cache(None)(lambda how: read(model, **dict(how)))
TextToVideo.from_pretrained = lambda _, **how: kept(tuple((k, v) for k, v in how.items() if v))
generate_stream._PATIENCE = 0  # a state after every chunk
model, out = map(Path, sys.argv[1:])
for _ in sys.stdin:
    process = os.fork()
    if not process:
        os.dup2(2, 1)
        for video in (out / f"{{number}}.mp4" for number in itertools.count()):
            if not video.with_suffix(".json").exists() or video.with_suffix(".mp4.state").exists():
                what = ["a cat", "--model", model, *{SMALL!r}, "--out", video, "--frames", {LONG}]
                code = cli.main(["generate", "--resume", *map(str, what)])
                if code and video.with_suffix(".mp4.state").exists():  # else it was whole, its state all but forgotten
                    os._exit(code)
    print(process, flush=True)
    print(os.waitpid(process, 0)[1], flush=True)
"""
#: Every program is kept on disk, so that a process soon makes its first chunk.
KEEPING = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}


@pytest.mark.full
def test_killed_at_random_moments_it_loses_no_more_than_a_chunk(checkpoint, tmp_path):
    """SIGKILL, many times, up to 1.2 times the seconds in which an undisturbed process has its first video: of what a
    video had, at most the chunk in progress is made again; in the end each has the bytes of the undisturbed one, and
    nothing else is left."""
    chance, had = random.Random(4), {}
    command = [sys.executable, "-c", KILLED, str(checkpoint), str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=os.environ | KEEPING
    ) as parent:

        def killed_after(wait: Callable[[], None]) -> None:
            parent.stdin.write("\n")
            process = int(parent.stdout.readline())
            wait()
            os.kill(process, signal.SIGKILL)
            assert int(parent.stdout.readline()) == signal.SIGKILL

        def made(number: int) -> None:
            while not (tmp_path / f"{number + 1}.mp4").exists():
                time.sleep(0.01)

        killed_after(lambda: made(0))  # compiles
        begun = time.monotonic()
        killed_after(lambda: made(1))
        once = time.monotonic() - begun
        for _ in range(KILLS):
            killed_after(lambda: time.sleep(chance.uniform(0, 1.2 * once)))
            for video in tmp_path.glob("[0-9]*.mp4"):
                finished = video.with_suffix(".json").exists()
                frames = LONG if finished else max(whole_frames(video), default=0)
                assert frames >= had.get(video, 0) - 8
                had[video] = frames
        parent.stdin.close()
    assert len(had) > KILLS // 10
    last = tmp_path / f"{len(had) - 1}.mp4"
    assert last in had
    rest = run_alone(checkpoint, last, "--resume")
    assert rest.returncode == 0 or "state, which a video leaves until it is finished, is missing" in rest.stderr
    assert len({video.read_bytes() for video in had}) == 1
    # The lock of a process that was killed between its result and its end is an empty file, and nobody's.
    left = {name for name in os.listdir(tmp_path) if not (name.startswith(".") and name.endswith(".lock"))}
    assert left == {f"{number}.{kind}" for number in range(len(had)) for kind in ("json", "mp4", "png")}

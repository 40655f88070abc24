"""``rehyat generate``: sentences by second, clips and pictures to go on from, batches, other files than an mp4."""

import json
import os
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from shared.checkpoint import save_tiny_checkpoint

from rehyat_jax import TextToVideo, Timeline, cli, read_video, write_video
from rehyat_jax.mixers.config import HybridConfig

#: Chunks of two latent frames: 5 frames, then 8 each.
SMALL = ["--hybrid", "2+1", "--size", "16x16", "--steps", "2", "--guidance", "1", "--frames", "13"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_checkpoint(folder)
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("REHYAT_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def rehyat(capfdbinary, checkpoint):
    """Run ``rehyat generate`` in this process: (exit code, standard output as bytes, standard error)."""

    def run(*argv: object, model: object = checkpoint):
        code = cli.main([str(each) for each in ["generate", *SMALL, "--model", model, *argv]])
        output, error = capfdbinary.readouterr()
        return code, output, error.decode()

    return run


@pytest.fixture(scope="module")
def frames(checkpoint, tmp_path_factory) -> np.ndarray:
    """The frames of the timeline below, by Python."""
    pipe = TextToVideo.from_pretrained(
        checkpoint,
        hybrid=HybridConfig(chunk_frames=2, overlap_frames=1),
        cache_dir=tmp_path_factory.getbasetemp() / "cache",
    )
    stream = pipe.open_stream("a cat", height=16, width=16, num_inference_steps=2, guidance_scale=1)
    blocks = Timeline({0: "a cat", 0.2: "a dog"}).follow(stream, fps=pipe.fps)
    return np.concatenate([next(blocks), next(blocks)])


@pytest.fixture
def timeline(tmp_path) -> Path:
    path = tmp_path / "t.toml"
    path.write_text('0 = "a cat"\n0.2 = "a dog"\n')
    return path


def test_a_timeline_is_followed_and_its_sentences_are_chapters(rehyat, timeline, tmp_path):
    code, _, error = rehyat("--timeline", timeline, "--out", tmp_path / "a.mp4")
    assert code == 0, error
    with av.open(str(tmp_path / "a.mp4")) as video:
        chapters = [(round(c["start"] * c["time_base"] * 16), c["metadata"]["title"]) for c in video.chapters()]
        told = json.loads(video.metadata["comment"])
    assert chapters == [(0, "a cat"), (5, "a dog")]
    assert told["settings"]["timeline"] == {"0.0": "a cat", "0.2": "a dog"}


def test_raw_frames_go_through_a_pipe_and_words_beside_it(rehyat, timeline, frames, tmp_path):
    code, output, error = rehyat("--timeline", timeline, "--out", "-")
    assert code == 0, error
    assert output == frames.tobytes()
    assert "13 frames of 16x16" in error
    assert os.listdir(tmp_path) == ["t.toml"]


@pytest.mark.parametrize("name", ["a.webp", "a.gif", "a"])
def test_other_files_have_the_same_frames_and_a_record(rehyat, timeline, frames, tmp_path, name):
    code, output, error = rehyat("--timeline", timeline, "--out", tmp_path / name)
    assert code == 0, error
    assert b"13 frames of 16x16" in output
    assert json.loads((tmp_path / "a.json").read_text())["made_for"] == name
    again = rehyat("--timeline", timeline, "--out", tmp_path / name)
    assert again[0] == 2
    assert "exists" in again[2]
    if name == "a":
        shown = np.stack([np.asarray(Image.open(tmp_path / "a" / f"{number:06d}.png")) for number in range(13)])
        np.testing.assert_array_equal(shown, frames)
    else:
        with Image.open(tmp_path / name) as image:
            assert image.size == (16, 16)


@pytest.mark.full
def test_a_clip_and_a_picture_are_gone_on_from(rehyat, frames, tmp_path):
    write_video(tmp_path / "clip.mp4", frames[:5], codec="rgb")
    code, output, error = rehyat("a dog", "--from", tmp_path / "clip.mp4", "--out", "-")
    assert code == 0, error
    assert len(output) == frames.nbytes  # of the 13 frames the clip's are 5
    Image.fromarray(frames[0]).save(tmp_path / "a.png")
    code, output, error = rehyat("a dog", "--image", tmp_path / "a.png", "--out", "-")
    assert code == 0, error
    assert len(output) == frames.nbytes
    result = rehyat("a dog", "--from", tmp_path / "clip.mp4", "--frames", "5", "--out", "-")
    assert result[0] == 2
    assert "--frames must be more, not 5" in result[2]


def test_a_batch_is_named_as_vbench_reads_it_and_goes_on(rehyat, tmp_path):
    prompts, folder = tmp_path / "prompts.txt", tmp_path / "videos"
    prompts.write_text("a cat\n\na dog, running\n")
    batch = ["--prompts", prompts, "--count", 2, "--out", folder]
    code, output, error = rehyat(*batch)
    assert code == 0, error
    names = [f"{prompt}-{number}.mp4" for prompt in ("a cat", "a dog, running") for number in (0, 1)]
    assert sorted(os.listdir(folder)) == names
    assert b"4 videos, 4 of them made now" in output
    before = {name: (folder / name).read_bytes() for name in names}
    assert before["a cat-0.mp4"] != before["a cat-1.mp4"]  # the noise of seeds 0 and 1
    (folder / names[1]).unlink()
    (folder / f".{names[1]}.0123abcd.partial").write_bytes(b"what a kill left")
    code, output, error = rehyat(*batch)
    assert (code, b"4 videos, 1 of them made now" in output) == (0, True)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before
    result = rehyat(*batch, "--seed", 5)
    assert result[0] == 2
    assert "a cat-0.mp4 was made with another seed" in result[2]
    write_video(folder / names[0], read_video(folder / names[1]))
    result = rehyat(*batch, model="none")  # known before the model is looked for
    assert "a cat-0.mp4 is there, and was not made by rehyat" in result[2]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "give one of PROMPT, --timeline and --prompts, not none"),
        (["a cat", "--timeline", "t.toml"], "not PROMPT and --timeline"),
        (["--timeline", "bad.toml"], "bad.toml, line 2: seconds rise"),
        (["--timeline", "no.toml"], "no.toml: it does not exist"),
        (["--timeline", "t.toml", "--sweep", "per-step"], "--timeline is of a per-chunk sweep"),
        (["a cat", "--from", "no.mp4"], "--from: there is no file no.mp4"),
        (["a cat", "--from", "t.toml", "--image", "t.toml"], "not from both"),
        (["a cat", "--count", "2"], "--count is of --prompts"),
        (["--prompts", "p.txt"], "--out is a folder with --prompts"),
        (["--prompts", "p.txt", "--out", "v"], "p.txt, line 2: a prompt that is a file's name has no /"),
        (["--prompts", "twice.txt", "--out", "v"], "twice.txt, line 3: the same prompt stands in line 1"),
        (["--prompts", "long.txt", "--out", "v"], "long.txt, line 1: the prompt is too long"),
        (["--prompts", "p.txt", "--out", "v", "--resume"], "has no --resume"),
        (["a cat", "--out", "a.webp", "--resume"], "--resume goes on with an mp4"),
        (["a cat", "--out", "full"], "it exists and is not empty"),
        (["a cat", "--steps", "few"], "--steps must be a whole number above 0 or auto"),
    ],
)
def test_mistakes_are_known_before_the_model_is_looked_for(rehyat, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.toml").write_text('0 = "a"\n')
    (tmp_path / "bad.toml").write_text('0 = "a"\n0 = "b"\n')
    (tmp_path / "p.txt").write_text("a cat\ncats/dogs\n")
    (tmp_path / "twice.txt").write_text("a cat\n\na cat\n")
    (tmp_path / "long.txt").write_text("a" * 300)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "users").write_text("")
    there = sorted(os.listdir(tmp_path))
    code, output, error = rehyat(*argv, model="none")
    assert (code, output) == (2, b"")
    assert words in error.strip().split("\n")[-1]
    assert sorted(os.listdir(tmp_path)) == there

"""Videos with captions into shards, and training that reads them: exact numbers, kills, bad folders."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared.training import finetuning, log_of, write_teacher

from rehyat_jax import cli
from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.checkpoints import load_text_encoder, load_transformer, load_vae, save_vae
from rehyat_jax.sampling import Euler, FlowSchedule, Guidance
from rehyat_jax.text.tokenizer import Tokenizer, embed_prompts
from rehyat_jax.video.io import write_video
from train.data.clips import Bucket
from train.data.footage import find_footage
from train.data.frames import clips
from train.data.prepared import Prepared, PreparedClips
from train.data.records import shards_of
from train.data.sources import PreparedInputs, Source, prepared_sources
from train.data.trajectories import Sampling
from train.engine.optimizer import OptimizerConfig
from train.stages.distill import DistillTraining
from train.stages.flow import Validation

CAPTIONS = ("a lemon moving down", "a mushroom on a blue background", "a koala", "a red lemon moving up", "a lemon")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("model"))


def _pixels(frames: int, *, seed: int, height: int = 32, width: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), np.uint8)


def _write(path: Path, video: np.ndarray, caption: str, *, fps: int = 16) -> None:
    write_video(path, video, fps=fps, codec="rgb")
    path.with_suffix(".txt").write_text(caption + "\n")


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Five videos; the second has two clips of five frames and a rest."""
    folder = tmp_path_factory.mktemp("videos")
    for number, caption in enumerate(CAPTIONS):
        _write(folder / f"{number}.mp4", _pixels(12 if number == 1 else 5, seed=number), caption)
    return folder


def _prepare_alone(videos: Path, out: Path, model: Path, *more: str, die_after: int = 0) -> subprocess.CompletedProcess:
    """The command in a process of its own, killed by SIGKILL inside the shard after so many whole ones."""
    argv = ["prepare", str(videos), str(out), "--model", str(model), "--dtype", "float32", "--videos-per-shard", "2"]
    script = f"""
import os, signal, sys
sys.path[:0] = {[str(Path(__file__).parents[1]), str(Path(__file__).parent)]!r}
import conftest, jax
import train.data.encoders
from rehyat_jax import cli
from train.data.records import Shard

describe, count = Shard.describe, 0
encode = train.data.encoders.VideoEncoder.__call__

def counting(self, folder):
    global count
    describe(self, folder)
    count += self.file.name.startswith("clips")

def dying(self, video):
    for latents in encode(self, video):
        if {die_after} and count == {die_after}:
            os.kill(os.getpid(), signal.SIGKILL)
        yield latents

Shard.describe, train.data.encoders.VideoEncoder.__call__ = counting, dying
sys.exit(cli.main({[*argv, *more]!r}))
"""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


@pytest.fixture(scope="module")
def data(videos, model, tmp_path_factory) -> Path:
    """Three shards of clips and three of captions, made without a stop."""
    out = tmp_path_factory.mktemp("data") / "clips"
    done = _prepare_alone(videos, out, model)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out)
    return out


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_records_are_what_the_models_own_networks_make(data, model):
    prepared = Prepared.open(data)
    assert [(video.shard, video.first, video.clips) for video in prepared.videos] == [
        *[(1, 0, 1), (1, 1, 2)],  # shard 0 has the empty prompt and the first caption
        *[(3, 0, 1), (3, 1, 1), (5, 0, 1)],
    ]
    assert (prepared.plan.latents, prepared.tokens, prepared.plan.text) == ((3, 16, 16, 4), 7, 16)
    vae, encoder, tokenizer = load_vae(model), load_text_encoder(model), Tokenizer.from_folder(model)
    cut = [(0, 0), (1, 0), (1, 5), (2, 0), (3, 0), (4, 0)]
    source = prepared.clips()
    assert len(source) == len(prepared) == 6
    for index, (number, first) in enumerate(cut):
        record = source[index]
        video = jnp.asarray(_pixels(12 if number == 1 else 5, seed=number)[None, first : first + 5], jnp.float32)
        expected = vae.normalize(vae.encode(video / 127.5 - 1.0))[0]
        # Float32, of order one; the programs are other ones.
        np.testing.assert_allclose(record["latents"], expected, atol=1e-4)
        text = embed_prompts(encoder, tokenizer, CAPTIONS[number], max_length=7)[0]
        np.testing.assert_allclose(record["text"], text, atol=1e-5)
    # One for </s>, in every shard of captions; the longest is what all are padded to.
    texts = [held.tokens for shard in shards_of(data, "texts") for held in shard.held.values()]
    assert (min(texts), max(texts)) == (1, 7)
    assert prepared.empty_text().shape == (1, 7, 16)
    assert not prepared.empty_text()[0, 1:].any()
    record = json.loads(data.with_name("clips.json").read_text())
    assert (record["command"], record["clips"]) == ("rehyat prepare", 6)


@pytest.mark.full
def test_killed_in_a_shard_and_continued_is_uninterrupted(data, videos, model, tmp_path):
    out = tmp_path / "clips"
    killed = _prepare_alone(videos, out, model, die_after=2)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert any(name.endswith(".partial") for name in os.listdir(out))
    with pytest.raises(ConfigError, match="is not finished: the same rehyat prepare continues it"):
        Prepared.open(out)
    before = {name: (out / name).stat().st_mtime_ns for name in os.listdir(out) if name.endswith(".array_record")}
    first, second = (Prepared.open(data).shards[place].name for place in (1, 3))
    assert {name for name in before if name.startswith("clips")} == {first, second}
    # One of the two was damaged since: it is made again, the other is not.
    damaged = out / second
    damaged.write_bytes(damaged.read_bytes()[:-1])
    resumed = _prepare_alone(videos, out, model)
    assert resumed.returncode == 0, resumed.stderr
    assert _files(out) == _files(data)
    assert (out / first).stat().st_mtime_ns == before[first]


@pytest.mark.full
def test_parts_make_the_whole(data, videos, model, tmp_path):
    out = tmp_path / "clips"
    first = _prepare_alone(videos, out, model, "--part", "1/2")
    assert first.returncode == 0, first.stderr
    with pytest.raises(ConfigError, match="not finished"):
        Prepared.open(out)
    assert _prepare_alone(videos, out, model, "--part", "2/2").returncode == 0
    assert _files(out) == _files(data)


def test_frames_are_taken_at_the_models_rate_and_fitted(tmp_path):
    video = _pixels(20, seed=0)
    for fps, expected in [(32, video[::2]), (16, video), (8, np.repeat(video, 2, axis=0))]:
        _write(tmp_path / "a.mp4", video, "a", fps=fps)
        (found,) = find_footage(tmp_path).footage
        taken = np.concatenate(list(clips(found.path, frames=5, fps=16, height=32, width=32)))
        np.testing.assert_array_equal(taken, expected[: len(taken)])
        assert len(taken) == len(expected) // 5 * 5
    # Twice as wide and scaled by half: columns from a quarter to three quarters of the width.
    wide = np.zeros((5, 64, 128, 3), np.uint8)
    wide[:, :, 32:96] = 200
    _write(tmp_path / "a.mp4", wide, "a")
    (clip,) = clips(tmp_path / "a.mp4", frames=5, fps=16, height=32, width=32)
    assert clip.shape == (5, 32, 32, 3)
    assert (clip[:, :, 2:-2] == 200).all()


def test_captions_of_a_list(tmp_path):
    (tmp_path / "in").mkdir()
    write_video(tmp_path / "in" / "a.mp4", _pixels(5, seed=0), codec="rgb")
    listed = tmp_path / "metadata.jsonl"
    listed.write_text('{"file_name": "in/a.mp4", "caption": " a lemon "}\n')
    assert [video[:3] for video in find_footage(tmp_path).footage] == [
        (tmp_path / "in" / "a.mp4", "a lemon", "in/a.mp4")
    ]
    for line, words in [
        ('{"file_name": "b.mp4", "caption": "a"}', "line 1 of .* names b.mp4, which is not there"),
        ('{"file_name": "in/a.mp4", "caption": ""}', "line 1 of .* has no caption for in/a.mp4"),
        ('{"file_name": "in/a.mp4", "caption": 5}', 'line 1 of .* is not {"file_name"'),
        ("no", "line 1 of .* is not"),
    ]:
        listed.write_text(line)
        (unusable,) = find_footage(tmp_path).unusable
        assert re.search(words, unusable.reason)
    listed.write_text('{"file_name": "in/a.mp4"}')
    with pytest.raises(ConfigError, match=r"has no column 'caption' .it has file_name.: name its columns by"):
        find_footage(tmp_path)


def test_what_is_wrong_with_videos_is_one_sentence(data, videos, model, tmp_path, capsys):
    def said(*argv: object) -> str:
        assert cli.main(["prepare", *map(str, argv), "--model", str(model)]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("rehyat: ")
        assert "\n" not in error
        return error

    folder, out = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    assert "has no videos" in said(folder, out)
    assert "there is no folder" in said(tmp_path / "nowhere", out)
    write_video(folder / "a.mp4", _pixels(5, seed=0), codec="rgb")
    assert "a.mp4 has no caption: there is no a.txt beside it" in said(folder, out)
    (folder / "a.txt").write_text("\n")
    assert "a.mp4 has no caption: a.txt is empty" in said(folder, out)
    (folder / "a.txt").write_text("a lemon")
    assert "6 frames are not 2k + 1" in said(folder, out, "--frames", 6)
    assert "a side of 24 is no multiple of 16" in said(folder, out, "--size", "32x24")
    assert "--size must be" in said(folder, out, "--size", "32")
    assert "--part 3/2 is no part" in said(folder, out, "--part", "3/2")
    assert not out.exists()
    assert "a.mp4 is too short: 5 frames at 16 a second, and 9 are needed" in said(folder, out, "--frames", 9)
    (folder / "a.mp4").write_bytes(b"no video")
    assert f"cannot read a video from {folder / 'a.mp4'}" in said(folder, tmp_path / "other")
    same = "--dtype", "float32", "--videos-per-shard", "2"
    assert "made with frames 5 instead of 3" in said(videos, data, *same, "--frames", 3)
    assert "is not empty and was not made by rehyat prepare" in said(folder, videos)


def _tuned(model: Path, data: Path, out: Path, **options):
    """Prepared clips and drawn ones in turn, of one length."""
    return finetuning(
        model,
        out,
        **{
            "teacher": None,
            "teacher_weight": 0.0,
            "steps": 32,
            "reuse": 2,
            "buckets": (PreparedClips(folder=data, frames=5, batch=4), Bucket(kind="plain", frames=5, batch=8)),
        }
        | options,
    )


def _tune_alone(model: Path, data: Path, out: Path, *, die_at: int | None = None) -> subprocess.CompletedProcess:
    """A finetuning in a process of its own, killed as soon as the checkpoint of step ``die_at`` is written."""
    script = f"""
import os, signal, sys
sys.path[:0] = {[str(Path(__file__).parents[1]), str(Path(__file__).parent)]!r}
from pathlib import Path
import conftest, jax, test_prepare
from rehyat_jax.runtime.compilation import cache_folder, keep_compiled
from train.engine.checkpoint import Checkpoints

save = Checkpoints.save

def save_and_die(self, step, state):
    save(self, step, state)
    if step == {die_at}:
        os.kill(os.getpid(), signal.SIGKILL)

Checkpoints.save = save_and_die
keep_compiled(cache_folder())
test_prepare._tuned(Path({str(model)!r}), Path({str(data)!r}), Path({str(out)!r})).run()
"""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


@pytest.mark.full
def test_finetuning_on_prepared_clips_resumes_exactly(model, data, tmp_path):
    whole, cut = (_tuned(model, data, tmp_path / name) for name in ("whole", "cut"))
    done = _tune_alone(model, data, whole.out)
    assert done.returncode == 0, done.stderr
    killed = _tune_alone(model, data, cut.out, die_at=16)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert _tune_alone(model, data, cut.out).returncode == 0
    assert [entry["from_step"] for entry in log_of(cut)] == [0, 0, 16, 16]
    assert [entry["loss"] for entry in log_of(cut)] == [entry["loss"] for entry in log_of(whole)]
    for path in (whole.out / "transformer").rglob("*.safetensors"):
        assert (cut.out / path.relative_to(whole.out)).read_bytes() == path.read_bytes()
    before, after = (load_transformer(folder) for folder in (model, whole.out))
    assert float(jnp.abs(before.proj_out.kernel[...] - after.proj_out.kernel[...]).max()) > 0


def test_what_is_wrong_with_a_prepared_folder_is_one_sentence(model, data, tmp_path):
    def said(folder: Path, error: type = ConfigError, **options: object) -> str:
        with pytest.raises(error) as raised:
            _tuned(model, folder, tmp_path / "out", **options).run()
        assert "\n" not in str(raised.value)
        return str(raised.value)

    nine = (PreparedClips(folder=data, frames=9, batch=4),)
    assert "has clips of 5 frames, and the bucket says 9" in said(data, buckets=nine)
    assert "is no folder that rehyat prepare made" in said(tmp_path)
    validation = Validation(every=8, clips=6)
    assert "6 clips, of which 6 are held out: none are left" in said(data, validation=validation)
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    whole = Prepared.open(copy)
    shard = copy / whole.shards[3].name
    content = bytearray(shard.read_bytes())
    content[200] ^= 1
    shard.write_bytes(content)
    assert f"{shard} is missing or damaged: the same rehyat prepare makes it again" in said(copy)
    # Damage that no sample saw, in a large file, is met when the record is read.
    records = dataclasses.replace(whole, videos=whole.videos[2:4])
    for damage in (range(5000, 5010), range(len(content) - 9, len(content))):  # in a record, at the end of the file
        torn = bytearray(content)
        for place in damage:
            torn[place] ^= 255
        shard.write_bytes(torn)
        with pytest.raises(RehyatError, match=f"{shard} is damaged: remove it, and the same"):
            [records.clips()[index] for index in range(2)]
    shutil.copytree(model, tmp_path / "other")
    vae = load_vae(model)
    vae.quant_conv.bias.set_value(vae.quant_conv.bias.get_value() + 1)
    shutil.rmtree(tmp_path / "other" / "vae")
    save_vae(vae, tmp_path / "other" / "vae")
    with pytest.raises(ConfigError, match="was prepared with another VAE than that of"):
        _tuned(tmp_path / "other", data, tmp_path / "out").run()
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_distillation_reads_prepared_clips(model, data, tmp_path):
    training = DistillTraining(
        out=tmp_path / "student",
        teacher=model,
        hybrid=HybridConfig(chunk_frames=1, overlap_frames=1),
        sources=(Source(prepared=data, frames=5, height=32, width=32, batch=4),),
        num_inference_steps=2,
        guidance_scale=1.0,
        steps=4,
        held_out=2,
        measure_rounds=0,
        dtype="float32",
        checkpoint_seconds=0.0,
        optimizer=OptimizerConfig(learning_rate=5e-2, warmup_steps=4, weight_decay=0.0),
    )
    training.run()
    assert [entry["step"] for entry in log_of(training)] == [1, 2, 3, 4]
    assert load_transformer(training.out).hybrid == training.hybrid
    # The clips that are not held out, each with its text and at a level of noise of its own.
    sampling = Sampling(
        schedules=(FlowSchedule(shift=3.0),), solver=Euler(), grid_steps=2, guidance=Guidance(scale=1.0)
    )
    prepared = prepared_sources(training.sources, model, held_out=2)[data]
    inputs = PreparedInputs(
        training.sources[0],
        prepared,
        sampling=sampling,
        dtype=jnp.dtype("float32"),
        key=jax.random.key(0),
        seed=0,
    )
    _, points = jax.jit(inputs.points)(None, inputs.host_batch(0), inputs.frozen, None)
    rest = [record["text"] for record in prepared.clips(held_out=False)]
    assert len(rest) + sum(video.clips for video in prepared.videos if video.content in prepared.held_out) == 6
    assert points.text.shape == (4, 7, 16)
    assert {row.tobytes() for row in np.asarray(points.text)} == {row.tobytes() for row in rest}
    levels = np.asarray(points.timesteps) / 1000
    # One in each quarter, before the shift of 3 is taken back.
    assert np.floor(4 * levels / (3 - 2 * levels)).tolist() == [0, 1, 2, 3]
    small = dataclasses.replace(training.sources[0], width=64)
    with pytest.raises(ConfigError, match="has clips of 32x32, and the source says 64x32"):
        dataclasses.replace(training, out=tmp_path / "other", sources=(small,)).run()

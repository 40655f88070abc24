"""A source that changes: each content is encoded once, bad videos are passed over, whole videos are held out."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from shared.kills import KILLS
from shared.training import write_teacher

from rehyat_jax import cli
from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.models.checkpoints import load_vae, save_vae
from rehyat_jax.runtime.outputs import locked
from rehyat_jax.video.io import write_video
from train.data import encoders, encoding, records
from train.data.prepared import Prepared, PreparedFeed, Video, hold_out
from train.data.records import Reader, pack, write_shard


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("model"))


def _video(path: Path, caption: str, *, seed: int, frames: int = 5) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, 32, 32, 3), np.uint8)
    write_video(path, pixels, codec="rgb")
    path.with_suffix(".txt").write_text(caption)


@pytest.fixture
def source(tmp_path) -> Path:
    for number in range(4):
        _video(tmp_path / "videos" / f"{number}.mp4", f"a lemon {number}", seed=number, frames=11 if number == 1 else 5)
    return tmp_path / "videos"


@pytest.fixture
def counted(monkeypatch) -> dict[str, list[str]]:
    """Names of the videos that were checked and encoded, and captions."""
    seen: dict[str, list[str]] = {"checked": [], "encoded": [], "captions": []}
    check, encode = encoding.count_clips, encoders.VideoEncoder.__call__
    embed = encoders.TextEncoder.__call__

    def checking(path, **more):
        seen["checked"].append(path.name)
        return check(path, **more)

    def encoding_video(self, video):
        seen["encoded"].append(video.name)
        return encode(self, video)

    def embedding(self, caption):
        seen["captions"].append(caption)
        return embed(self, caption)

    monkeypatch.setattr(encoding, "count_clips", checking)
    monkeypatch.setattr(encoders.VideoEncoder, "__call__", encoding_video)
    monkeypatch.setattr(encoders.TextEncoder, "__call__", embedding)
    return seen


@pytest.fixture
def prepare(model, source, tmp_path, counted):
    """The command on the source, as it is now; what it checked, encoded and embedded, each sorted."""

    def run(*more: object, rc: int = 0, out: Path = tmp_path / "data") -> tuple[list[str], list[str], list[str]]:
        for names in counted.values():
            names.clear()
        argv = [source, out, "--model", model, "--dtype", "float32", "--videos-per-shard", 2, *more]
        assert cli.main(["prepare", *map(str, argv)]) == rc
        return tuple(sorted(names) for names in counted.values())

    return run


def _all(folder: Path) -> list[tuple[str, bytes, bytes]]:
    """Every clip that training could read: the video's name, latents and text."""
    data = Prepared.open(folder)
    names = [video.name for video in data.videos for _ in range(video.clips)]
    arrays = [(record["latents"].tobytes(), record["text"].tobytes()) for record in data.clips()]
    return [(name, *each) for name, each in zip(names, arrays, strict=True)]


def test_only_what_changed_is_encoded(prepare, source, model, tmp_path):
    data, names = tmp_path / "data", [f"{n}.mp4" for n in range(4)]
    captions = ["", *(f"a lemon {n}" for n in range(4))]
    assert prepare() == (names, names, captions)
    assert [clip[0] for clip in _all(data)] == ["0.mp4", "1.mp4", "1.mp4", "2.mp4", "3.mp4"]
    assert prepare() == ([], [], [])
    _video(source / "1b.mp4", "a koala", seed=9)  # added, in the middle
    assert prepare() == (["1b.mp4"], ["1b.mp4"], ["a koala"])
    (source / "2.txt").write_text("a mushroom")  # a mended caption
    assert prepare() == ([], [], ["a mushroom"])
    _video(source / "3.mp4", "a lemon 3", seed=10)  # changed
    assert prepare() == (["3.mp4"], ["3.mp4"], [])
    for suffix in (".mp4", ".txt"):  # renamed, touched: looked at, and known by its content
        (source / "0.mp4").with_suffix(suffix).rename((source / "5.mp4").with_suffix(suffix))
    os.utime(source / "1.mp4")
    assert prepare() == (["1.mp4", "5.mp4"], [], [])
    (source / "2.mp4").unlink()  # deleted
    assert prepare() == ([], [], [])
    assert [clip[0] for clip in _all(data)] == ["1.mp4", "1.mp4", "1b.mp4", "3.mp4", "5.mp4"]
    # Whatever the way there, the result is that of a folder made at once.
    prepare(out=tmp_path / "fresh")
    assert _all(data) == _all(tmp_path / "fresh")
    assert Prepared.open(data).identity == Prepared.open(tmp_path / "fresh").identity


def test_another_source_costs_nothing_that_was_made(prepare, source, tmp_path, capsys):
    prepare()
    before = _all(tmp_path / "data")
    away = tmp_path / "away"
    shutil.move(source, away)
    _video(source / "x.mp4", "a koala", seed=50)
    capsys.readouterr()
    assert prepare() == (["x.mp4"], ["x.mp4"], ["a koala"])
    said = capsys.readouterr().err
    assert "4 videos that" in said
    assert "hold nothing that" in said
    assert "--prune removes them" in said
    shutil.rmtree(source)
    shutil.move(away, source)
    assert prepare()[1:] == ([], [])
    assert _all(tmp_path / "data") == before
    prepare("--prune")
    left = {path.name for path in (tmp_path / "data").glob("*.array_record")}
    assert left == {file.name for file in Prepared.open(tmp_path / "data").shards}
    assert _all(tmp_path / "data") == before


def test_copies_of_a_video_are_encoded_once(prepare, source, tmp_path):
    shutil.copyfile(source / "0.mp4", source / "copy.mp4")
    (source / "copy.txt").write_text("a koala")
    _, encoded, captions = prepare()
    assert encoded == ["0.mp4", "1.mp4", "2.mp4", "3.mp4"]
    assert captions == ["", "a koala", *(f"a lemon {n}" for n in range(4))]
    clips = {name: (latents, text) for name, latents, text in _all(tmp_path / "data")}
    assert clips["copy.mp4"][0] == clips["0.mp4"][0]
    assert clips["copy.mp4"][1] != clips["0.mp4"][1]


def test_bad_videos_are_passed_over_told_and_not_tried_again(prepare, source, tmp_path, capsys):
    (source / "a.mp4").write_bytes(b"no video")
    (source / "a.txt").write_text("a")
    _video(source / "short.mp4", "a", seed=5, frames=3)
    _video(source / "silent.mp4", "", seed=6)
    checked, encoded, _ = prepare()
    assert encoded == ["0.mp4", "1.mp4", "2.mp4", "3.mp4"]
    assert {"a.mp4", "short.mp4"} < set(checked)
    said = [line for line in capsys.readouterr().err.split("\n") if "passed over" in line]
    for words in ("silent.mp4 has no caption", "cannot read a video from", "short.mp4 is too short: 3 frames"):
        assert sum(words in line for line in said) == 1
    record = json.loads((tmp_path / "data.json").read_text())
    assert [video["name"] for video in record["unusable"]] == ["silent.mp4", "a.mp4", "short.mp4"]
    assert record["clips"] == 5
    assert prepare() == ([], [], [])
    assert prepare("--retry") == (["a.mp4", "short.mp4"], [], [])
    _video(source / "a.mp4", "a", seed=7)  # mended
    assert prepare() == (["a.mp4"], ["a.mp4"], [])
    assert len(Prepared.open(tmp_path / "data")) == 6


def test_too_many_bad_videos_end_the_run_in_one_sentence(prepare, source, capsys):
    for name in ("a", "b"):
        (source / f"{name}.mp4").write_bytes(b"no video")
        (source / f"{name}.txt").write_text("a")
    checked, encoded, _ = prepare("--most-unusable", 1, rc=2)
    assert encoded == []
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("rehyat: 2 of 6 videos cannot be used, and --most-unusable is 1: cannot read a video from")
    # What was checked is not checked again.
    assert not set(prepare("--most-unusable", 2)[0]) & set(checked)


def test_parts_check_their_own_videos_and_each_once(prepare, source, counted):
    checked: list[str] = []
    for part in (1, 2):
        checked += prepare("--part", f"{part}/2")[0]
    assert sorted(checked) == ["0.mp4", "1.mp4", "2.mp4", "3.mp4"]
    assert prepare("--part", "1/2") == ([], [], [])


def test_a_video_that_changes_while_it_is_encoded_is_passed_over(prepare, source, monkeypatch, tmp_path, capsys):
    clips = encoders.clips

    def changing(path, **more):
        if path.name == "2.mp4":
            os.utime(path, ns=(1, 1))
        return clips(path, **more)

    monkeypatch.setattr(encoders, "clips", changing)
    prepare()
    assert "2.mp4 was changed while it was encoded" in capsys.readouterr().err
    assert [clip[0] for clip in _all(tmp_path / "data")] == ["0.mp4", "1.mp4", "1.mp4", "3.mp4"]


def test_latents_that_are_not_finite_are_named(prepare, model, source, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    vae = load_vae(broken)
    vae.quant_conv.kernel.set_value(jnp.full_like(vae.quant_conv.kernel.get_value(), 3e38))  # finite itself
    shutil.rmtree(broken / "vae")
    save_vae(vae, broken / "vae")
    prepare("--model", broken, rc=2)
    assert "0.mp4: the latents of clip 1 are not finite" in capsys.readouterr().err
    # And of data that came so: the video is named by training.
    prepare(out=tmp_path / "good")
    data = Prepared.open(tmp_path / "good")
    latents = np.full(data.plan.latents, np.nan, np.float32)
    shard = write_shard(data.folder, "clips-nan.array_record", iter([("x", pack({"latents": latents}))]))
    video = data.videos[1]
    shards = tuple(shard.file if place == video.shard else file for place, file in enumerate(data.shards))
    index = json.loads((data.folder / "data.json").read_text())
    index["shards"] = [vars(file) for file in shards]
    (data.folder / "data.json").write_text(json.dumps(index))
    with pytest.raises(RehyatError, match=r"latents of 0.mp4, clip 1, are not finite"):
        [Prepared.open(data.folder).clips()[0]]


def test_a_folder_has_one_owner_who_is_named(prepare, tmp_path, capsys):
    with locked(tmp_path / "data", command="rehyat prepare"):
        prepare(rc=2)
    assert f"another process is writing it: process {os.getpid()} on " in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
    prepare()


def test_a_record_that_was_not_made_for_the_folder_is_not_replaced(prepare, tmp_path, capsys):
    mine = tmp_path / "data.json"
    mine.write_text('{"mine": 1}')
    prepare(rc=2)
    assert "data.json would be replaced, and was not made by rehyat for data" in capsys.readouterr().err
    assert mine.read_text() == '{"mine": 1}'
    mine.unlink()
    prepare()
    prepare()


@pytest.mark.full
def test_what_a_kill_left_is_removed_and_named(prepare, tmp_path, capsys):
    prepare()
    shard = next(iter(sorted((tmp_path / "data").glob("clips-*.array_record"))))
    left = shard.with_name(f".{shard.name}.0123abcd.partial")
    left.write_bytes(b"0" * 2000)
    shard.unlink()
    prepare()
    assert not left.exists()
    assert f"removed {left}, which a run that was killed left (2.0 kB)" in capsys.readouterr().err


def test_a_folder_of_the_version_before_is_refused_by_its_version(prepare, tmp_path, capsys):
    old = tmp_path / "data"
    old.mkdir()
    plan = {"footage": "", "vae": "", "frames": 5, "version": 1}
    (old / "plan.json").write_text(json.dumps(plan))
    prepare(rc=2)
    assert "is of version 1 of prepared data, and this program reads version 2" in capsys.readouterr().err
    (old / "data.json").write_text(json.dumps({"plan": plan, "shards": []}))
    with pytest.raises(ConfigError, match="is of version 1 of prepared data"):
        Prepared.open(old)


def _prepared(folder: Path, contents: list[str], *, clips: int = 1) -> Prepared:
    """An index as a folder of such videos has it."""
    videos = [
        Video(
            name=f"{n:03d}.mp4", size=1, modified=1, content=content, shard=0, first=clips * n, clips=clips,
            caption="", text_shard=0, text=0,
        )
        for n, content in enumerate(contents)
    ]  # fmt: skip
    plan = encoding.EncodePlan(
        vae="", text_encoder="", frames=5, height=32, width=32, fps=16, latents=(3, 16, 16, 4), text=16, dtype="float32"
    )
    return Prepared(folder=folder, plan=plan, tokens=1, shards=(), videos=tuple(videos), empty=(0, 0))


def _out(data: Prepared) -> set[int]:
    return {place for place, video in enumerate(data.videos) if video.content in data.held_out}


def test_held_out_are_whole_videos_spread_by_their_content(tmp_path):
    data = _prepared(tmp_path, [f"{n}" for n in range(200)], clips=3)
    (held,) = hold_out({tmp_path: data}, 32).values()
    out = _out(held)
    assert len(out) == 11  # the smallest number of videos of three clips that gives 32
    assert out != set(range(11))
    assert len({place // 50 for place in out}) == 4  # of every quarter of the names
    # All clips of each: what training sees and what it does not share no video and leave out none.
    assert len(held.clips(held_out=True)) == 33
    assert len(held.clips(held_out=False)) == 567
    assert len(held.clips()) == 600
    # Neither names nor order play a part.
    (other,) = hold_out({tmp_path: _prepared(tmp_path, [f"{n}" for n in reversed(range(200))], clips=3)}, 32).values()
    assert other.held_out == held.held_out


def test_copies_and_other_lengths_of_a_held_out_video_are_held_out_too(tmp_path):
    contents = [f"{n}" for n in range(40)]
    twice = _prepared(tmp_path / "a", [*contents, *contents], clips=4)
    alone = _prepared(tmp_path / "b", contents)
    apart = hold_out({tmp_path / "a": twice, tmp_path / "b": alone}, 8)
    short, long = apart[tmp_path / "a"], apart[tmp_path / "b"]
    assert len(_out(long)) == 8  # of the folder with a clip a video; the other would need one pair of copies
    assert _out(short) == _out(long) | {place + 40 for place in _out(long)}
    with pytest.raises(ConfigError, match="has 40 clips, of which 40 are held out: none are left"):
        hold_out({tmp_path / "b": alone}, 40)


@pytest.mark.full
def test_more_shards_than_a_process_may_open_are_read(tmp_path):
    count = 300
    for number in range(count):
        write_shard(tmp_path, f"clips-{number}.array_record", iter([("x", pack({"number": number}))]))
    script = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
from pathlib import Path
from train.data.records import Reader
read = Reader(Path({str(tmp_path)!r}), [f"clips-{{n}}.array_record" for n in range({count})])
assert [read(n, 0)["number"] for n in range({count})] == list(range({count}))
assert [read(n, 0)["number"] for n in (5, 299, 0)] == [5, 299, 0]
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.full
def test_a_process_without_open_files_left_is_told_so_and_not_of_damage(tmp_path):
    write_shard(tmp_path, "clips-0.array_record", iter([("x", pack({"number": 0}))]))
    script = f"""
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from pathlib import Path
from train.data.records import Reader
held = []
try:
    while True:
        held.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
try:
    Reader(Path({str(tmp_path)!r}), ["clips-0.array_record"])(0, 0)
except Exception as error:
    for each in held:
        os.close(each)
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "too many open files (ulimit -n)" in done.stdout, done.stdout + done.stderr


def test_opening_reads_a_bounded_number_of_bytes(prepare, tmp_path, monkeypatch):
    prepare()
    data, read = tmp_path / "data", []
    digest = records.sample_digest

    def counting(path):
        read.append(path.stat().st_size)
        return digest(path)

    monkeypatch.setattr(records, "sample_digest", counting)
    whole = Prepared.open(data)
    assert sum(read) == sum(file.bytes for file in whole.shards)
    largest = max(file.bytes for file in whole.shards)
    monkeypatch.setattr(records, "VERIFIED_BYTES", largest)
    read.clear()
    assert not records.damaged(data, whole.shards, budget=largest)
    assert 0 < sum(read) <= largest
    # Sizes are looked at all the same.
    with (data / whole.shards[-1].name).open("ab") as file:
        file.write(b"more")
    assert records.damaged(data, whole.shards, budget=0) == {whole.shards[-1].name}


def test_training_reads_the_same_clips_whatever_the_shards(prepare, source, tmp_path):
    prepare()
    prepare("--videos-per-shard", 1, out=tmp_path / "single")
    one, other = (
        PreparedFeed(
            hold_out({folder: Prepared.open(folder)}, 1)[folder],
            count=2,
            seed=3,
            dtype=jnp.dtype("float32"),
            place=lambda index: index,
        )
        for folder in (tmp_path / "data", tmp_path / "single")
    )
    for index in (0, 1, 2, 7, 3):
        left, right = one.host_batch(index), other.host_batch(index)
        np.testing.assert_array_equal(left["latents"], right["latents"])
        np.testing.assert_array_equal(left["text"], right["text"])


@pytest.mark.full
def test_killed_at_random_moments_a_piece_in_progress_is_all_that_is_lost(prepare, source, model, tmp_path):
    for number in range(4, 12):
        _video(source / f"{number}.mp4", f"a lemon {number}", seed=number)
    prepare(out=tmp_path / "whole")
    argv = ["prepare", source, tmp_path / "cut", "--model", model, "--dtype", "float32", "--videos-per-shard", 1]
    command = [sys.executable, "-m", "rehyat_jax", *map(str, argv)]
    moments, longest, shards = random.Random(0), 20.0, set[str]()
    for _ in range(KILLS):
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            _, error = process.communicate(timeout=moments.uniform(0.3, 1.0) * longest)
            assert process.returncode == 0, error
            longest = time.monotonic() - began
            shutil.rmtree(tmp_path / "cut")
            shards = set()
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        there = {path.name for path in (tmp_path / "cut").glob("*.array_record.json")}
        assert shards <= there
        shards = there
    prepare("--videos-per-shard", 1, out=tmp_path / "cut")
    assert _all(tmp_path / "cut") == _all(tmp_path / "whole")
    assert Reader(tmp_path / "cut", [Prepared.open(tmp_path / "cut").shards[0].name])(0, 0)

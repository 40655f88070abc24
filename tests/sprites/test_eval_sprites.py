"""``rehyat eval sprites``: what is measured is what it says, and what each mistake says."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console
from shared import tiers
from shared.checkpoint import save_tiny_checkpoint
from shared.sprites import is_held_out

from rehyat_jax import cli
from rehyat_jax.errors import RehyatError
from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.checkpoints import save_transformer
from rehyat_jax.pipeline import TextToVideo
from rehyat_jax.runtime.variables import MixerParam
from rehyat_jax.sprites import world
from rehyat_jax.sprites.captions import captions
from rehyat_jax.sprites.clips import Past, _emptied, generated, quantized, through_vae
from rehyat_jax.sprites.evaluation import Measurement, to_dict
from rehyat_jax.sprites.headline import headline
from rehyat_jax.sprites.occlusion import report_occlusions, swapped_occlusions
from rehyat_jax.sprites.prompts import occlusion_scenes, unseen_scenes
from rehyat_jax.sprites.report import report

QUICK = ["--clips", "2", "--frames", "13", "--long", "21", "--waits", "0", "--steps", "2", "--guidance", "2"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory) -> Path:
    """All blocks converted: chunks of two latent frames, 1 + 4 frames and then 8 each."""
    folder = shutil.copytree(teacher, tmp_path_factory.mktemp("student") / "tiny")
    pipe = TextToVideo.from_pretrained(teacher, hybrid=HybridConfig(chunk_frames=2, overlap_frames=1))
    shutil.rmtree(folder / "transformer")
    save_transformer(pipe.transformer, folder / "transformer")
    return folder


@pytest.fixture
def rehyat(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*argv: object):
        code = cli.main(["eval", *map(str, argv)])
        return code, *capsys.readouterr()

    return run


@pytest.mark.full
def test_a_student_beside_its_teacher(rehyat, student, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("rehyat_jax.sprites.evaluation._LONGEST_WAIT", 4)  # shorter clips
    code, output, error = rehyat("sprites", "--model", student, "--teacher", teacher, *QUICK)
    assert code == 0, error
    assert os.listdir(tmp_path) == ["sprites.json"]
    record = json.loads((tmp_path / "sprites.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    found = {(m["subject"], m["source"]): m["report"] for m in record["measurements"]}
    controls = ["true clips, VAE", "… frozen", "swapped"]
    assert list(found) == [
        *(("training length", source) for source in ("per step", "streamed", "teacher", *controls)),
        *(("long", source) for source in ("streamed", *controls)),
        *(("hidden wait 0", source) for source in ("streamed", "teacher", controls[0], controls[2])),
        *(
            (f"continued, hidden wait 0{when}", source)
            for when in ("", ", 4 frames later")
            for source in ("streamed", "… emptied", controls[0])
        ),
    ]
    # Controls that do not pass through this autoencoder, which is random.
    assert found["training length", "swapped"]["directions"] == 1
    assert found["training length", "swapped"]["recall"] < 0.6
    assert found["long", "swapped"]["frames"] == 21
    assert (found["hidden wait 0", "swapped"]["emerged"], found["hidden wait 0", "swapped"]["recall"]) == (1, 0)
    settings = record["settings"]
    assert (settings["seeds"], settings["num_inference_steps"], settings["guidance_scale"]) == ([2026], 2, 2.0)
    for word in (
        "training length: 2 clips, 13 frames",
        "long: 1 clips, 21 frames",
        "over the teacher's",
        "was the same",
        "2 clips, 1 long, 2 for each wait (0); 2 steps, guidance 2, seeds 2026; all figures are in sprites.json",
    ):
        assert word in output
    for word in ("training length, streamed: 2/2", "long, streamed: 3/3", "hidden wait 0, controls: 2/2"):
        assert word in error


@pytest.mark.full
def test_what_was_measured_before_an_end_is_kept(rehyat, teacher, monkeypatch):
    def ended(*_, **__):
        raise RehyatError("ended")

    monkeypatch.setattr("rehyat_jax.sprites.evaluation._Run.behind", ended)
    code, _, error = rehyat("sprites", "--model", teacher, *QUICK)
    assert (code, "ended" in error) == (2, True)
    found = {m["subject"] for m in json.loads(Path("sprites.json").read_text())["measurements"]}
    assert found == {"training length"}


@pytest.mark.parametrize("options", [["--occlusions", "0"], tiers.full([])], ids=str)
def test_a_softmax_model_has_no_streams_and_is_told_so(rehyat, teacher, options):
    code, output, error = rehyat("sprites", "--model", teacher, *QUICK, "--frames", 5, *options, "--out", "a/b.json")
    assert code == 0, error
    assert "blocks 0-1 of 2 attend to the whole video by softmax; the figures of streams are left out" in error
    found = {(m["subject"], m["source"]) for m in json.loads(Path("a/b.json").read_text())["measurements"]}
    assert ("training length" if options else "hidden wait 0", "per step") in found
    assert not any("long" in subject or "streamed" in source for subject, source in found)
    assert "streamed" not in output


@pytest.mark.parametrize(
    ("backend", "options", "clips", "waits"),
    [
        ("cpu", [], (4, 1, 2), (48,)),
        ("gpu", [], (256, 32, 64), (0, 16, 48, 96)),
        ("cpu", ["--clips", "16", "--waits", "0", "96"], (16, 2, 4), (0, 96)),
        ("gpu", ["--clips", "4", "--waits", "48", "--long", "0"], (4, 0, 2), (48,)),
        ("cpu", ["--clips", "0", "--occlusions", "16", "--long", "0"], (0, 0, 16), (48,)),
        ("cpu", ["--occlusions", "0"], (4, 1, 0), (48,)),
    ],
)
def test_the_default_sample_is_the_devices_and_options_win(
    rehyat, teacher, monkeypatch, backend, options, clips, waits
):
    samples = []

    def evaluate(pipe, sample, **more):
        samples.append(sample)
        raise RehyatError("seen")

    monkeypatch.setattr("rehyat_jax.sprites.evaluation.evaluate", evaluate)
    monkeypatch.setattr("rehyat_jax.runtime.platform.platform", lambda: backend)
    assert rehyat("sprites", "--model", teacher, *options)[0] == 2
    (sample,) = samples
    assert ((sample.clips, sample.long_clips, sample.occlusions), sample.waits) == (clips, waits)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["dreams"], ["sprites", "'dreams'"]),
        (["sprites", "--clips", "1"], ["--clips", "2"]),
        (["sprites", "--seeds", "0"], ["--seeds"]),
        (["sprites", "--occlusions", "1"], ["--occlusions", "2"]),
        (["sprites", "--clips", "0", "--occlusions", "0"], ["nothing"]),
        (["sprites", "--frames", "64"], ["--frames", "4k + 1"]),
        (["sprites", "--long", "-3"], ["--long"]),
        (["sprites", "--waits", "-1"], ["--waits"]),
        (["sprites", "--steps", "0"], ["steps"]),
        (["sprites", "--out", "a.txt"], [".json"]),
        (["sprites", "--out", "/sys/a.json"], ["cannot write /sys/a.json"]),
        (["sprites", "--model", "none"], ["none", "bundled"]),
        (["sprites", "--teacher", "none"], ["none", "bundled"]),
        (["sprites", "--dance"], ["dance"]),
        ([], ["usage"]),
    ],
)
def test_a_mistake_exits_with_2_and_makes_no_file(rehyat, teacher, tmp_path, options, words):
    more = ["--model", teacher] if options[:1] == ["sprites"] and "none" not in options else []
    code, output, error = rehyat(*options, *more)
    assert (code, output) == (2, "")
    assert "Traceback" not in error
    for word in words:
        assert word in error
    assert os.listdir(tmp_path) == []


@pytest.mark.full
@pytest.mark.parametrize("frames", [13, 17])
def test_clips_are_the_streams_and_the_whole_videos_of_their_seeds(student, frames):
    """Five latent frames and two: a last chunk that is cut, and groups of clips. One level of 255 is rounding."""
    pipe = TextToVideo.from_pretrained(student)
    texts = captions(unseen_scenes(4, seed=0))
    steps: list[tuple[int, int]] = []
    settings = pipe.settings(num_frames=frames, height=16, width=32, num_inference_steps=2, guidance_scale=2.0)
    how = {"seed": 5, "batch": 2, "progress": lambda *done: steps.append(done)}
    streamed = generated(pipe, texts, settings, sweep="per-chunk", **how)
    assert streamed.shape == (4, frames, 16, 32, 3)
    assert steps[-1] == ((frames // 4 + 2) // 2 * 2,) * 2
    two = pipe.open_stream(texts[2:], height=16, width=32, num_inference_steps=2, guidance_scale=2.0, seed=7)
    want = np.concatenate([next(two)[1] for _ in range(3)])[:frames]
    assert np.abs(streamed[3].astype(int) - want).max() <= 1
    if frames == 13:
        whole = generated(pipe, texts, settings, sweep="per-step", **how)
        assert steps[-1] == (4, 4)
        assert np.abs(streamed.astype(int) - whole).max() <= 1


@pytest.mark.full
def test_clips_go_on_from_true_ones_with_or_without_what_they_remember(student):
    pipe, rng = TextToVideo.from_pretrained(student), np.random.default_rng(0)
    state = nnx.state(pipe.transformer, MixerParam)  # far from their start, so that the past counts
    nnx.update(pipe.transformer, jax.tree.map(lambda p: p + 0.3 * rng.standard_normal(p.shape, np.float32), state))
    settings = pipe.settings(num_frames=21, height=16, width=32, num_inference_steps=2, guidance_scale=2.0)
    true = rng.integers(0, 256, (2, 13, 16, 32, 3), np.uint8)
    how = {"sweep": "per-chunk", "seed": 5, "batch": 2, "progress": lambda *done: None}
    pasts = (Past(frames=true, emptied=emptied) for emptied in (False, True))
    clips, emptied = (generated(pipe, ["a", "b"], settings, past=past, **how) for past in pasts)
    through = through_vae(pipe.vae, true, batch=2)
    assert np.abs(clips[:, :13].astype(int) - through).max() <= 1
    one = pipe.open_stream(
        "b", height=16, width=32, num_inference_steps=2, guidance_scale=2.0, seed=6, beginning=true[1]
    )
    assert np.abs(next(one).astype(int) - clips[1, 13:]).max() <= 1
    np.testing.assert_array_equal(emptied[:, :13], clips[:, :13])
    assert (emptied[:, 13:] != clips[:, 13:]).any()

    with pytest.raises(RehyatError, match="per-chunk"):
        generated(pipe, ["a", "b"], settings, past=Past(frames=true), **how | {"sweep": "per-step"})

    state = one.state.states
    left = _emptied(state)
    assert not any(np.asarray(x).any() for x in (left.s, left.z))
    assert np.asarray(state.z).any()
    for name in ("k", "v", "features_k"):
        np.testing.assert_array_equal(getattr(left, name), getattr(state, name))


def test_no_prompt_is_one_of_training():
    scenes = unseen_scenes(41, seed=3)
    held_out = is_held_out(scenes)
    assert held_out[:20].all()
    assert not held_out[20:].any()
    assert np.asarray(world.is_reserved(scenes))[20:].all()
    assert set(np.asarray(occlusion_scenes(5, wait=16, seed=3).waits)) == {16}


@pytest.mark.full
def test_swapped_occlusions_come_out_and_are_not_recalled():
    """Wait 0, where the change has the fewest frames to hide in; two clips, as the run above had compiled."""
    scenes = occlusion_scenes(2, wait=0, seed=0)
    for draw, recall in ((swapped_occlusions, 0), (world.render, 1)):
        found = report_occlusions(quantized(draw(scenes, num_frames=world.occlusion_frames(0))), scenes)
        assert (found.entered, found.emerged, found.recall) == (1, 1, recall)


def test_seeds_show_their_spread_and_what_cannot_be_judged_a_dash():
    scenes = unseen_scenes(2, seed=0)
    true = jax.jit(lambda s: world.render(s, num_frames=9))(scenes)
    seen = report(np.asarray(true), scenes, chunk=12)
    lost = report(np.zeros_like(true), scenes, chunk=12)
    both = [Measurement(subject="a", source="per step", seed=s, report=r) for s, r in ((0, seen), (1, lost))]
    console = Console(width=100)
    with console.capture() as said:
        for table in headline(both):
            console.print(table)
    # The standard deviation of 1 and 0.
    assert "0.500 ± 0.707" in said.get()
    assert "a: 2 clips, 2 seeds, 9 frames" in said.get()
    with console.capture() as said:
        console.print(*headline(both[1:]))
    assert [line.split()[-1] for line in said.get().splitlines() if "speed" in line] == ["-"]
    assert json.loads(json.dumps(to_dict(both[1]), allow_nan=False))["report"]["speed"] is None

"""The pipeline against diffusers' own, on checkpoints that diffusers wrote; then its properties and its mistakes."""

import json
import shutil
import warnings
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from hypothesis import given
from hypothesis import strategies as st
from shared import tiers
from shared.checkpoint import save_tiny_checkpoint, tiny_pipeline
from shared.tiers import examples

from rehyat_jax import TextToVideo
from rehyat_jax.errors import CheckpointError, ConfigError, RehyatError, RehyatWarning
from rehyat_jax.models.checkpoints import load_transformer
from rehyat_jax.models.folder import Defaults, bundled_models, find_model
from rehyat_jax.runtime.record import Phases
from rehyat_jax.sampling import Euler, FlowSchedule, UniPC

SMALL = {"num_frames": 9, "height": 32, "width": 48, "num_inference_steps": 4}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Decibels for values in 0..1."""
    return float(-10 * np.log10(np.mean((a.astype(np.float64) - b) ** 2) + 1e-20))


def noise_for(batch: int, frames: int, height: int, width: int, *, factor: int = 8, seed: int = 0) -> np.ndarray:
    shape = (batch, (frames - 1) // 4 + 1, height // factor, width // factor, 16)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def by_diffusers(pipeline: WanPipeline, prompt, noise: np.ndarray, **settings) -> np.ndarray:
    """The same call, channels first; videos [B, F, H, W, 3] in 0..1."""
    latents = torch.from_numpy(noise).permute(0, 4, 1, 2, 3).contiguous()
    return pipeline(prompt, latents=latents, output_type="np", **settings).frames


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def pipe(checkpoint, cache) -> TextToVideo:
    return TextToVideo.from_pretrained(checkpoint, cache_dir=cache)


# The issue asks for 45 dB in float32. Rounding alone leaves some 128 dB after 4 steps and after 50: below 100 dB
# something would differ by more than arithmetic.
ENOUGH = 100


@pytest.mark.parametrize(
    ("patch", "shift", "settings"),
    tiers.breadth(
        [
            ((1, 2, 2), 3.0, {**SMALL, "guidance_scale": 5.0, "negative_prompt": "static, 2 subtitles"}),
            ((1, 1, 1), 8.0, {**SMALL, "height": 16, "num_frames": 1, "num_inference_steps": 7, "guidance_scale": 1.0}),
            ((1, 2, 2), 5.0, {**SMALL, "num_frames": 13, "num_inference_steps": 12, "guidance_scale": 2.5}),
        ]
    ),
)
def test_makes_what_diffusers_makes(tmp_path, cache, patch, shift, settings):
    theirs = save_tiny_checkpoint(tmp_path, seed=int(shift), patch=patch, shift=shift)
    noise = noise_for(1, settings["num_frames"], settings["height"], settings["width"])
    prompt = "  A cat &amp; a dog,\n\n baking a cake together. "
    expected = by_diffusers(theirs, prompt, noise, **settings)
    ours = TextToVideo.from_pretrained(tmp_path, cache_dir=cache)
    video = ours(prompt, noise=noise, output="float", **settings)
    assert video.shape == expected.shape[1:]
    assert expected.std() > 0.05  # there is something to compare
    assert psnr(video, expected[0]) > ENOUGH
    pixels = ours(prompt, noise=noise, **settings)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels - expected[0] * 255).max() < 0.51


def test_prompts_in_a_list_as_diffusers_makes_them(checkpoint, pipe):
    prompts = ["a lemon moving down", "", "x" * 600]  # the last is cut to 512 tokens
    settings = {"num_frames": 5, "height": 16, "width": 32, "num_inference_steps": 3, "guidance_scale": 4.0}
    noise = noise_for(3, 5, 16, 32)
    theirs = WanPipeline.from_pretrained(checkpoint)
    theirs.set_progress_bar_config(disable=True)
    expected = by_diffusers(theirs, prompts, noise, negative_prompt=["a dog"] * 3, **settings)
    with pytest.warns(RehyatWarning, match="602 tokens"):
        video = pipe(prompts, noise=noise, negative_prompt="a dog", output="float", **settings)
    assert video.shape == expected.shape == (3, 5, 16, 32, 3)
    assert min(psnr(a, b) for a, b in zip(video, expected, strict=True)) > ENOUGH


def test_euler_as_diffusers_has_it(tmp_path, cache):
    theirs = tiny_pipeline()
    theirs.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.save_pretrained(tmp_path)
    ours = TextToVideo.from_pretrained(tmp_path, cache_dir=cache)
    assert ours.solver == Euler()
    noise = noise_for(1, 9, 32, 48)
    expected = by_diffusers(theirs, "a cat", noise, guidance_scale=3.0, **SMALL)
    assert psnr(ours("a cat", noise=noise, output="float", guidance_scale=3.0, **SMALL), expected[0]) > ENOUGH


@pytest.mark.full
@pytest.mark.usefixtures("compiled_for_speed")
def test_bundled_models_open_in_diffusers_and_agree(cache):
    """The real client at the model's own defaults, a few steps of them, in float32 (≥ 45 dB asked for): left alone it
    takes the text encoder's dtype from its file, bfloat16."""
    for name, folder in bundled_models().items():
        ours = TextToVideo.from_pretrained(name, hybrid=None, cache_dir=cache)
        theirs = WanPipeline.from_pretrained(folder).to(torch.float32)
        theirs.set_progress_bar_config(disable=True)
        size = {"height": ours.defaults.height, "width": ours.defaults.width}
        noise = noise_for(1, 17, **size, factor=ours.vae.config.spatial_factor)
        settings = {**size, "num_frames": 17, "num_inference_steps": 6, "guidance_scale": ours.defaults.guidance_scale}
        prompt = "a lemon moving down slowly on a blue background"
        expected = by_diffusers(theirs, prompt, noise, **settings)
        assert psnr(ours(prompt, noise=noise, output="float", **settings), expected[0]) > ENOUGH


@pytest.mark.full
@pytest.mark.usefixtures("compiled_for_speed")
def test_the_bundled_student_streams_and_its_teacher_is_beside_it(cache):
    """Three latent frames are nine of video; 90 MB are allowed for the teacher and both students."""
    pipe = TextToVideo.from_pretrained("mini-sprites", cache_dir=cache)
    first = next(pipe.stream("a lemon moving down slowly on a blue background", num_inference_steps=1))
    assert first.shape == (9, 64, 64, 3)
    folder = find_model("mini-sprites")
    teacher = load_transformer(folder, hybrid=None)
    assert (teacher.hybrid, teacher.config) == (None, pipe.transformer.config)
    assert (pipe.defaults.num_inference_steps, pipe.defaults.guidance_scale) == (4, 1.0)
    slow = TextToVideo.from_pretrained("mini-sprites-20-steps", cache_dir=cache)
    assert (slow.defaults.num_inference_steps, slow.transformer.hybrid) == (20, pipe.transformer.hybrid)
    assert sum(file.stat().st_size for each in bundled_models().values() for file in each.rglob("*")) <= 90e6


def test_the_seed_decides(pipe):
    settings = {**SMALL, "num_frames": 1, "guidance_scale": 1.0}
    first = pipe("a cat", seed=7, **settings)
    np.testing.assert_array_equal(first, pipe("a cat", seed=7, **settings))
    assert (first != pipe("a cat", seed=8, **settings)).mean() > 0.5
    # In a batch, prompt i has the noise of seed + i; another batch size may round otherwise: one level of 255.
    both = pipe(["a dog", "a cat"], seed=6, **settings)
    assert np.abs(both[1].astype(int) - first).max() <= 1


def test_defaults_of_the_folder_and_of_wan(checkpoint, pipe, tmp_path, cache):
    assert pipe.defaults == Defaults(height=480, width=832, num_frames=81, num_inference_steps=50, guidance_scale=6.0)
    assert (pipe.schedule, pipe.solver) == (FlowSchedule(grid="diffusers", shift=3.0), UniPC(2))
    shutil.copytree(checkpoint, tmp_path / "own")
    (tmp_path / "own" / "rehyat_defaults.json").write_text(json.dumps({"height": 64, "width": 96, "guidance_scale": 2}))
    settings = TextToVideo.from_pretrained(tmp_path / "own", cache_dir=cache).settings()
    assert (settings.height, settings.width, settings.guidance_scale, settings.num_frames) == (64, 96, 2.0, 81)


def test_progress_and_phases(pipe):
    seen, phases = [], Phases()
    settings = pipe.settings(**SMALL, guidance_scale=2.0)
    pipe.run("a cat", settings, on_step=lambda *step: seen.append(step), phases=phases)
    assert seen == [("text", i, 2) for i in range(3)] + [("denoise", i, 4) for i in range(5)] + [
        ("decode", i, 3) for i in range(4)
    ]
    assert list(phases.done) == ["text", "denoise", "decode"]
    assert all(phase.milliseconds > 0 for phase in phases.done.values())


@pytest.mark.parametrize(("asked", "made"), [(1, 1), (3, 1), (4, 5), (5, 5), (8, 9), (10, 9), (80, 81)])
def test_frames_are_rounded_as_diffusers_rounds(pipe, asked, made):
    if asked == made:
        assert pipe.settings(num_frames=asked).num_frames == made
    else:
        with pytest.warns(UserWarning, match=f"{made} instead of {asked}"):
            assert pipe.settings(num_frames=asked).num_frames == made


def test_sizes_are_cut_to_patches_with_a_warning(pipe):
    with pytest.warns(UserWarning, match="48x32 instead of 63x47"):
        settings = pipe.settings(width=63, height=47)
    assert (settings.width, settings.height) == (48, 32)


@hypothesis.settings(max_examples=examples(200), deadline=None)
@given(*(st.integers(-10, 300) | st.integers() for _ in range(3)))
def test_any_size_is_cut_or_refused(pipe, frames, height, width):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            made = pipe.settings(num_frames=frames, height=height, width=width)
        except RehyatError:
            # Nothing from one patch up to 300 frames of 300x300 (24,300 tokens) is refused.
            assert not (1 <= frames <= 300 and 16 <= height <= 300 and 16 <= width <= 300)
            return
    assert made.num_frames % 4 == 1
    assert abs(made.num_frames - frames) <= 2
    assert 0 <= height - made.height < 16
    assert 0 <= width - made.width < 16
    assert made.height % 16 == made.width % 16 == 0


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_frames": 0}, "num_frames must be"),
        ({"num_frames": -81}, "num_frames must be"),
        ({"num_frames": 10**12}, "num_frames must be"),
        ({"height": 0}, "height must be"),
        ({"width": -16}, "width must be"),
        ({"width": 1 << 40}, "width must be"),
        ({"height": 15}, "too small"),
        ({"height": 16384, "width": 16384}, "tokens"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number"),
        ({"num_inference_steps": 1001}, "number of steps"),
        ({"guidance_scale": float("nan")}, "finite"),
        ({"guidance_scale": float("inf")}, "finite"),
    ],
)
def test_impossible_settings_are_sentences(pipe, settings, match):
    with pytest.raises(RehyatError, match=match):
        pipe("a cat", **settings)


def test_impossible_calls_are_sentences(pipe):
    for kwargs, match in [
        ({"seed": -1}, "seed"),
        ({"seed": 1 << 32}, "seed"),
        ({"noise": np.zeros((1, 2, 4, 6, 16), np.float32)}, "noise has shape"),
        ({"prompt": []}, "not empty"),
    ]:
        with pytest.raises(RehyatError, match=match):
            pipe(**{"prompt": "a cat", **SMALL, **kwargs})


@pytest.mark.parametrize("name", ["no-such-model", "hf:nobody/nothing", "with\0null", "", "x" * 5000])
def test_unknown_models_are_sentences(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=r"there is no folder|cannot fetch|install|is no path"):
        find_model(name)


@pytest.mark.parametrize(
    "text",
    [
        '{"height": "64"}',
        '{"height": true}',
        '{"height": 1.5}',
        '{"x": 1}',
        "[]",
        "{",
        '{"height": null}',
        "",
        '{"remember": "all"}',
        '{"remember": 1}',
        '{"remember": true}',
        '{"remember": NaN}',
    ],
)
def test_hostile_defaults_are_sentences(checkpoint, tmp_path, cache, text):
    folder = shutil.copytree(checkpoint, tmp_path / "hostile")
    (folder / "rehyat_defaults.json").write_text(text)
    with pytest.raises((ConfigError, CheckpointError), match=r"rehyat_defaults\.json"):
        TextToVideo.from_pretrained(folder, cache_dir=cache)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer"])
def test_a_missing_or_truncated_part_is_known_before_denoising(checkpoint, tmp_path, cache, part):
    folder = shutil.copytree(checkpoint, tmp_path / "broken")
    if weights := list((folder / part).glob("*.safetensors")):
        data = weights[0].read_bytes()
        weights[0].write_bytes(data[: len(data) // 2])
        with pytest.raises(CheckpointError):
            TextToVideo.from_pretrained(folder, cache_dir=tmp_path / "no-cache")(
                "a cat", on_step=lambda phase, *_: pytest.fail("too late") if phase == "denoise" else None
            )
    shutil.rmtree(folder / part)
    with pytest.raises(RehyatError, match=part.replace("_", "[_ ]")):
        TextToVideo.from_pretrained(folder, cache_dir=tmp_path / "no-cache")


def test_parts_that_do_not_fit_are_refused(checkpoint, tmp_path, cache):
    other = tiny_pipeline().transformer.__class__(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=64,
        freq_dim=32,
        ffn_dim=48,
        num_layers=1,
    )
    folder = shutil.copytree(checkpoint, tmp_path / "mixed")
    shutil.rmtree(folder / "transformer")
    other.save_pretrained(folder / "transformer")
    with pytest.raises(CheckpointError, match="text of 64 features, the encoder has 32"):
        TextToVideo.from_pretrained(folder, cache_dir=cache)


def test_prompts_are_embedded_once(checkpoint, tmp_path, monkeypatch):
    settings = {**SMALL, "num_frames": 1, "guidance_scale": 1.0}
    first = TextToVideo.from_pretrained(checkpoint, cache_dir=tmp_path)("a cat", **settings)
    # A second process need not read the text encoder.
    monkeypatch.setattr("rehyat_jax.text.prompt_encoder.load_text_encoder", lambda *a, **k: pytest.fail("read again"))
    again = TextToVideo.from_pretrained(checkpoint, cache_dir=tmp_path)("a cat", **settings)
    np.testing.assert_array_equal(first, again)


def test_bfloat16_keeps_the_autoencoder_in_float32(checkpoint, cache):
    pipe = TextToVideo.from_pretrained(checkpoint, dtype=jax.numpy.bfloat16, cache_dir=cache)
    assert (pipe.transformer.dtype, pipe.vae.dtype) == (jax.numpy.bfloat16, jax.numpy.float32)
    video = pipe("a cat", **SMALL, guidance_scale=3.0)
    assert video.shape == (9, 32, 48, 3)


def test_compiled_programs_and_prompts_land_in_the_cache(checkpoint, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        TextToVideo.from_pretrained(checkpoint, cache_dir=tmp_path)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "xla")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)

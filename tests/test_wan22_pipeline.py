"""Wan2.2's TI2V-5B against diffusers' pipelines on checkpoints that diffusers wrote: latents, same noise."""

import json
import shutil

import numpy as np
import pytest
from diffusers import WanImageToVideoPipeline
from shared.families import tiny_ti2v
from shared.videos import PROMPT, SIZE, image_of, latents_by_diffusers, latents_by_us, noise_of

from rehyat_jax import HybridConfig, TextToVideo
from rehyat_jax.errors import RehyatError, RehyatWarning
from rehyat_jax.models.checkpoints import convert, describe
from rehyat_jax.video.images import fitted


@pytest.fixture(scope="module")
def ti2v(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ti2v")
    pipeline = tiny_ti2v(folder)
    image_pipeline = WanImageToVideoPipeline(**pipeline.components, expand_timesteps=True)
    image_pipeline.set_progress_bar_config(disable=True)
    return folder, pipeline, image_pipeline


@pytest.fixture(scope="module")
def ours(ti2v, tmp_path_factory):
    return TextToVideo.from_pretrained(ti2v[0], cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("image", [True, pytest.param(False, marks=pytest.mark.full)], ids=["image", "text"])
def test_the_5b_is_diffusers(ti2v, ours, image):
    """Three guided steps of a network of order one in float32: some hundred roundings of 6e-8, times guidance."""
    noise, picture = noise_of(), image_of()
    if image:
        from PIL import Image

        expected = latents_by_diffusers(ti2v[2], noise, image=Image.fromarray(picture))
        found = latents_by_us(ours, noise, image=picture)
    else:
        expected, found = latents_by_diffusers(ti2v[1], noise), latents_by_us(ours, noise)
    assert 0.3 < expected.std() < 5
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_its_settings_are_the_authors(ti2v, ours, tmp_path):
    assert (ours.fps, ours.defaults.num_frames, ours.defaults.width, ours.defaults.height) == (24, 121, 1280, 704)
    with pytest.warns(RehyatWarning, match="64x32 instead of 80x40"):
        settings = ours.settings(width=80, height=40)
    assert (settings.width, settings.height) == (64, 32)
    # The release's folder has no index: what it says is known by the sizes, and is written by convert.
    release = shutil.copytree(ti2v[0], tmp_path / "release")
    (release / "model_index.json").unlink()
    said = str(describe(release / "transformer"))
    assert "in_channels 48" in said


def test_its_index_is_kept_by_convert(ti2v, tmp_path):
    convert(ti2v[0], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["expand_timesteps"] is True
    assert "24 a second" in str(describe(tmp_path / "out"))


def test_images_that_do_not_fit_are_sentences(ours, tmp_path):
    small = {**SIZE, "num_frames": 1, "num_inference_steps": 1}
    with pytest.raises(RehyatError, match="takes no last_image"):
        ours(PROMPT, image=image_of(), last_image=image_of(), **small)
    with pytest.raises(RehyatError, match="give image as well"):
        ours(PROMPT, last_image=image_of(), **small)
    with pytest.raises(RehyatError, match="does not exist"):
        ours(PROMPT, image=tmp_path / "none.png", **small)
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    with pytest.raises(RehyatError, match="no image that can be read"):
        ours(PROMPT, image=tmp_path / "bad.png", **small)
    with pytest.raises(RehyatError, match=r"image must be uint8 \[H, W, 3\], not float32 \[4, 4, 3\]"):
        ours(PROMPT, image=np.zeros((4, 4, 3), np.float32), **small)
    with pytest.warns(RehyatWarning, match="image of 80x200 is cropped to its middle 80x53"):
        assert fitted("image", image_of(200, 80), height=64, width=96).shape == (64, 96, 3)


@pytest.mark.full
def test_a_stream_begins_with_the_image(ti2v, tmp_path):
    """A model of causal blocks: the stream's frames are those of a whole call under the same image and noise."""
    pipe = TextToVideo.from_pretrained(ti2v[0], hybrid=HybridConfig(chunk_frames=2), cache_dir=tmp_path)
    settings = {**SIZE, "guidance_scale": 4.0}
    whole = pipe(PROMPT, image=image_of(), seed=3, **settings | {"num_frames": 13})
    del settings["num_frames"]
    stream = pipe.open_stream(PROMPT, image=image_of(), seed=3, **settings)
    blocks = np.concatenate([next(stream), next(stream)])
    assert np.abs(blocks.astype(int) - whole).max() <= 1

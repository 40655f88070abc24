"""Image-to-video models against diffusers' ``WanImageToVideoPipeline``: Wan2.1's with CLIP, from one image and two, and
Wan2.2's two experts without."""

import json
import shutil

import numpy as np
import pytest
from diffusers import WanImageToVideoPipeline
from PIL import Image
from shared.families import CLIP, tiny_i2v
from shared.tiers import full
from shared.videos import PROMPT, SIZE, image_of, latents_by_diffusers, latents_by_us, noise_of

from rehyat_jax import TextToVideo
from rehyat_jax.errors import CheckpointError, RehyatError
from rehyat_jax.models.checkpoints import convert, describe
from rehyat_jax.models.folder import read_defaults


@pytest.mark.parametrize(
    ("options", "last"),
    [
        (CLIP, False),
        full(CLIP | {"pos_embed_seq_len": 10}, True, id="two images"),
        full({"experts": True}, False, id="experts"),
        full({"experts": True}, True, id="experts, two images"),
    ],
)
def test_image_to_video_is_diffusers(tmp_path, options, last):
    """Three guided steps of a network of order one in float32, its autoencoder's encoder before them."""
    theirs = tiny_i2v(tmp_path / "in", **options)
    assert (theirs.transformer.config.image_dim is None) == ("experts" in options)
    images = {"image": image_of()} | ({"last_image": image_of(seed=2)} if last else {})
    noise = noise_of(3, 8, 12, 16)
    expected = latents_by_diffusers(theirs, noise, **{name: Image.fromarray(x) for name, x in images.items()})
    ours = TextToVideo.from_pretrained(tmp_path / "in", cache_dir=tmp_path / "cache")
    found = latents_by_us(ours, noise, **images)
    assert 0.3 < expected.std() < 5
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def i2v(tmp_path_factory):
    folder = tmp_path_factory.mktemp("i2v")
    tiny_i2v(folder, **CLIP)
    return folder


def test_what_it_takes_is_said(i2v, tmp_path):
    pipe = TextToVideo.from_pretrained(i2v, cache_dir=tmp_path)
    for images, match in (
        ({}, "give image"),
        ({"image": image_of(), "last_image": image_of()}, "takes no last_image"),
    ):
        with pytest.raises(RehyatError, match=match):
            pipe(PROMPT, **images, **SIZE)
    assert "blocks 0-1 of 2 attend to the whole video" in pipe.why_not_stream()
    folder = shutil.copytree(i2v, tmp_path / "broken")
    shutil.rmtree(folder / "image_encoder")
    with pytest.raises(CheckpointError, match="no image_encoder folder"):
        TextToVideo.from_pretrained(folder, cache_dir=tmp_path)


def test_it_is_converted_whole(i2v, tmp_path):
    convert(i2v, tmp_path / "out")
    assert WanImageToVideoPipeline.from_pretrained(tmp_path / "out").transformer.config.image_dim == 20
    said = str(describe(tmp_path / "out"))
    assert "image_encoder: CLIP image encoder" in said
    assert "Wan2.1-I2V-14B" in said
    defaults = read_defaults(tmp_path / "out")
    assert (defaults.num_inference_steps, defaults.guidance_scale) == (40, 5.0)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "WanImageToVideoPipeline"

"""Image-to-video models against diffusers' ``WanImageToVideoPipeline``: Wan2.1's with CLIP, from one image and two, and
Wan2.2's two experts without."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image
from shared.checkpoint import tiny_pipeline
from shared.tiers import full
from shared.videos import PROMPT, SIZE, image_of, latents_by_diffusers, latents_by_us, noise_of
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from rehyat_jax import TextToVideo
from rehyat_jax.errors import CheckpointError, RehyatError
from rehyat_jax.models.checkpoints import convert, describe
from rehyat_jax.models.folder import read_defaults

CLIP = {
    "image_dim": 20,
    "added_kv_proj_dim": 24,
}


def tiny_i2v(folder, *, experts=False, **more):
    pipeline, options = tiny_pipeline(seed=7, shift=5.0), {}
    config = {name: value for name, value in pipeline.transformer.config.items() if name[0] != "_"}
    torch.manual_seed(8)
    transformers = [
        WanTransformer3DModel.from_config(config | {"in_channels": 36} | more).eval()
        for _ in range(2 if experts else 1)
    ]
    for transformer in transformers:
        for name, parameter in transformer.named_parameters():
            if "image_embedder" in name or "add_" in name:  # these would hardly count
                parameter.requires_grad_(False).copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    if "image_dim" in more:
        sizes = {"hidden_size": 20, "intermediate_size": 36, "num_hidden_layers": 3, "num_attention_heads": 2}
        config = CLIPVisionConfig(**sizes, image_size=28, patch_size=14, hidden_act="gelu")
        options["image_encoder"] = CLIPVisionModel(config).eval()
        options["image_processor"] = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28)
    if experts:
        options |= {"transformer_2": transformers[1], "boundary_ratio": 0.9}
    parts = {**pipeline.components, "transformer": transformers[0], **options}
    made = WanImageToVideoPipeline(**parts)
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(folder)
    return made


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
    assert "does not stream" in pipe.why_not_stream()
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

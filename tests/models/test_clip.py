"""CLIP's vision encoder against transformers, its preparation of images, and its names in both dialects."""

import dataclasses

import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file
from shared.tiers import breadth
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from rehyat_jax.errors import ConfigError
from rehyat_jax.models.checkpoints import convert, describe
from rehyat_jax.models.clip.config import ImageEncoderConfig, Preparation
from rehyat_jax.models.clip.features import ImageFeatures
from rehyat_jax.models.clip.rows import CLIP
from rehyat_jax.video.images import Images
from rehyat_jax.weights.plan import parameters
from rehyat_jax.weights.registry import REGISTRY
from rehyat_jax.weights.rows import torch_shape

TINY = ImageEncoderConfig(
    hidden_size=80,
    intermediate_size=36,
    num_hidden_layers=3,
    num_attention_heads=1,
    image_size=28,
    patch_size=14,
)


def theirs(config=TINY, seed=0):
    torch.manual_seed(seed)
    model = CLIPVisionModel(CLIPVisionConfig(**config.to_dict())).eval().requires_grad_(False)
    for name, tensor in model.named_parameters():
        noise = torch.randn_like(tensor)
        if "norm" in name:
            tensor.copy_(0.2 * noise + (1 if name.endswith("weight") else 0))
        else:
            tensor.copy_(noise / max(tensor[0].numel(), 1) ** 0.5 if tensor.ndim > 1 else 0.2 * noise)
    return model


def original(tensors):
    """The release's file: queries, keys and values in one tensor, axes in front, under ``visual.``, a text encoder
    beside."""
    found = {}
    for row in CLIP:
        for layer in range(TINY.num_hidden_layers) if row.stacked else [None]:
            name, tensor = row.name("original", layer), tensors[row.name("diffusers", layer)]
            tensor = tensor.reshape((1,) * row.leading.get("original", 0) + tuple(tensor.shape))
            found.setdefault(name, []).append(tensor)
    found = {f"visual.{name}": torch.cat(parts) for name, parts in found.items()}
    return found | {"visual.head": torch.zeros(80, 8), "textual.token_embedding.weight": torch.zeros(5, 3)}


def write(model, folder, form):
    folder.mkdir()
    if form == "diffusers":
        model.save_pretrained(folder / "image_encoder")
        return folder / "image_encoder"
    torch.save(original(model.state_dict()), folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    return next(folder.glob("*.pth"))


@pytest.mark.parametrize("shape", breadth(["50x40", "20x60", "28x28", "300x17"], test=2))
def test_images_are_prepared_as_transformers_does(shape):
    """Pillow's bicubic filter on 8 bits both times: the same, but for float32's rounding of (x/255 - mean)/std."""
    image = np.random.default_rng(0).integers(0, 256, (*map(int, shape.split("x")), 3), dtype=np.uint8)
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28)
    expected = processor(images=image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    prepare = Preparation.from_dict(processor.to_dict(), config=TINY)
    np.testing.assert_allclose(prepare(image), expected, atol=2e-6, rtol=0)
    assert Preparation.from_dict(prepare.to_dict(), config=TINY) == prepare


@pytest.mark.parametrize("act", breadth(["gelu", "quick_gelu"]))
def test_features_are_transformers(act, tmp_path):
    """``hidden_states[-2]``: three layers of order one in float32."""
    model = theirs(dataclasses.replace(TINY, hidden_act=act))
    model.save_pretrained(tmp_path / "image_encoder")
    (tmp_path / "model_index.json").write_text("{}")
    image = np.random.default_rng(1).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    features = ImageFeatures(tmp_path)(Images(first=image, last=image[::-1].copy()))
    pixels = torch.from_numpy(np.stack([Preparation.of(TINY)(x) for x in (image, image[::-1])])).permute(0, 3, 1, 2)
    expected = model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2].reshape(-1, 80).numpy()
    assert 0.2 < expected.std() < 5
    np.testing.assert_allclose(features, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["diffusers", "original"])
def test_every_dialect_comes_out_byte_equal(form, tmp_path):
    model = theirs()
    source = write(model, tmp_path / "in", form)
    (part,) = describe(source).components
    assert (part.name, part.dialect, part.config) == ("image_encoder", form, TINY)
    assert part.parameters == sum(tensor.numel() for tensor in model.parameters())
    convert(source, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert CLIPVisionModel.from_pretrained(tmp_path / "out").config.hidden_act == "gelu"


def test_names_and_shapes_at_real_size():
    """ViT-H/14 on the meta device; the release's names as in Wan-Video/Wan2.1 ``wan/modules/clip.py``."""
    config = ImageEncoderConfig()
    with torch.device("meta"):
        model = CLIPVisionModel(CLIPVisionConfig(**config.to_dict()))
    module = REGISTRY["image_encoder"].abstract(config, "float32")
    shapes = {path: leaf.get_value().shape for path, leaf in parameters(nnx.state(module)).items()}
    ours = {"diffusers": {}, "original": {}}
    for row in CLIP:
        shape = shapes.pop(row.ours)
        for layer in range(shape[0]) if row.stacked else [None]:
            one = torch_shape(shape[1:] if row.stacked else shape, row.layout)
            ours["diffusers"][row.name("diffusers", layer)] = one
            parts = row.part.get("original", (0, 1))[1]
            whole = (1,) * row.leading.get("original", 0) + (parts * one[0], *one[1:])
            ours["original"][row.name("original", layer)] = whole
    assert not shapes
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {k.removeprefix("vision_model."): v for k, v in expected.items()} == ours["diffusers"]
    published = {
        "cls_embedding": (1, 1, 1280),
        "pos_embedding": (1, 257, 1280),
        "patch_embedding.weight": (1280, 3, 14, 14),
        "pre_norm.weight": (1280,),
        "transformer.31.attn.to_qkv.weight": (3840, 1280),
        "transformer.31.attn.to_qkv.bias": (3840,),
        "transformer.31.attn.proj.weight": (1280, 1280),
        "transformer.0.mlp.0.weight": (5120, 1280),
        "transformer.0.mlp.2.bias": (1280,),
        "post_norm.bias": (1280,),
    }
    assert published.items() <= ours["original"].items()
    assert len(ours["original"]) == 3 + 4 + 32 * 12


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_attention_heads": 3}, "not a multiple of its 3 heads"),
        ({"hidden_act": "relu"}, "hidden_act must be gelu or quick_gelu, not 'relu'"),
        ({"image_size": 7}, "image_size must be from its patch_size 14"),
        ({"model_type": "siglip"}, "model_type"),
    ],
)
def test_impossible_configurations_are_sentences(change, match):
    with pytest.raises(ConfigError, match=match):
        ImageEncoderConfig.from_dict(TINY.to_dict() | change)

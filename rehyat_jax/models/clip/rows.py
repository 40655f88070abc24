"""The image encoder's tensors under transformers' names, and those of the release's ``models_clip_….pth``.

Sources: transformers ``models/clip/modeling_clip.py``; Wan-Video/Wan2.1 ``wan/modules/clip.py``. The release keeps
queries, keys and values in one tensor, and a text encoder beside, which is not needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from rehyat_jax.errors import CheckpointError
from rehyat_jax.models.clip.config import ImageEncoderConfig
from rehyat_jax.models.clip.encoder import ImageEncoder
from rehyat_jax.weights.registry import Component, Dialect, Shapes
from rehyat_jax.weights.rows import Row, rows_of_linear


def _named(diffusers: str, original: str) -> dict[str, str]:
    return {"diffusers": diffusers, "original": original}


def _norm(ours: str, diffusers: str, original: str) -> Iterator[Row]:
    yield Row(f"{ours}.scale", _named(f"{diffusers}.weight", f"{original}.weight"))
    yield Row(f"{ours}.bias", _named(f"{diffusers}.bias", f"{original}.bias"))


def _rows() -> Iterator[Row]:
    names = _named("embeddings.class_embedding", "cls_embedding")
    yield Row("class_embedding", names, leading={"original": 2})
    names = _named("embeddings.patch_embedding.weight", "patch_embedding.weight")
    yield Row("patch_kernel", names, "conv2d")
    names = _named("embeddings.position_embedding.weight", "pos_embedding")
    yield Row("positions", names, leading={"original": 1})
    yield from _norm("norm_in", "pre_layrnorm", "pre_norm")
    layer, block = "encoder.layers.{}", "transformer.{}"
    yield from _norm("layers.norm1", f"{layer}.layer_norm1", f"{block}.norm1")
    for number, letter in enumerate("qkv"):
        names = _named(f"{layer}.self_attn.{letter}_proj", f"{block}.attn.to_qkv")
        yield from rows_of_linear(f"layers.{letter}", names, part={"original": (number, 3)})
    yield from rows_of_linear("layers.out", _named(f"{layer}.self_attn.out_proj", f"{block}.attn.proj"))
    yield from _norm("layers.norm2", f"{layer}.layer_norm2", f"{block}.norm2")
    yield from rows_of_linear("layers.up", _named(f"{layer}.mlp.fc1", f"{block}.mlp.0"))
    yield from rows_of_linear("layers.down", _named(f"{layer}.mlp.fc2", f"{block}.mlp.2"))
    yield from _norm("norm_out", "post_layernorm", "post_norm")


CLIP = tuple(_rows())


def _infer(shapes: Shapes) -> ImageEncoderConfig:
    """The release's, at the width and depth that the tensors show; its heads are of 80."""
    width, _, patch, _ = shapes.get("embeddings.patch_embedding.weight", rank=4)
    if width % 80:
        raise CheckpointError(f"an image encoder of width {width} needs a config.json beside it that gives its heads")
    shape = shapes.get("embeddings.position_embedding.weight", rank=3 if shapes.dialect == "original" else 2)
    return ImageEncoderConfig(
        hidden_size=width,
        intermediate_size=shapes.get("encoder.layers.0.mlp.fc1.weight", rank=2)[0],
        num_hidden_layers=shapes.layers("encoder.layers.{}.layer_norm1.weight"),
        num_attention_heads=width // 80,
        image_size=math.isqrt(max(shape[-2] - 1, 0)) * patch,
        patch_size=patch,
    )


IMAGE_ENCODER = Component(
    name="image_encoder",
    title="CLIP image encoder",
    module=ImageEncoder,
    config_type=ImageEncoderConfig,
    described_by=lambda config: config.get("model_type") == "clip_vision_model",
    rows=lambda config: CLIP,
    dialects=(
        Dialect(name="diffusers", mark=re.compile(r"(embeddings\.class_embedding|pre_layrnorm\.)")),
        Dialect(name="original", mark=re.compile(r"(cls_embedding|pos_embedding)$")),
    ),
    infer=_infer,
    least_tensors=lambda config: config.num_hidden_layers,
    stem="model",
    released_as=re.compile(r"models_clip|clip_vision", re.IGNORECASE),
    # Older transformers keep the positions' numbers; the release has what leads to the texts' space.
    unneeded=re.compile(r"(embeddings\.position_ids|head)$"),
    optional=True,
)

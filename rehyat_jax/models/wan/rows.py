"""The transformer's tensors under every name that checkpoints give them, and how such a checkpoint is recognised.

Sources: ``diffusers/models/transformers/transformer_wan.py``; ``Wan-Video/Wan2.1``, ``wan/modules/model.py``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from rehyat_jax.errors import CheckpointError
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.student import STUDENT
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.weights.registry import Component, Dialect, Shapes
from rehyat_jax.weights.rows import Row, rows_of_linear

_DIFFUSERS = Dialect(name="diffusers", mark=re.compile(r"condition_embedder\."))
_ORIGINAL = Dialect(name="original", mark=re.compile(r"(time_projection|time_embedding|text_embedding|head)\."))


def _named(diffusers: str, original: str) -> dict[str, str]:
    return {"diffusers": diffusers, "original": original}


def _rows() -> Iterator[Row]:
    patch = "patch_embedding"
    yield Row(f"{patch}.kernel", _named(f"{patch}.weight", f"{patch}.weight"), "conv3d")
    yield Row(f"{patch}.bias", _named(f"{patch}.bias", f"{patch}.bias"))
    for ours, original in (("text_embedder", "text_embedding"), ("time_embedder", "time_embedding")):
        for number in (1, 2):
            name = f"condition_embedder.{ours}.linear_{number}"
            names = _named(name, f"{original}.{2 * number - 2}")
            yield from rows_of_linear(name, names, float32=ours == "time_embedder")
    name = "condition_embedder.time_proj"
    yield from rows_of_linear(name, _named(name, "time_projection.1"))
    for ours, original in (("attn1", "self_attn"), ("attn2", "cross_attn")):
        for letter in "qkv":
            names = _named(f"blocks.{{}}.{ours}.to_{letter}", f"blocks.{{}}.{original}.{letter}")
            yield from rows_of_linear(f"blocks.{ours}.to_{letter}", names)
        names = _named(f"blocks.{{}}.{ours}.to_out.0", f"blocks.{{}}.{original}.o")
        yield from rows_of_linear(f"blocks.{ours}.to_out", names)
        for norm in ("norm_q", "norm_k"):
            names = _named(f"blocks.{{}}.{ours}.{norm}.weight", f"blocks.{{}}.{original}.{norm}.weight")
            yield Row(f"blocks.{ours}.{norm}.scale", names)
    # The original numbers its norms by use (3 is cross-attention's), diffusers by place.
    yield Row("blocks.norm2.scale", _named("blocks.{}.norm2.weight", "blocks.{}.norm3.weight"), float32=True)
    yield Row("blocks.norm2.bias", _named("blocks.{}.norm2.bias", "blocks.{}.norm3.bias"), float32=True)
    yield from rows_of_linear("blocks.ffn.up", _named("blocks.{}.ffn.net.0.proj", "blocks.{}.ffn.0"))
    yield from rows_of_linear("blocks.ffn.down", _named("blocks.{}.ffn.net.2", "blocks.{}.ffn.2"))
    names = _named("blocks.{}.scale_shift_table", "blocks.{}.modulation")
    yield Row("blocks.scale_shift_table", names, "table", float32=True)
    yield Row("scale_shift_table", _named("scale_shift_table", "head.modulation"), "table", float32=True)
    yield from rows_of_linear("proj_out", _named("proj_out", "head.head"))


def _image_rows() -> Iterator[Row]:
    embedder, original = "condition_embedder.image_embedder", "img_emb.proj"
    for ours, theirs, number in (("norm1", "norm1", 0), ("norm2", "norm2", 4)):
        for end, name in (("scale", "weight"), ("bias", "bias")):
            names = _named(f"{embedder}.{theirs}.{name}", f"{original}.{number}.{name}")
            yield Row(f"{embedder}.{ours}.{end}", names, float32=True)
    for ours, theirs, number in (("linear_1", "ff.net.0.proj", 1), ("linear_2", "ff.net.2", 3)):
        yield from rows_of_linear(f"{embedder}.{ours}", _named(f"{embedder}.{theirs}", f"{original}.{number}"))
    for ours, theirs in (("add_k_proj", "k_img"), ("add_v_proj", "v_img")):
        names = _named(f"blocks.{{}}.attn2.{ours}", f"blocks.{{}}.cross_attn.{theirs}")
        yield from rows_of_linear(f"blocks.attn2.{ours}", names)
    names = _named("blocks.{}.attn2.norm_added_k.weight", "blocks.{}.cross_attn.norm_k_img.weight")
    yield Row("blocks.attn2.norm_added_k.scale", names)


#: ``WanTransformer``: 27 tensors a block and 15 around them, 825 for T2V-1.3B.
TRANSFORMER = tuple(_rows())
_IMAGE = tuple(_image_rows())
_TWO_IMAGES = Row(
    "condition_embedder.image_embedder.pos_embed",
    _named("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
    "table",
)


def transformer_rows(config: WanConfig) -> tuple[Row, ...]:
    """Every tensor of a transformer of this configuration, once."""
    if config.image_dim is None:
        return TRANSFORMER
    return (*TRANSFORMER, *_IMAGE) + (() if config.pos_embed_seq_len is None else (_TWO_IMAGES,))


def _infer(shapes: Shapes) -> WanConfig:
    dim, channels, *patch = shapes.get("patch_embedding.weight", rank=5)
    # Every Wan2.1 has heads of 128; the tensors do not tell.
    if dim % 128:
        raise CheckpointError(f"a transformer of width {dim} needs a config.json beside it that gives its heads")
    volume = max(patch[0] * patch[1] * patch[2], 1)
    config = WanConfig(
        num_layers=shapes.layers("blocks.{}.scale_shift_table"),
        num_attention_heads=dim // 128,
        attention_head_dim=128,
        ffn_dim=shapes.get("blocks.0.ffn.net.0.proj.weight", rank=2)[0],
        in_channels=channels,
        out_channels=shapes.get("proj_out.weight", rank=2)[0] // volume,
        text_dim=shapes.get("condition_embedder.text_embedder.linear_1.weight", rank=2)[1],
        freq_dim=shapes.get("condition_embedder.time_embedder.linear_1.weight", rank=2)[1],
        patch_size=(patch[0], patch[1], patch[2]),
    )
    return _with_images(config, shapes)


def _with_images(config: WanConfig, shapes: Shapes) -> WanConfig:
    """What the tensors say of images: a configuration in the original layout does not (Wan2.1's and Wan2.2's are both
    "i2v"); one in diffusers' does."""
    embedder = "condition_embedder.image_embedder"
    if config.image_dim is not None or not shapes.has(f"{embedder}.norm1.weight"):
        return config
    two = f"{embedder}.pos_embed"
    return dataclasses.replace(
        config,
        image_dim=shapes.get(f"{embedder}.norm1.weight", rank=1)[0],
        added_kv_proj_dim=config.dim,
        pos_embed_seq_len=shapes.get(two, rank=3)[1] if shapes.has(two) else None,
    )


def _seen(config: WanConfig, shapes: Shapes) -> WanConfig:
    return _with_images(config, shapes) if shapes.dialect == _ORIGINAL.name else config


def _described(config: Mapping[str, Any]) -> bool:
    return config.get("_class_name") in ("WanTransformer3DModel", "WanModel") or {"dim", "num_heads"} <= set(config)


WAN_TRANSFORMER = Component(
    name="transformer",
    title="Wan transformer",
    module=WanTransformer,
    config_type=WanConfig,
    described_by=_described,
    rows=transformer_rows,
    examples=(WanConfig.t2v_1_3b(), WanConfig.flf2v_14b()),
    seen=_seen,
    dialects=(_DIFFUSERS, _ORIGINAL),
    infer=_infer,
    least_tensors=lambda config: config.num_layers,
    stem="diffusion_pytorch_model",
    released_as=re.compile(r"diffusion_pytorch_model"),
    foreign={
        "a LoRA file, not a whole network": re.compile(
            r"lora_(A|B|up|down|unet|te)|\.lora\.|_lora\.|(^|\.)(hada_|lokr_)|dora_scale|lora_magnitude_vector"
        ),
        "a VACE model": re.compile(r"(^|\.)vace_"),
        "a Fun-Control model": re.compile(r"(^|\.)(control_adapter|ref_conv)\."),
        "a speech-to-video model (S2V)": re.compile(r"(^|\.)(casual_audio_encoder|audio_injector|frame_packer)\."),
        "a model of talking people (MultiTalk, InfiniteTalk)": re.compile(r"(^|\.)(audio_proj|audio_cross_attn)\."),
        "an Animate model": re.compile(r"(^|\.)(face_adapter|motion_encoder|pose_patch_embedding)\."),
        "a SkyReels model with a frame rate": re.compile(r"(^|\.)(fps_embedding|fps_projection)\."),
    },
    # Some files have a norm that nothing reads.
    unneeded=re.compile(r"blocks\.[0-9]+\.attn2\.norm_added_q\."),
    released_in="high_noise_model",
    kept_in=("diffusion_models", "unet"),
    attachment=STUDENT,
    published={
        "Wan2.1 1.3B": WanConfig.t2v_1_3b,
        "Wan2.2 5B": WanConfig.ti2v_5b,
        "Wan2.1 14B": WanConfig.t2v_14b,
        "Wan2.1 I2V-14B": WanConfig.i2v_14b,
        "Wan2.1 FLF2V-14B": WanConfig.flf2v_14b,
        "Wan2.2 I2V-A14B": WanConfig.i2v_a14b,
    },
)
#: Wan2.2's A14B has two: the first for high noise levels, this one for low ones.
WAN_LOW_NOISE = dataclasses.replace(
    WAN_TRANSFORMER,
    name="transformer_2",
    title="Wan low-noise transformer",
    kin="transformer",
    released_in="low_noise_model",
    kept_in=(),
    optional=True,
)

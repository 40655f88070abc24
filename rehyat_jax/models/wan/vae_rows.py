"""The autoencoders' tensors: their names here, in diffusers and in the original ``Wan2.1_VAE.pth``, ``Wan2.2_VAE.pth``.

Sources: diffusers, ``models/autoencoders/autoencoder_kl_wan.py`` and ``scripts/convert_wan_to_diffusers.py``;
Wan-Video/Wan2.1, ``wan/modules/vae.py``; Wan-Video/Wan2.2, ``wan/modules/vae2_2.py``.
"""

from __future__ import annotations

import dataclasses
import itertools
import re

from rehyat_jax.models.wan.config import VAEConfig
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.weights.registry import Component, Dialect, Shapes
from rehyat_jax.weights.rows import Layout, Row


def vae_rows(config: VAEConfig) -> tuple[Row, ...]:
    """Every tensor of the autoencoder of this configuration, once."""
    return (
        *_encoder(config),
        *_conv("quant_conv", "quant_conv", "conv1"),
        *_conv("post_quant_conv", "post_quant_conv", "conv2"),
        *_decoder(config),
    )


def _conv(path: str, diffusers: str, original: str, layout: Layout = "conv3d") -> list[Row]:
    return [
        Row(f"{path}.kernel", {"diffusers": f"{diffusers}.weight", "original": f"{original}.weight"}, layout),
        Row(f"{path}.bias", {"diffusers": f"{diffusers}.bias", "original": f"{original}.bias"}),
    ]


def _norm(path: str, original: str, layout: Layout = "gamma3d") -> Row:
    return Row(f"{path}.scale", {"diffusers": f"{path}.gamma", "original": f"{original}.gamma"}, layout)


def _resnet(path: str, original: str, *, shortcut: bool) -> list[Row]:
    rows = [
        _norm(f"{path}.norm1", f"{original}.residual.0"),
        *_conv(f"{path}.conv1", f"{path}.conv1", f"{original}.residual.2"),
        _norm(f"{path}.norm2", f"{original}.residual.3"),
        *_conv(f"{path}.conv2", f"{path}.conv2", f"{original}.residual.6"),
    ]
    return rows + (_conv(f"{path}.conv_shortcut", f"{path}.conv_shortcut", f"{original}.shortcut") if shortcut else [])


def _resample(path: str, original: str, *, time: bool) -> list[Row]:
    rows = _conv(f"{path}.resample", f"{path}.resample.1", f"{original}.resample.1", "conv2d")
    return rows + (_conv(f"{path}.time_conv", f"{path}.time_conv", f"{original}.time_conv") if time else [])


def _mid_block(path: str, original: str) -> list[Row]:
    attention = f"{path}.attentions.0"
    return [
        *_resnet(f"{path}.resnets.0", f"{original}.0", shortcut=False),
        # Attention alone normalises images, and its gamma has one axis fewer.
        _norm(f"{attention}.norm", f"{original}.1.norm", "gamma2d"),
        *_conv(f"{attention}.to_qkv", f"{attention}.to_qkv", f"{original}.1.to_qkv", "conv2d"),
        *_conv(f"{attention}.proj", f"{attention}.proj", f"{original}.1.proj", "conv2d"),
        *_resnet(f"{path}.resnets.1", f"{original}.2", shortcut=False),
    ]


def _ends(side: str) -> list[Row]:
    return [
        *_conv(f"{side}.conv_in", f"{side}.conv_in", f"{side}.conv1"),
        *_mid_block(f"{side}.mid_block", f"{side}.middle"),
        _norm(f"{side}.norm_out", f"{side}.head.0"),
        *_conv(f"{side}.conv_out", f"{side}.conv_out", f"{side}.head.2"),
    ]


def _encoder(config: VAEConfig) -> list[Row]:
    rows = _ends("encoder")
    return rows + (_down_groups(config) if config.is_residual else _down(config))


def _decoder(config: VAEConfig) -> list[Row]:
    rows = _ends("decoder")
    return rows + (_up_groups(config) if config.is_residual else _up(config))


def _down(config: VAEConfig) -> list[Row]:
    rows: list[Row] = []
    layer, width = 0, 1
    for level, multiple in enumerate(config.dim_mult):
        for _ in range(config.num_res_blocks):
            names = f"encoder.down_blocks.{layer}", f"encoder.downsamples.{layer}"
            rows += _resnet(*names, shortcut=width != multiple)
            layer, width = layer + 1, multiple
        if level < len(config.temperal_downsample):
            names = f"encoder.down_blocks.{layer}", f"encoder.downsamples.{layer}"
            rows += _resample(*names, time=config.temperal_downsample[level])
            layer += 1
    return rows


def _up(config: VAEConfig) -> list[Row]:
    doubling = config.temperal_downsample[::-1]
    rows: list[Row] = []
    layer, width = 0, config.dim_mult[-1] * config.decoder_dim
    for level, multiple in enumerate(config.dim_mult[::-1]):
        block = f"decoder.up_blocks.{level}"
        for index in range(config.num_res_blocks + 1):
            out = multiple * config.decoder_dim
            rows += _resnet(f"{block}.resnets.{index}", f"decoder.upsamples.{layer}", shortcut=width != out)
            layer, width = layer + 1, out
        if level < len(doubling):
            rows += _resample(f"{block}.upsamplers.0", f"decoder.upsamples.{layer}", time=doubling[level])
            layer, width = layer + 1, width // 2
    return rows


def _down_groups(config: VAEConfig) -> list[Row]:
    widths = (1, *config.dim_mult)
    return _groups(
        "encoder.down_blocks", "encoder.downsamples.{}.downsamples", widths, config.num_res_blocks,
        sampler="downsampler", times=config.temperal_downsample,
    )  # fmt: skip


def _up_groups(config: VAEConfig) -> list[Row]:
    multiples = config.dim_mult[::-1]
    return _groups(
        "decoder.up_blocks", "decoder.upsamples.{}.upsamples", (multiples[0], *multiples), config.num_res_blocks + 1,
        sampler="upsampler", times=config.temperal_downsample[::-1],
    )  # fmt: skip


def _groups(
    path: str, original: str, widths: tuple[int, ...], blocks: int, *, sampler: str, times: tuple[bool, ...]
) -> list[Row]:
    """Levels from each width to the next; all but the last have a change of size, the original's last in its list."""
    rows: list[Row] = []
    for level, (width, out) in enumerate(itertools.pairwise(widths)):
        ours, theirs = f"{path}.{level}", original.format(level)
        for index in range(blocks):
            rows += _resnet(f"{ours}.resnets.{index}", f"{theirs}.{index}", shortcut=not index and width != out)
        if level < len(times):
            rows += _resample(f"{ours}.{sampler}", f"{theirs}.{blocks}", time=times[level])
    return rows


def _infer(shapes: Shapes) -> VAEConfig:
    """Wan2.1's or Wan2.2's, at the width and depth that the tensors show."""
    if blocks := shapes.most(_GROUPED):
        config = VAEConfig.wan22()
        return dataclasses.replace(
            config,
            base_dim=shapes.get("encoder.conv_in.weight", rank=5)[0],
            decoder_base_dim=shapes.get("decoder.conv_in.weight", rank=5)[0] // config.dim_mult[-1],
            z_dim=shapes.get("post_quant_conv.weight", rank=5)[0],
            num_res_blocks=blocks,
        )
    stages = len(VAEConfig().dim_mult)
    layers = shapes.most(r"encoder\.(?:downsamples|down_blocks)\.([0-9]+)\.")
    return VAEConfig(
        base_dim=shapes.get("encoder.conv_in.weight", rank=5)[0],
        z_dim=shapes.get("post_quant_conv.weight", rank=5)[0],
        num_res_blocks=max((layers - stages + 1) // stages, 1),
    )


#: A residual block of Wan2.2's first level, by its number.
_GROUPED = r"encoder\.(?:downsamples\.0\.downsamples\.([0-9]+)\.residual|down_blocks\.0\.resnets\.([0-9]+))\."


WAN_VAE = Component(
    name="vae",
    title="Wan VAE",
    module=WanVAE,
    config_type=VAEConfig,
    described_by=lambda config: config.get("_class_name") == "AutoencoderKLWan",
    rows=vae_rows,
    examples=(VAEConfig.wan(), VAEConfig.wan22()),
    dialects=(
        Dialect(
            name="diffusers",
            mark=re.compile(r"(encoder\.conv_in|encoder\.down_blocks|decoder\.up_blocks|post_quant_conv)\."),
        ),
        Dialect(name="original", mark=re.compile(r"(encoder\.downsamples|decoder\.upsamples|decoder\.middle)\.")),
    ),
    infer=_infer,
    least_tensors=lambda config: config.num_res_blocks,
    stem="diffusion_pytorch_model",
    released_as=re.compile(r".*vae", re.IGNORECASE),
)

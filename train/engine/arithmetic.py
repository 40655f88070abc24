"""The arithmetic of Wan's transformer, counted from its sizes, and what devices can do at most.

XLA's own cost analysis counts the body of a loop (over layers, over chunks) once and a kernel of ours not at all; this
counts the products of the equations: multiplications and additions, two for each element of a product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rehyat_jax.mixers.base import MixerConfig
from rehyat_jax.mixers.config import Conversion
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.mixing import Mixing

#: Peak arithmetic of one device in bfloat16, dense, in TFLOP/s, by what JAX calls the device; from the data sheets of
#: NVIDIA (A100, H100, H200, GH200, B200) and Google Cloud (TPU v4 to v7).
PEAK_TFLOPS: dict[str, float] = {
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H200": 989.0,
    "NVIDIA GH200 480GB": 989.0,
    "NVIDIA B200": 2250.0,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "TPU7x": 2307.0 / 2,  # a chip is two devices
}


def forward_flops(
    model: WanConfig, hybrid: Conversion | None, *, shape: tuple[int, int, int], text_tokens: int = 512
) -> int:
    """Floating-point operations of one forward pass on one clip; a pass with its gradient is three times that.

    Args:
        hybrid: None: softmax over all tokens in every block.
        shape: the clip's latent frames, rows and columns.
        text_tokens: padding among them: Wan's text is not masked.
    """
    frames, rows, columns = (side // patch for side, patch in zip(shape, model.patch_size, strict=True))
    frame, patch, width = rows * columns, math.prod(model.patch_size), model.dim
    tokens = frames * frame
    ends = tokens * patch * (model.in_channels + model.out_channels) * width
    text = text_tokens * (model.text_dim + width) * width
    time = (model.freq_dim + 7 * width) * width
    projections = (6 * tokens + 2 * text_tokens) * width**2
    block = projections + 2 * tokens * text_tokens * width + 2 * tokens * width * model.ffn_dim
    mixers = Mixing.of(hybrid, model.num_layers).mixers
    attention = sum(_mixer_flops(model, mixer, frames=frames, frame=frame) for mixer in mixers)
    return 2 * (ends + text + time + model.num_layers * block) + attention


def distillation_flops(
    model: WanConfig,
    mixers: Sequence[MixerConfig],
    *,
    shape: tuple[int, int, int],
    updates: int,
    text_tokens: int = 512,
) -> int:
    """Floating-point operations of a round on one point: the teacher's forward pass, and so many updates of every
    mixer on it, a block's each."""
    frames, rows, columns = (side // patch for side, patch in zip(shape, model.patch_size, strict=True))
    attention = sum(_mixer_flops(model, mixer, frames=frames, frame=rows * columns) for mixer in mixers)
    return forward_flops(model, None, shape=shape, text_tokens=text_tokens) + 3 * updates * attention


def _mixer_flops(model: WanConfig, mixer: MixerConfig, *, frames: int, frame: int) -> int:
    heads, head_dim = model.num_attention_heads, model.attention_head_dim
    return mixer.flops(frames=frames, frame=frame, heads=heads, head_dim=head_dim)

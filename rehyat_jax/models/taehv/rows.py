"""The tensors of TAEHV's files (madebyollin/taehv ``taehv.py``), whose numbers are places in a list of layers.

The encoders that the files have beside are not needed: images are encoded by the model's own autoencoder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from rehyat_jax.errors import CheckpointError
from rehyat_jax.models.taehv.config import CLASS_NAME, TinyDecoderConfig
from rehyat_jax.models.taehv.decoder import BLOCKS, TinyDecoder
from rehyat_jax.weights.registry import Component, Dialect, Shapes
from rehyat_jax.weights.rows import Row

#: By dialect: the published files', and what is written, which is the same.
_DIALECTS = "original", "diffusers"
#: Of a level: its blocks, what doubles the sides (without tensors), what makes frames, a convolution.
_FIRST, _LEVEL = 3, BLOCKS + 3
_OUT = _FIRST + 3 * _LEVEL + 1  # behind an activation


def _named(name: str) -> dict[str, str | tuple[str, ...]]:
    return dict.fromkeys(_DIALECTS, name)


def _conv(ours: str, name: str, *, bias: bool = True) -> Iterator[Row]:
    yield Row(f"{ours}.kernel", _named(f"{name}.weight"), "conv2d")
    if bias:
        yield Row(f"{ours}.bias", _named(f"{name}.bias"))


def _rows() -> Iterator[Row]:
    yield from _conv("conv_in", "decoder.1")
    for level in range(3):
        ours, first = f"levels.{level}", _FIRST + level * _LEVEL
        for block in range(BLOCKS):
            for number in range(3):
                name = f"decoder.{first + block}.conv.{2 * number}"
                yield from _conv(f"{ours}.blocks.{block}.convs.{number}", name)
        yield Row(f"{ours}.grow", _named(f"decoder.{first + BLOCKS + 1}.conv.weight"), "pointwise2d")
        yield from _conv(f"{ours}.conv", f"decoder.{first + BLOCKS + 2}", bias=False)
    yield from _conv("conv_out", f"decoder.{_OUT}")


ROWS = tuple(_rows())


def _infer(shapes: Shapes) -> TinyDecoderConfig:
    first, z_dim, *_ = shapes.get("decoder.1.weight", rank=4)
    widths, times = [first], []
    for level in range(3):
        start = _FIRST + level * _LEVEL
        grown, width, *_ = shapes.get(f"decoder.{start + BLOCKS + 1}.conv.weight", rank=4)
        times.append(max(grown // max(width, 1), 1))
        widths.append(shapes.get(f"decoder.{start + BLOCKS + 2}.weight", rank=4)[0])
    channels = shapes.get(f"decoder.{_OUT}.weight", rank=4)[0]
    patch = math.isqrt(channels // 3)
    if channels != 3 * patch**2:
        raise CheckpointError(f"a decoder of {channels} channels makes no pixels of three colours")
    return TinyDecoderConfig(z_dim=z_dim, widths=tuple(widths), times=tuple(times), patch_size=patch)


PREVIEW_DECODER = Component(
    name="preview_decoder",
    title="tiny decoder for previews (TAEHV)",
    module=TinyDecoder,
    config_type=TinyDecoderConfig,
    described_by=lambda config: config.get("_class_name") == CLASS_NAME,
    rows=lambda config: ROWS,
    dialects=tuple(
        Dialect(name=name, mark=re.compile(r"decoder\.[0-9]+\.conv\.[0-9]+\.(weight|bias)$")) for name in _DIALECTS
    ),
    infer=_infer,
    least_tensors=lambda config: 1,
    stem="diffusion_pytorch_model",
    released_as=re.compile(r"(light)?tae", re.IGNORECASE),
    unneeded=re.compile(r"encoder\."),
    optional=True,
)

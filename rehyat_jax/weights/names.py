"""One table of tensor names a network: ours, the diffusers layout's and the original's, read in any direction.

A row pairs a parameter of our module with the tensor that fills it. ``{}`` stands for a layer's number in a stack,
which ours keeps as the leading axis of one array and the files keep as one tensor a layer. Patterns are anchored at
both ends: ``modulation`` never matches inside ``head.modulation``.

Sources: ``diffusers/models/transformers/transformer_wan.py``, ``transformers/models/umt5/modeling_umt5.py`` and
``Wan-Video/Wan2.1``: ``wan/modules/{model,t5}.py``. The autoencoder's rows are in ``vae_names.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np

from rehyat_jax.errors import CheckpointError

#: Whose names: those of the diffusers layout (transformers' for the text encoder) or of the original release.
Dialect = Literal["diffusers", "original"]

#: How our array lies against the file's (``torch_view`` gives each as a view):
#: same; linear [in,out] / [out,in]; conv2d HWIO / OIHW; conv3d DHWIO / OIDHW; pointwise2d [in,out] / [out,in,1,1];
#: table [n,d] / [1,n,d]; gamma2d [c] / [c,1,1]; gamma3d [c] / [c,1,1,1].
Kind = Literal["same", "linear", "conv2d", "conv3d", "pointwise2d", "table", "gamma2d", "gamma3d"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter under its three names."""

    ours: str
    diffusers: str
    original: str
    kind: Kind = "same"
    #: Stays float32 when the model is loaded in a narrower type (diffusers' ``_keep_in_fp32_modules``).
    float32: bool = False
    #: A second name under which the diffusers dialect may store the same tensor (tied weights).
    alias: str | None = None

    def name(self, dialect: Dialect, layer: int | None = None) -> str:
        """The file's name, with the layer's number in place."""
        pattern = self.diffusers if dialect == "diffusers" else self.original
        return pattern if layer is None else pattern.replace("{}", str(layer))

    @property
    def stacked(self) -> bool:
        return "{}" in self.diffusers


def torch_view(array: np.ndarray, kind: Kind) -> np.ndarray:
    """Our array (one layer of it) seen in the file's shape, without a copy: write through it to load, read to save."""
    match kind:
        case "same":
            return array
        case "linear":
            return array.T
        case "conv2d":
            return array.transpose(3, 2, 0, 1)
        case "conv3d":
            return array.transpose(4, 3, 0, 1, 2)
        case "pointwise2d":
            return array.T[:, :, None, None]
        case "table":
            return array[None]
        case "gamma2d":
            return array[:, None, None]
        case "gamma3d":
            return array[:, None, None, None]


def torch_shape(shape: tuple[int, ...], kind: Kind) -> tuple[int, ...]:
    """The file's shape for one layer of ours."""
    return torch_view(np.broadcast_to(np.uint8(0), shape), kind).shape


def linear(ours: str, diffusers: str, original: str, *, bias: bool = True, float32: bool = False) -> Iterator[Row]:
    """Rows of a linear layer."""
    yield Row(f"{ours}.kernel", f"{diffusers}.weight", f"{original}.weight", "linear", float32)
    if bias:
        yield Row(f"{ours}.bias", f"{diffusers}.bias", f"{original}.bias", "same", float32)


def _transformer_rows() -> Iterator[Row]:
    yield Row("patch_embedding.kernel", "patch_embedding.weight", "patch_embedding.weight", "conv3d")
    yield Row("patch_embedding.bias", "patch_embedding.bias", "patch_embedding.bias")
    for ours, original in (("text_embedder", "text_embedding"), ("time_embedder", "time_embedding")):
        for number in (1, 2):
            name = f"condition_embedder.{ours}.linear_{number}"
            yield from linear(name, name, f"{original}.{2 * number - 2}", float32=ours == "time_embedder")
    yield from linear("condition_embedder.time_proj", "condition_embedder.time_proj", "time_projection.1")
    for ours, original in (("attn1", "self_attn"), ("attn2", "cross_attn")):
        for letter in "qkv":
            name = f"{ours}.to_{letter}"
            yield from linear(f"blocks.{name}", f"blocks.{{}}.{name}", f"blocks.{{}}.{original}.{letter}")
        yield from linear(f"blocks.{ours}.to_out", f"blocks.{{}}.{ours}.to_out.0", f"blocks.{{}}.{original}.o")
        for norm in ("norm_q", "norm_k"):
            theirs = f"blocks.{{}}.{original}.{norm}.weight"
            yield Row(f"blocks.{ours}.{norm}.scale", f"blocks.{{}}.{ours}.{norm}.weight", theirs)
    # The original numbers its norms by use (3 is cross-attention's), diffusers by place.
    yield Row("blocks.norm2.scale", "blocks.{}.norm2.weight", "blocks.{}.norm3.weight", float32=True)
    yield Row("blocks.norm2.bias", "blocks.{}.norm2.bias", "blocks.{}.norm3.bias", float32=True)
    yield from linear("blocks.ffn.up", "blocks.{}.ffn.net.0.proj", "blocks.{}.ffn.0")
    yield from linear("blocks.ffn.down", "blocks.{}.ffn.net.2", "blocks.{}.ffn.2")
    table = ("blocks.scale_shift_table", "blocks.{}.scale_shift_table", "blocks.{}.modulation")
    yield Row(*table, "table", float32=True)
    yield Row("scale_shift_table", "scale_shift_table", "head.modulation", "table", float32=True)
    yield from linear("proj_out", "proj_out", "head.head")


#: ``WanTransformer``: 27 tensors a block and 15 around them, 825 for T2V-1.3B.
TRANSFORMER = tuple(_transformer_rows())


def _umt5_rows() -> Iterator[Row]:
    yield Row("shared.embedding", "shared.weight", "token_embedding.weight", alias="encoder.embed_tokens.weight")
    attention, feed_forward = "encoder.block.{}.layer.0", "encoder.block.{}.layer.1"
    for letter in "qkvo":
        theirs = f"{attention}.SelfAttention.{letter}"
        yield from linear(f"block.self_attention.{letter}", theirs, f"blocks.{{}}.attn.{letter}", bias=False)
    bias = "relative_attention_bias"
    theirs = f"{attention}.SelfAttention.{bias}.weight"
    yield Row(f"block.self_attention.{bias}.embedding", theirs, "blocks.{}.pos_embedding.embedding.weight")
    yield Row("block.self_attention_norm.scale", f"{attention}.layer_norm.weight", "blocks.{}.norm1.weight")
    for ours, original in (("wi_0", "gate.0"), ("wi_1", "fc1"), ("wo", "fc2")):
        theirs = f"{feed_forward}.DenseReluDense.{ours}"
        yield from linear(f"block.ffn.{ours}", theirs, f"blocks.{{}}.ffn.{original}", bias=False)
    yield Row("block.ffn_norm.scale", f"{feed_forward}.layer_norm.weight", "blocks.{}.norm2.weight")
    yield Row("final_layer_norm.scale", "encoder.final_layer_norm.weight", "norm.weight")


#: ``UMT5Encoder``. The embedding is stored under either or both of two tied names.
UMT5 = tuple(_umt5_rows())


@functools.lru_cache(maxsize=4096)
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{\}", "(0|[1-9][0-9]*)"))


def translate(name: str, rows: Iterable[Row], source: Dialect, target: Dialect) -> str | None:
    """``name`` of one dialect in the other; None when no row knows it."""
    for row in rows:
        if match := _pattern(row.name(source)).fullmatch(name):
            return row.name(target, int(match[1]) if row.stacked else None)
    return None


#: Wrappers that torch puts between the parts of a path.
_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"})
#: Containers that training programs and ComfyUI put before a path. No name of ours begins with one.
_CONTAINERS = frozenset({"state_dict", "generator_ema", "generator", "model", "diffusion_model", "module"})


def strip_prefixes(names: Iterable[str]) -> dict[str, str]:
    """Clean names, each with the name that the file gives it.

    A training checkpoint may hold a generator, its running average and a critic (the Self-Forcing family): the average
    is taken where there is one, as its authors advise, else the generator.

    Raises:
        CheckpointError: two tensors of the file have the same clean name.
    """
    kept = list(names)
    for first in ("generator_ema.", "generator."):
        if chosen := [name for name in kept if name.startswith(first)]:
            kept = chosen
            break
    clean: dict[str, str] = {}
    for name in kept:
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        while len(parts) > 1 and parts[0] in _CONTAINERS:
            del parts[0]
        short = ".".join(parts)
        if short in clean:
            raise CheckpointError(f"ambiguous checkpoint: {clean[short]!r} and {name!r} are both {short!r}")
        clean[short] = name
    return clean

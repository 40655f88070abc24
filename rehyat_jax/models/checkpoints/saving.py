"""A network to its folder, in the diffusers layout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from flax import nnx

from rehyat_jax.adapters.linear import linear_layers
from rehyat_jax.errors import CheckpointError
from rehyat_jax.models.umt5.encoder import UMT5Encoder
from rehyat_jax.models.wan.student import write_student
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.runtime.arguments import user_path
from rehyat_jax.weights.plan import parameters
from rehyat_jax.weights.registry import WRITTEN, component
from rehyat_jax.weights.save import of_module, write_network
from rehyat_jax.weights.writing import MAX_SHARD_BYTES, whole_folder


def save_transformer(
    module: WanTransformer, folder: str | os.PathLike[str], *, dtype: Any = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write ``config.json`` and ``diffusion_pytorch_model.safetensors`` (or shards and an index), and ``rehyat/``.

    The last is the student's part; without it the folder is the teacher, as diffusers reads it.

    Args:
        folder: new or empty; it appears whole or not at all.
        dtype: None keeps each parameter's own; otherwise as in `load_transformer`, float32 parts staying float32.
        max_shard_bytes: more than this is split into shards.

    Raises:
        CheckpointError: the folder is not empty or cannot be written, or a parameter is not finite.
    """
    _check_wide(module)
    with whole_folder(user_path("folder", folder)) as partial:
        _write(module.with_hybrid(None), partial, "transformer", dtype, max_shard_bytes)
        if module.hybrid is not None:
            write_student(partial, module.config, module.hybrid, module.hybrid_blocks, dtype=dtype)


def save_vae(
    module: WanVAE, folder: str | os.PathLike[str], *, dtype: Any = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write a VAE's folder; see `save_transformer`."""
    with whole_folder(user_path("folder", folder)) as partial:
        _write(module, partial, "vae", dtype, max_shard_bytes)


def save_text_encoder(
    module: UMT5Encoder, folder: str | os.PathLike[str], *, dtype: Any = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write ``config.json`` and ``model.safetensors``, the embedding as ``shared.weight``; see `save_transformer`."""
    _check_wide(module)
    with whole_folder(user_path("folder", folder)) as partial:
        _write(module, partial, "text_encoder", dtype, max_shard_bytes)


def _check_wide(module: Any) -> None:
    if any(layer.scale is not None for layer in linear_layers(module).values()):
        raise CheckpointError(
            "this network is kept in eight bits: convert its checkpoint with quantize in place of this"
        )


def _write(module: Any, folder: Path, name: str, dtype: Any, max_shard_bytes: int) -> None:
    kind = component(name)
    variables = parameters(nnx.state(module))
    tensors = of_module(kind.table(module.config), variables, dialect=WRITTEN, dtype=dtype)
    write_network(folder, module.config, tensors, stem=kind.stem, max_shard_bytes=max_shard_bytes)

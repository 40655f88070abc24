"""Modules into the diffusers layout, readable by diffusers and transformers."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from rehyat_jax.models.umt5.encoder import UMT5Encoder
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.weights.component import BY_NAME, ComponentName, narrow
from rehyat_jax.weights.copying import blocks
from rehyat_jax.weights.hybrid import outgoing, write_hybrid
from rehyat_jax.weights.names import Row, torch_view
from rehyat_jax.weights.plan import pair, parameters
from rehyat_jax.weights.writing import MAX_SHARD_BYTES, Outgoing, whole_folder, write_json, write_tensors

#: Before the path of what goes into ``rehyat/``.
_HYBRID = "hybrid_blocks."


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
    _save(module, Path(folder), "transformer", dtype, max_shard_bytes)


def save_vae(
    module: WanVAE, folder: str | os.PathLike[str], *, dtype: Any = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write a VAE's folder; see `save_transformer`."""
    _save(module, Path(folder), "vae", dtype, max_shard_bytes)


def save_text_encoder(
    module: UMT5Encoder, folder: str | os.PathLike[str], *, dtype: Any = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write ``config.json`` and ``model.safetensors``, the embedding as ``shared.weight``; see `save_transformer`."""
    _save(module, Path(folder), "text_encoder", dtype, max_shard_bytes)


def _save(module: Any, folder: Path, name: ComponentName, dtype: Any, max_shard_bytes: int) -> None:
    component = BY_NAME[name]
    every = parameters(nnx.state(module))
    hybrid = {path.removeprefix(_HYBRID): variable for path, variable in every.items() if path.startswith(_HYBRID)}
    variables = {path: variable for path, variable in every.items() if not path.startswith(_HYBRID)}
    shapes = {path: tuple(variable.get_value().shape) for path, variable in variables.items()}
    table = pair(component.rows(module.config), shapes)
    tensors = [
        _outgoing(row, layer, variables[path], dtype)
        for path, row in table.items()
        for layer in (range(shapes[path][0]) if row.stacked else (None,))
    ]
    with whole_folder(folder) as partial:
        write_json(partial / "config.json", module.config.to_dict())
        write_tensors(partial, component.stem, tensors, max_shard_bytes=max_shard_bytes)
        if isinstance(module, WanTransformer) and module.hybrid is not None:
            write_hybrid(partial, module.hybrid, outgoing(module.config, module.hybrid, hybrid, dtype))


def _outgoing(row: Row, layer: int | None, variable: nnx.Variable, dtype: Any) -> Outgoing:
    value = variable.get_value()
    target = np.dtype(value.dtype) if dtype is None else narrow(row, jnp.dtype(dtype))
    # The shape of one layer, seen through an array of no size, so that nothing leaves the device yet.
    shape = value.shape if layer is None else value.shape[1:]
    view = torch_view(np.broadcast_to(np.zeros((), target), shape), row.kind)
    name = row.name("diffusers", layer)

    def numbers() -> Any:
        array = np.asarray(value if layer is None else value[layer])
        return blocks(torch_view(array, row.kind), target, f"tensor {name!r}")

    return Outgoing(name=name, dtype=target, shape=view.shape, blocks=functools.partial(numbers))

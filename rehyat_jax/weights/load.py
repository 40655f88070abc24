"""Checkpoints on disk into modules: each tensor read, cast and laid straight into the array that the module keeps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rehyat_jax.errors import CheckpointError
from rehyat_jax.models.dit import WanTransformer
from rehyat_jax.models.umt5 import UMT5Encoder
from rehyat_jax.models.vae import WanVAE
from rehyat_jax.weights.component import ComponentName, narrow
from rehyat_jax.weights.copying import fill
from rehyat_jax.weights.names import torch_view
from rehyat_jax.weights.plan import Slot, make_plan, parameters

#: XLA takes over a host buffer without copying it when it begins on such a boundary.
_ALIGNMENT = 64


def load_transformer(path: str | os.PathLike[str], *, dtype: Any = jnp.float32) -> WanTransformer:
    """A Wan text-to-video transformer.

    Args:
        path: a whole checkpoint's folder, the transformer's own, or a weights file; diffusers or original layout,
            whichever prefixes. A file without ``config.json`` beside it is taken to have heads of 128, as all of Wan's.
        dtype: of computation and storage: float32, bfloat16 or float16. What diffusers keeps in float32 (the time
            embedder, the modulation tables, the affine norms) stays float32.

    Raises:
        CheckpointError: missing, truncated, foreign, incomplete, misshapen or not finite.
        ConfigError: its configuration is impossible or another architecture's.
    """
    return cast(WanTransformer, _load(Path(path), "transformer", dtype))


def load_vae(path: str | os.PathLike[str], *, dtype: Any = jnp.float32) -> WanVAE:
    """A Wan2.1 VAE. Arguments and errors as `load_transformer`; the original file has Wan2.1's latent statistics."""
    return cast(WanVAE, _load(Path(path), "vae", dtype))


def load_text_encoder(path: str | os.PathLike[str], *, dtype: Any = jnp.float32) -> UMT5Encoder:
    """A UMT5 encoder. Arguments and errors as `load_transformer`; an embedding of zeros alone is refused as well."""
    return cast(UMT5Encoder, _load(Path(path), "text_encoder", dtype))


def _load(path: Path, name: ComponentName, dtype: Any) -> nnx.Module:
    if jnp.dtype(dtype).name not in ("float32", "bfloat16", "float16"):
        raise CheckpointError(f"a model cannot be loaded as {jnp.dtype(dtype).name}: float32, bfloat16 or float16")
    plan = make_plan(path, name, dtype=dtype)
    by_path: dict[str, list[Slot]] = {}
    for slot in plan.slots:
        by_path.setdefault(slot.row.ours, []).append(slot)
    module = plan.abstract
    state = nnx.state(module)
    for ours, variable in parameters(state).items():
        slots = by_path[ours]
        array = _aligned(variable.get_value().shape, narrow(slots[0].row, dtype))
        for slot in slots:
            place = array if slot.layer is None else array[slot.layer]
            fill(torch_view(place, slot.row.kind), plan.read(slot, array.dtype))
        # The array is ours alone and never written again: the backend may keep it as it is.
        variable.set_value(jax.device_put(array, may_alias=True).block_until_ready())
    nnx.update(module, state)
    return module


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.empty(count + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + count].view(dtype).reshape(shape)

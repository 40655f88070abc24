"""Checkpoints on disk into modules: each tensor read, cast and laid straight into the array that the module keeps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rehyat_jax.errors import CheckpointError
from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.umt5.encoder import UMT5Encoder
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.weights.component import narrow
from rehyat_jax.weights.copying import fill
from rehyat_jax.weights.hybrid import fill_hybrid, find_hybrid, make_hybrid_plan
from rehyat_jax.weights.names import torch_view
from rehyat_jax.weights.plan import Plan, Slot, make_plan, parameters

#: XLA takes over a host buffer without copying it when it begins on such a boundary.
_ALIGNMENT = 64


def load_transformer(
    path: str | os.PathLike[str], *, dtype: Any = jnp.float32, hybrid: HybridConfig | Literal["auto"] | None = "auto"
) -> WanTransformer:
    """A Wan text-to-video transformer: the softmax teacher, or the student where the folder has a ``rehyat`` part.

    Args:
        path: a whole checkpoint's folder, the transformer's own, or a weights file; diffusers or original layout,
            whichever prefixes. A file without ``config.json`` beside it is taken to have heads of 128, as all of Wan's.
        dtype: of computation and storage: float32, bfloat16 or float16. What diffusers keeps in float32 (the time
            embedder, the modulation tables, the affine norms) stays float32; so does the hybrid blocks' decay.
        hybrid: ``"auto"``: as the folder is. None: the teacher alone. A configuration: the teacher with these blocks
            converted and newly initialised (from seed 0; `WanTransformer.with_hybrid` takes another), where a
            conversion begins.

    Raises:
        CheckpointError: missing, truncated, foreign, incomplete, misshapen or not finite, in either part.
        ConfigError: a configuration is impossible or another architecture's, or ``hybrid`` names a block too many.
    """
    dtype = _known(dtype)
    plan = make_plan(Path(path), "transformer", dtype=dtype)
    folder = find_hybrid(plan.weights) if hybrid == "auto" else None
    student = None if folder is None else make_hybrid_plan(folder, plan.config, dtype=dtype)
    module = cast(WanTransformer, _filled((student and student.softmax) or plan, dtype))
    if isinstance(hybrid, HybridConfig):
        return module.with_hybrid(hybrid, rngs=nnx.Rngs(0))
    if student is None:
        return module
    blocks = fill_hybrid(student, plan.config, dtype=dtype)
    return module.with_hybrid(student.config, blocks=blocks)


def load_vae(path: str | os.PathLike[str], *, dtype: Any = jnp.float32) -> WanVAE:
    """A Wan2.1 VAE. Arguments and errors as `load_transformer`; the original file has Wan2.1's latent statistics."""
    return cast(WanVAE, _filled(make_plan(Path(path), "vae", dtype=_known(dtype)), dtype))


def load_text_encoder(path: str | os.PathLike[str], *, dtype: Any = jnp.float32) -> UMT5Encoder:
    """A UMT5 encoder. Arguments and errors as `load_transformer`; an embedding of zeros alone is refused as well."""
    return cast(UMT5Encoder, _filled(make_plan(Path(path), "text_encoder", dtype=_known(dtype)), dtype))


def _known(dtype: Any) -> np.dtype:
    if jnp.dtype(dtype).name not in ("float32", "bfloat16", "float16"):
        raise CheckpointError(f"a model cannot be loaded as {jnp.dtype(dtype).name}: float32, bfloat16 or float16")
    return jnp.dtype(dtype)


def _filled(plan: Plan, dtype: Any) -> nnx.Module:
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

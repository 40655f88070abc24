"""A load plan into a module: each tensor read, cast and laid straight into the array that the module keeps."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx

from rehyat_jax.errors import CheckpointError, RehyatError
from rehyat_jax.runtime.arguments import float_dtype
from rehyat_jax.weights.copying import fill
from rehyat_jax.weights.plan import LoadPlan, Slot, parameters
from rehyat_jax.weights.registry import narrow
from rehyat_jax.weights.rows import torch_view

#: XLA takes over a host buffer without copying it when it begins on such a boundary.
_ALIGNMENT = 64


def known_dtype(dtype: Any) -> np.dtype:
    """
    Raises:
        CheckpointError: no model is loaded as this.
    """
    try:
        return float_dtype("dtype", dtype, ("float32", "bfloat16", "float16"))
    except RehyatError as error:
        raise CheckpointError(str(error)) from error


def filled(plan: LoadPlan, *, dtype: Any) -> nnx.Module:
    """The module with the file's numbers.

    Raises:
        CheckpointError: as `LoadPlan.read`.
    """
    by_path: dict[str, list[Slot]] = {}
    for slot in plan.slots:
        by_path.setdefault(slot.row.ours, []).append(slot)
    module = plan.abstract
    state = nnx.state(module)
    for ours, variable in parameters(state).items():
        slots = by_path[ours]
        array = _aligned(variable.get_value().shape, narrow(slots[0].row, dtype))
        for slot in slots:
            place = array if slot.place is None else array[slot.place]
            fill(torch_view(place, slot.row.layout), plan.read(slot, array.dtype))
        # The array is ours alone and never written again: the backend may keep it as it is.
        variable.set_value(jax.device_put(array, may_alias=True).block_until_ready())
    nnx.update(module, state)
    return module


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.empty(count + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + count].view(dtype).reshape(shape)

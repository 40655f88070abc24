"""A load plan into a module: each tensor read, cast and laid straight into the array that the module keeps."""

from __future__ import annotations

from collections.abc import Set
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
    by_path, module = _by_path(plan), plan.abstract
    state = nnx.state(module)
    for ours, variable in parameters(state).items():
        array = _read(plan, by_path[ours], variable.get_value().shape, dtype)
        # The array is ours alone and never written again: the backend may keep it as it is.
        variable.set_value(jax.device_put(array, may_alias=True).block_until_ready())
    nnx.update(module, state)
    return module


def refilled(module: nnx.Module, plan: LoadPlan, paths: Set[str], *, dtype: Any) -> nnx.Module:
    """The same module with some parameters read again, each on the devices that it is on; the others are shared.

    Raises:
        CheckpointError: as `LoadPlan.read`.
    """
    by_path = _by_path(plan)
    graph, state = nnx.split(module)
    state = jax.tree.map(lambda x: x, state)  # variables of its own
    for ours, variable in parameters(state).items():
        if ours in paths:
            now = variable.get_value()
            array = _read(plan, by_path[ours], now.shape, dtype)
            variable.set_value(jax.device_put(array, now.sharding, may_alias=True).block_until_ready())
    return nnx.merge(graph, state)


def _by_path(plan: LoadPlan) -> dict[str, list[Slot]]:
    by_path: dict[str, list[Slot]] = {}
    for slot in plan.slots:
        by_path.setdefault(slot.row.ours, []).append(slot)
    return by_path


def _read(plan: LoadPlan, slots: list[Slot], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """A parameter on the host, as the module keeps it."""
    array = _aligned(shape, narrow(slots[0].row, dtype))
    for slot in slots:
        place = array if slot.place is None else array[slot.place]
        fill(torch_view(place, slot.row.layout), plan.read(slot, array.dtype))
    return array


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.empty(count + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + count].view(dtype).reshape(shape)

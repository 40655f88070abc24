"""A load plan into a module: each tensor read, cast and laid straight into the array that the module keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

import jax
import numpy as np
from flax import nnx

from rehyat_jax.errors import CheckpointError, RehyatError
from rehyat_jax.runtime.arguments import float_dtype
from rehyat_jax.weights.copying import fill
from rehyat_jax.weights.files import LARGEST
from rehyat_jax.weights.plan import LoadPlan, Slot, parameters
from rehyat_jax.weights.registry import narrow
from rehyat_jax.weights.rows import scale_of, torch_view

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
    variables = parameters(state)
    for ours, slots in by_path.items():
        # The array is ours alone and never written again: the backend may keep it as it is.
        _fill(plan, slots, variables, ours, dtype, lambda array, _: jax.device_put(array, may_alias=True))
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
    variables = parameters(state)
    for ours in paths:
        _fill(
            plan, by_path[ours], variables, ours, dtype, lambda x, now: jax.device_put(x, now.sharding, may_alias=True)
        )
    return nnx.merge(graph, state)


#: An array to its devices, where another is now.
_Put = Callable[[np.ndarray, Any], jax.Array]


def _fill(
    plan: LoadPlan, slots: list[Slot], variables: Mapping[str, nnx.Variable], ours: str, dtype: Any, put: _Put
) -> None:
    """A parameter, and its scales where it is kept in eight bits."""
    now = variables[ours].get_value()
    if now.dtype not in LARGEST:
        variables[ours].set_value(put(_read(plan, slots, now.shape, dtype), now).block_until_ready())
        return
    scales = variables[scale_of(ours)]
    for variable, array in zip(
        (variables[ours], scales), _read_rows(plan, slots, now.shape, np.dtype(now.dtype)), strict=True
    ):
        variable.set_value(put(array, variable.get_value()).block_until_ready())


def _read_rows(
    plan: LoadPlan, slots: list[Slot], shape: tuple[int, ...], kind: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Stacked kernels, and the scales of their outputs."""
    kernels, scales = _aligned(shape, kind), _aligned((shape[0], shape[-1]), np.dtype(np.float32))
    for slot in slots:
        start, rows = 0, torch_view(kernels[slot.place], slot.row.layout)
        for block, of_rows in plan.read_rows(slot, kind):
            rows[start : start + len(block)], scales[slot.place, start : start + len(block)] = block, of_rows
            start += len(block)
    return kernels, scales


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

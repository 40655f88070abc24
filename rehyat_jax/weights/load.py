"""A load plan into a module: each tensor read, cast and laid straight into the array that the module keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Set
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from rehyat_jax.errors import CheckpointError, RehyatError
from rehyat_jax.runtime.arguments import float_dtype
from rehyat_jax.runtime.sharding import parameter_spec
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


def filled(plan: LoadPlan, *, dtype: Any, mesh: Mesh | None = None) -> nnx.Module:
    """The module with the file's numbers.

    Args:
        mesh: over whose devices each parameter is sharded while it is read, a tensor of the file at a time: the host
            holds no more.

    Raises:
        CheckpointError: as `LoadPlan.read`.
    """
    by_path, module = _by_path(plan), plan.abstract
    state = nnx.state(module)
    variables = parameters(state)
    if mesh is None:  # where the shapes say that they are to lie
        places = {ours: variable.get_value().sharding for ours, variable in variables.items()}
    else:
        places = {ours: _sharding(variable, mesh) for ours, variable in variables.items()}
    for ours, slots in by_path.items():
        _fill(plan, slots, variables, ours, dtype, places)
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
    places = {ours: variable.get_value().sharding for ours, variable in variables.items()}
    for ours in paths:
        _fill(plan, by_path[ours], variables, ours, dtype, places)
    return nnx.merge(graph, state)


def on_mesh(module: nnx.Module, mesh: Mesh) -> None:
    """Shard what of a module's parameters is not on the mesh yet: what was made and not read."""
    for variable in parameters(nnx.state(module)).values():
        array = variable.get_value()
        if getattr(array.sharding, "mesh", None) != mesh:
            variable.set_value(_placed(np.asarray(array), _sharding(variable, mesh)))


def _sharding(variable: nnx.Variable, mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, parameter_spec(variable, variable.get_value().shape, mesh=mesh))


def _fill(
    plan: LoadPlan,
    slots: list[Slot],
    variables: Mapping[str, nnx.Variable],
    ours: str,
    dtype: Any,
    places: Mapping[str, Any],
) -> None:
    """A parameter, and its scales where it is kept in eight bits.

    Args:
        places: shardings of parameters by path; those without one go to the default device.
    """
    now, place = variables[ours].get_value(), places.get(ours)
    names = [ours] if now.dtype not in LARGEST else [ours, scale_of(ours)]
    if isinstance(place, NamedSharding) and slots[0].place is not None:
        layers = [_Layers(now.shape[0], places[name]) for name in names]
        for slot in slots:
            one = dataclasses.replace(slot, place=None)
            for each, array in zip(layers, _read(plan, [one], now.shape[1:], dtype, now.dtype), strict=True):
                each.put(array, slot.place)
        found = [each.array for each in layers]
    else:
        arrays = _read(plan, slots, now.shape, dtype, now.dtype)
        found = [_placed(array, places.get(name)) for name, array in zip(names, arrays, strict=True)]
    for name, array in zip(names, found, strict=True):
        variables[name].set_value(array.block_until_ready())


def _placed(array: np.ndarray, place: Sharding | None) -> jax.Array:
    """An array on its devices; it is theirs alone and never written again, so that the backend may keep it as it is."""
    if place is None or len(place.device_set) == 1:
        return jax.device_put(array, place, may_alias=True)
    return jax.make_array_from_callback(array.shape, place, lambda index: array[index])


class _Layers:
    """A parameter of all layers, written a layer at a time where it lies sharded."""

    def __init__(self, count: int, place: NamedSharding) -> None:
        self._count, self._place = count, place
        self._layer = NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
        self.array: Any = None

    def put(self, layer: np.ndarray, number: Any) -> None:
        if self.array is None:
            zeros = partial(jnp.zeros, (self._count, *layer.shape), layer.dtype)
            self.array = jax.jit(zeros, out_shardings=self._place)()
        self.array = _writing(self._place)(self.array, _placed(layer, self._layer), np.int32(number))
        self.array.block_until_ready()  # the host's array goes before the next is read


@lru_cache(maxsize=256)
def _writing(place: NamedSharding) -> Callable[[jax.Array, jax.Array, np.int32], jax.Array]:
    def write(whole: jax.Array, layer: jax.Array, number: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(whole, layer, number, 0)

    return jax.jit(write, out_shardings=place, donate_argnums=0)


def _read(plan: LoadPlan, slots: list[Slot], shape: tuple[int, ...], dtype: Any, kept: Any) -> tuple[np.ndarray, ...]:
    """A parameter on the host, as the module keeps it; and its scales, where it is ``kept`` in eight bits."""
    if kept in LARGEST:
        return _read_rows(plan, slots, shape, np.dtype(kept))
    return (_read_wide(plan, slots, shape, dtype),)


def _read_rows(
    plan: LoadPlan, slots: list[Slot], shape: tuple[int, ...], kind: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Kernels of all layers or of one, and the scales of their outputs."""
    kernels, scales = _aligned(shape, kind), _aligned((*shape[:-2], shape[-1]), np.dtype(np.float32))
    for slot in slots:
        place = ... if slot.place is None else slot.place
        start, rows = 0, torch_view(kernels[place], slot.row.layout)
        for block, of_rows in plan.read_rows(slot, kind):
            rows[start : start + len(block)], scales[place][start : start + len(block)] = block, of_rows
            start += len(block)
    return kernels, scales


def _by_path(plan: LoadPlan) -> dict[str, list[Slot]]:
    by_path: dict[str, list[Slot]] = {}
    for slot in plan.slots:
        by_path.setdefault(slot.row.ours, []).append(slot)
    return by_path


def _read_wide(plan: LoadPlan, slots: list[Slot], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
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

"""Modules and load plans as tensors to write, and a network's folder in the diffusers layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from rehyat_jax.weights.copying import blocks
from rehyat_jax.weights.plan import LoadPlan, Slot, pair
from rehyat_jax.weights.registry import Config, narrow
from rehyat_jax.weights.rows import Row, torch_shape, torch_view
from rehyat_jax.weights.writing import MAX_SHARD_BYTES, Outgoing, write_json, write_tensors


def of_module(
    rows: Iterable[Row], variables: Mapping[str, nnx.Variable], *, dialect: str, dtype: Any
) -> list[Outgoing]:
    """A module's parameters, by path, under a dialect's names.

    Args:
        dtype: None keeps each parameter's own.
    """
    shapes = {path: tuple(variable.get_value().shape) for path, variable in variables.items()}
    return [
        _of_parameter(row, place, layer, variables[path], dialect, dtype)
        for path, row in pair(rows, shapes).items()
        for place, layer in enumerate(row.numbers(shapes[path]))
    ]


def _of_parameter(
    row: Row, place: int, layer: int | None, variable: nnx.Variable, dialect: str, dtype: Any
) -> Outgoing:
    value = variable.get_value()
    target = np.dtype(value.dtype) if dtype is None else narrow(row, jnp.dtype(dtype))
    shape = torch_shape(value.shape if layer is None else value.shape[1:], row.layout)
    name = row.name(dialect, layer)

    def numbers() -> Iterator[np.ndarray]:
        array = np.asarray(value if layer is None else value[place])
        return blocks(torch_view(array, row.layout), target, f"tensor {name!r}")

    return Outgoing(name=name, dtype=target, shape=shape, blocks=numbers)


def of_plan(
    plan: LoadPlan,
    *,
    dialect: str,
    dtype: Any,
    passing: Callable[[Iterator[np.ndarray]], Iterator[np.ndarray]],
    kept: Callable[[str], np.dtype | None] = lambda path: None,
) -> list[Outgoing]:
    """A plan's tensors under a dialect's names, never all in memory.

    Args:
        dtype: None keeps each tensor's own.
        passing: sees the blocks on their way.
        kept: in which eight bits a stacked kernel, by its path, is written, and a tensor ``weight_scale`` [out, 1]
            beside it.
    """

    def of_slot(slot: Slot) -> list[Outgoing]:
        target = plan.info(slot).dtype if dtype is None else narrow(slot.row, jnp.dtype(dtype))
        name = slot.row.name(dialect, slot.layer)
        kind = kept(slot.row.ours) if slot.row.layout == "linear" and slot.place is not None else None
        if kind is None:
            return [
                Outgoing(name=name, dtype=target, shape=slot.shape, blocks=lambda: passing(plan.read(slot, target)))
            ]
        rows = Outgoing(
            name=name, dtype=kind, shape=slot.shape, blocks=lambda: passing(b for b, _ in plan.read_rows(slot, kind))
        )
        scales = Outgoing(
            name=f"{name.removesuffix('.weight')}.weight_scale",
            dtype=np.dtype(np.float32),
            shape=(slot.shape[0], 1),
            blocks=lambda: passing(np.ascontiguousarray(scales)[:, None] for _, scales in plan.read_rows(slot, kind)),
        )
        return [rows, scales]

    return [tensor for slot in plan.slots for tensor in of_slot(slot)]


def write_network(
    folder: Path,
    config: Config,
    tensors: Iterable[Outgoing],
    *,
    stem: str,
    max_shard_bytes: int | None = MAX_SHARD_BYTES,
) -> None:
    """``config.json`` and the tensors into a folder that may be there; ``max_shard_bytes`` None: one file."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", config.to_dict())
    tensors = list(tensors)
    most = sum(tensor.nbytes for tensor in tensors) if max_shard_bytes is None else max_shard_bytes
    write_tensors(folder, stem, tensors, max_shard_bytes=most)

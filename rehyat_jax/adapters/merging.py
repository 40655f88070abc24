"""LoRAs into a load plan: each tensor is read as its base plus what they add, in float32, then cast.

W' = W + strength · scale · up @ down, and differences as they are, times the strength. The base is read again for every
set of LoRAs, so that taking one off leaves the base bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rehyat_jax.adapters.lora import Lora, LoraFile, Part, of_expert, open_lora
from rehyat_jax.adapters.names import TARGETS, Kind, spelled, underscored
from rehyat_jax.errors import CheckpointError
from rehyat_jax.weights.load import refilled
from rehyat_jax.weights.plan import Change, LoadPlan, Slot, unfilled
from rehyat_jax.weights.registry import Component

#: A weight's slot by each name that any dialect has for it, dots as underscores.
Table = dict[str, int]


@dataclasses.dataclass(frozen=True)
class LowRank(Change):
    """A pair's product, times its scale and the strength."""

    file: LoraFile
    part: Part
    strength: float

    def applied(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        down, up = (self.file.read(self.part.names[kind]) for kind in ("down", "up"))
        up = up.reshape(up.shape[0], -1) * np.float32(self.strength * self.file.scale(self.part))
        down, start = down.reshape(down.shape[0], -1), 0
        for block in blocks:
            yield block + (up[start : start + len(block)] @ down).reshape(block.shape)
            start += len(block)


@dataclasses.dataclass(frozen=True)
class Difference(Change):
    """A tensor of the weight's own shape, times the strength."""

    file: LoraFile
    name: str
    strength: float

    def applied(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        whole, start = self.file.read(self.name), 0
        for block in blocks:
            yield block + np.float32(self.strength) * whole[start : start + len(block)]
            start += len(block)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merged:
    """A network's weights on disk, and the LoRAs that were merged into them as they were read."""

    base: LoadPlan
    #: Of the module.
    dtype: np.dtype
    loras: tuple[Lora, ...] = ()

    def plan(self) -> LoadPlan:
        """
        Raises:
            CheckpointError: as `with_loras`.
        """
        return with_loras(self.base, self.loras)

    def changed(self, module: Any, loras: tuple[Lora, ...]) -> tuple[Any, Merged]:
        """The module with other LoRAs: what either set changes is read again, the rest is shared.

        Raises:
            CheckpointError: as `with_loras`; the base was changed or removed since it was read.
        """
        after = dataclasses.replace(self, loras=of_expert(loras, None))
        plan = after.plan()
        paths = {slot.row.ours for each in (self.plan(), plan) for slot in each.slots if slot.changes}
        return refilled(module, plan, paths, dtype=self.dtype), after


def with_loras(plan: LoadPlan, loras: Sequence[Lora]) -> LoadPlan:
    """The same weights with these LoRAs in them, in order; a strength of 0 checks its file and changes nothing.

    Raises:
        CheckpointError: as `open_lora`; a tensor of a LoRA has no place in the network, or is of another shape.
    """
    for lora in loras:
        plan = with_lora(plan, open_lora(lora.file), strength=lora.strength)
    return plan


def with_lora(plan: LoadPlan, file: LoraFile, *, strength: float = 1.0) -> LoadPlan:
    """As `with_loras`, of one that is open."""
    slots = list(plan.slots)
    for slot, change in _landed(file, plan, table_of(plan.slots), strength=strength):
        if strength:
            slots[slot] = dataclasses.replace(slots[slot], changes=(*slots[slot].changes, change))
    return dataclasses.replace(plan, slots=tuple(slots))


def table_of(slots: Sequence[Slot]) -> Table:
    """The model's own names; no two weights share one."""
    table: Table = {}
    for number, slot in enumerate(slots):
        for dialect in slot.row.names:
            for spelling in slot.row.spellings(dialect, slot.layer):
                if table.setdefault(underscored(spelling), number) != number:
                    raise AssertionError(f"two weights are called {spelling!r}, but for dots and underscores")
    return table


def place(table: Table, module: str, kind: Kind) -> int | None:
    """The slot that a part of a LoRA is for."""
    names = (name + end for name in spelled(module) for end in TARGETS[kind])
    return next((table[name] for name in names if name in table), None)


def _landed(file: LoraFile, plan: LoadPlan, table: Table, *, strength: float) -> Iterator[tuple[int, Change]]:
    """Every tensor of a LoRA and the slot it changes.

    Raises:
        CheckpointError: one has no place, is of another shape, or two are for the same.
    """
    landed: dict[tuple[int, bool], str] = {}
    nowhere: list[str] = []
    misshapen: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    changes: list[tuple[int, Change]] = []
    for part in file.parts:
        for kind, name in part.names.items():
            number = place(table, part.module, kind)
            if number is None:
                nowhere.append(name)
                continue
            shape = plan.slots[number].shape
            if (found := changed_shape(file, part, kind)) is None:
                continue  # its pair's other half stands for it
            if found != shape:
                misshapen.append((name, found, shape))
                continue
            if (twice := landed.setdefault((number, kind == "down"), name)) != name:
                raise CheckpointError(f"{file.path}: {twice!r} and {name!r} are for the same weight")
            changes.append(
                (number, LowRank(file, part, strength) if kind == "down" else Difference(file, name, strength))
            )
    total = len(file.tensors.infos)
    if nowhere:
        more = fitting(file, plan.component)
        raise CheckpointError(
            f"{file.path}: {len(nowhere)} of {total} tensors have no place in {_called(plan)}, the first is "
            f"{nowhere[0]!r}" + (f"; it is for {more}" if more else "")
        )
    if misshapen:
        name, found, shape = misshapen[0]
        more = fitting(file, plan.component)
        raise CheckpointError(
            f"{file.path} is {f'for {more}' if more else 'of another size'}, not for {_called(plan)}: "
            f"{len(misshapen)} of its modules are for weights of other shapes, the first, {name!r}, is for "
            f"{list(found)} where {list(shape)} is expected"
        )
    return iter(changes)


def changed_shape(file: LoraFile, part: Part, kind: Kind) -> tuple[int, ...] | None:
    """Of the weight that a tensor changes, as files have it; None for those that say nothing alone."""
    match kind:
        case "up" | "alpha":
            return None
        case "down":
            down, up = (file.tensors.infos[part.names[each]].shape for each in ("down", "up"))
            return (up[0], *down[1:])
        case _:
            return file.tensors.infos[part.names[kind]].shape


def fitting(file: LoraFile, component: Component) -> str | None:
    """Which of the published sizes a LoRA is for; None where it is none of them."""
    for name, config in component.published.items():
        shapes, table = published_shapes(component, config())
        if all(
            (number := place(table, part.module, kind)) is not None
            and changed_shape(file, part, kind) in (None, shapes[number])
            for part in file.parts
            for kind in part.names
        ):
            return name
    return None


def published_shapes(component: Component, config: Any) -> tuple[list[tuple[int, ...]], Table]:
    """Of a network of these sizes that is nowhere: the shapes of its weights as files have them, and their names."""
    slots = unfilled(component, config)
    return [slot.shape for slot in slots], table_of(slots)


def _called(plan: LoadPlan) -> str:
    """The network, by its published size where it has one."""
    own = next((name for name, config in plan.component.published.items() if config() == plan.config), None)
    return own or f"the {plan.title} {Path(plan.weights).name}"

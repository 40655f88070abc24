"""What a checkpoint holds, by its headers and configurations alone: what is described is what would be loaded."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from rehyat_jax.weights.convert import attached_to, attachment_of, components_of
from rehyat_jax.weights.files import listed
from rehyat_jax.weights.plan import LoadPlan, make_plan
from rehyat_jax.weights.registry import Config, component


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComponentInfo:
    """One network on disk."""

    name: str
    dialect: str
    weights: Path
    config: Config
    tensors: int
    parameters: int
    nbytes: int
    #: Parameters by number format, most first.
    dtypes: tuple[tuple[str, int], ...]
    #: Tensors of the file that are no part of the network.
    beside: tuple[str, ...] = ()
    #: Of a network that has a part of its own: what the part says of itself.
    attached: Any = None

    def __str__(self) -> str:
        formats = ", ".join(f"{count:,} in {dtype}" for dtype, count in self.dtypes)
        sizes = ", ".join(f"{key} {value}" for key, value in self._sizes().items())
        lines = [
            f"{self.name}: {component(self.name).title}, {self.dialect} names",
            f"  file        {self.weights}",
            f"  parameters  {self.parameters:,} in {self.tensors} tensors, {self.nbytes / 1e6:,.1f} MB",
            f"  stored as   {formats}",
            f"  sizes       {sizes}",
            *([f"  beside it   {listed(self.beside)}"] if self.beside else []),
            *([str(self.attached)] if self.attached else []),
        ]
        return "\n".join(lines)

    def _sizes(self) -> dict[str, object]:
        values: dict[str, object] = dataclasses.asdict(self.config)  # type: ignore[call-overload]
        return {key: value for key, value in values.items() if not key.startswith("latents_")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """A checkpoint on disk: one network, or all that a whole checkpoint's folder holds."""

    path: Path
    components: tuple[ComponentInfo, ...]
    #: What else is known of the whole.
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([str(self.path), *map(str, self.components), *self.notes])


def describe_weights(path: Path) -> CheckpointInfo:
    """Dialect, sizes, parameters and number formats of what would be loaded; no tensor is read.

    Args:
        path: a whole checkpoint's folder, a network's folder or a weights file, in any dialect.

    Raises:
        CheckpointError: missing, damaged, incomplete, or not of a network that this program knows.
        ConfigError: a configuration is impossible or another architecture's.
    """
    plans = {name: make_plan(path, name) for name in components_of(path)}
    configs = {name: plan.config for name, plan in plans.items()}
    found = []
    for name, plan in plans.items():
        info = _describe(name, plan)
        if (part := attached_to(name, plan, dtype=np.float32)) is not None:
            said = attachment_of(name).describe(part, plan.config, root=path, others=configs)
            info = dataclasses.replace(info, attached=said)
        found.append(info)
    return CheckpointInfo(path=path, components=tuple(found))


def _describe(name: str, plan: LoadPlan) -> ComponentInfo:
    # A tied tensor that the file holds twice is one set of parameters.
    infos = [plan.info(slot) for slot in plan.slots]
    names = dict.fromkeys(source for slot in plan.slots for source in slot.sources)
    stored = [plan.tensors.infos[name] for name in names]
    counts: Counter[str] = Counter()
    for slot, info in zip(plan.slots, infos, strict=True):
        counts[info.stored or info.dtype.name] += math.prod(slot.shape)
    return ComponentInfo(
        name=name,
        dialect=plan.dialect,
        weights=plan.weights,
        config=plan.config,
        tensors=len(stored),
        parameters=sum(counts.values()),
        nbytes=sum(info.nbytes for info in stored),
        dtypes=tuple(counts.most_common()),
        beside=plan.beside,
    )

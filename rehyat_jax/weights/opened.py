"""A network's checkpoint found, opened and recognised: its dialect and its sizes, before its tensors are paired."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rehyat_jax.errors import CheckpointError
from rehyat_jax.weights.files import READABLE, TensorSource, listed
from rehyat_jax.weights.layout import Location, locate
from rehyat_jax.weights.opening import open_tensors
from rehyat_jax.weights.registry import REGISTRY, Component, Shapes, beside, generic, holdings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """A checkpoint of one network: its tensors known by name and shape, and not yet compared with its sizes."""

    component: Component
    dialect: str
    config: Any
    weights: Path
    tensors: TensorSource
    #: What the file puts before every name.
    prefix: str
    #: Clean names, and what the file calls them.
    names: Mapping[str, str]
    #: Tensors of the file that are no part of the network, by the file's name.
    beside: tuple[str, ...]


def open_component(path: Path, name: str) -> Opened:
    """Find, open, recognise and configure a network.

    Raises:
        CheckpointError: missing, damaged, or another network than the one asked for.
        ConfigError: its configuration is impossible or another architecture's.
    """
    return _open(locate(path, name))


def _open(location: Location) -> Opened:
    component, weights = location.component, location.weights
    tensors = open_tensors(weights)
    held = holdings(tensors.infos)
    found = held.get(component.kind)
    if found is None:
        _refuse_foreign(weights, tensors.infos, REGISTRY.values())
        if held:
            titles = " and a ".join(each.component.title for each in held.values())
            raise CheckpointError(f"{weights} holds a {titles}, not a {component.title}")
        kinds = sorted({info.kind for info in tensors.infos.values()})
        unread = f" (of type {', '.join(kinds[:3])}; {READABLE})" if kinds and not _any_readable(tensors) else ""
        raise CheckpointError(
            f"{weights} holds {listed(tensors.infos)}{unread}: not a {component.title} that this program knows"
        )
    # What lies under no other network's prefix may change this one: a LoRA is kept beside the weights it is for.
    others = tuple(each.prefix for each in held.values() if len(each.prefix) > len(found.prefix) and each is not found)
    _refuse_foreign(weights, [name for name in tensors.infos if not name.startswith(others)], (component,))
    table = component.all_rows()
    infos = {clean: tensors.infos[raw] for clean, raw in found.names.items()}
    shapes = Shapes(infos, table, found.dialect.name)
    if location.config is None:
        config = component.infer(shapes)
    else:
        config = component.seen(component.config_type.from_dict(location.config), shapes)
    known = {generic(name) for row in table for name in row.spellings(found.dialect.name)}
    aside = {
        clean
        for clean in found.names
        if generic(clean) not in known and beside(found, held.values(), clean, infos[clean])
    }
    names = {clean: raw for clean, raw in found.names.items() if clean not in aside}
    inside = set(names.values())
    return Opened(
        component=component,
        dialect=found.dialect.name,
        config=config,
        weights=weights,
        tensors=tensors,
        prefix=found.prefix,
        names=names,
        beside=tuple(raw for raw in tensors.infos if raw not in inside),
    )


def _any_readable(tensors: TensorSource) -> bool:
    return any(info.readable for info in tensors.infos.values())


def _refuse_foreign(weights: Path, names: Iterable[str], components: Iterable[Component]) -> None:
    for component in components:
        for what, pattern in component.foreign.items():
            if found := next((name for name in names if pattern.search(name)), None):
                raise CheckpointError(f"{weights} is {what} (tensor {found!r}), which is not supported")

"""Which tensor of a checkpoint goes where, settled and checked before a byte of it is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from rehyat_jax.errors import CheckpointError
from rehyat_jax.weights.component import BY_NAME, COMPONENTS, Component, ComponentName, Config, recognise
from rehyat_jax.weights.copying import blocks, largest
from rehyat_jax.weights.files import TensorInfo, TensorSource, open_tensors, read_json
from rehyat_jax.weights.layout import Location, class_of, components_in, locate
from rehyat_jax.weights.names import Dialect, Row, strip_prefixes, torch_shape

#: Parts that only other members of the Wan family have.
_FOREIGN = {
    "an image-to-video model": ("img_emb.", "condition_embedder.image_embedder.", ".k_img.", ".add_k_proj."),
    "a VACE model": ("vace_",),
    "a Wan2.2 VAE": (".downsamples.0.downsamples.", "encoder.down_blocks.0.resnets."),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
    """One tensor of the file and its place in ours."""

    row: Row
    layer: int | None
    #: As the file names it, prefix and all.
    source: str
    #: As the file shapes it.
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked checkpoint of one network, its tensors still on disk."""

    component: Component
    dialect: Dialect
    config: Any
    weights: Path
    tensors: TensorSource
    slots: tuple[Slot, ...]
    #: The module's shapes, without memory.
    abstract: Any

    def read(self, slot: Slot, dtype: np.dtype) -> Iterator[np.ndarray]:
        """A tensor in the file's layout, some rows at a time.

        Raises:
            CheckpointError: a value is not finite, or an embedding is all zeros: a model that reads nothing of its
                prompt would make noise without a word.
        """
        found = not slot.row.alias
        for piece in self.tensors.pieces(slot.source):
            for block in blocks(piece, dtype, f"{self.weights}: tensor {slot.source!r}"):
                found = found or largest(block) > 0
                yield block
        if not found:
            raise CheckpointError(f"{self.weights}: the embedding {slot.source!r} is all zeros")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """A checkpoint of one network: its tensors known by name and shape, and not yet compared with its sizes."""

    component: Component
    dialect: Dialect
    config: Any
    weights: Path
    tensors: TensorSource
    #: Clean names, and what the file calls them.
    names: Mapping[str, str]

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """By clean name."""
        return {name: self.tensors.infos[raw] for name, raw in self.names.items()}


def open_component(location: Location) -> Opened:
    """Open, recognise and configure.

    Raises:
        CheckpointError: damaged, or another network than the one asked for.
        ConfigError: its configuration is impossible or another architecture's.
    """
    component, weights = BY_NAME[location.component], location.weights
    tensors = open_tensors(weights)
    names = strip_prefixes(tensors.infos)
    for what, parts in _FOREIGN.items():
        if found := next((name for name in names if any(part in name for part in parts)), None):
            raise CheckpointError(f"{weights} is {what} (tensor {found!r}), which is not supported")
    known = recognise(names)
    if known is None:
        raise CheckpointError(f"{weights} holds {listed(names)}: not a {component.title} that this program knows")
    if known[0] != component.name:
        raise CheckpointError(f"{weights} holds a {BY_NAME[known[0]].title}, not a {component.title}")
    infos = {name: tensors.infos[raw] for name, raw in names.items()}
    config: Config
    if location.config is None:
        config = component.infer(infos, known[1])
    else:
        config = component.config_type.from_dict(location.config)
    return Opened(component=component, dialect=known[1], config=config, weights=weights, tensors=tensors, names=names)


def make_plan(path: Path, name: ComponentName, *, dtype: Any = np.float32) -> Plan:
    """Pair every tensor of the file with a parameter of the module, or fail.

    Raises:
        CheckpointError: tensors missing, unused, misshapen, or as `open_component` says.
        ConfigError: as `open_component` says.
    """
    opened = open_component(locate(path, name))
    component, config, weights = opened.component, opened.config, opened.weights
    # A configuration of a million layers shall not keep us busy before it fails.
    if component.least_tensors(config) > len(opened.names):
        raise CheckpointError(f"{weights} holds {len(opened.names)} tensors, too few for its configuration {config}")
    abstract = component.abstract(config, dtype)
    expected = _slots(component.rows(config), abstract, opened)
    wanted = {slot.source: slot for slot in expected}
    infos = opened.tensors.infos
    if missing := [name for name in wanted if name not in infos]:
        raise CheckpointError(f"{weights} lacks {listed(missing)}")
    tied = _tied(expected, opened)
    if unused := [raw for raw in opened.names.values() if raw not in wanted and raw not in tied]:
        raise CheckpointError(f"{weights} holds {listed(unused)} that a {component.title} has no use for")
    wanted |= tied
    if misshapen := [raw for raw, slot in wanted.items() if infos[raw].shape != slot.shape]:
        raw = misshapen[0]
        raise CheckpointError(
            f"{weights}: {listed(misshapen)} misshapen: the first is {list(infos[raw].shape)} in the file and "
            f"{list(wanted[raw].shape)} by the configuration"
        )
    _check_tied(tied, opened)
    return Plan(
        component=component,
        dialect=opened.dialect,
        config=config,
        weights=weights,
        tensors=opened.tensors,
        slots=expected,
        abstract=abstract,
    )


def parameters(state: Any) -> dict[str, nnx.Variable]:
    """A module's ``nnx.State`` by dotted path; numbers are indices of lists."""
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def pair(rows: Iterable[Row], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Row]:
    """Rows by our path; every parameter has exactly one, or the table is wrong."""
    table = {row.ours: row for row in rows}
    if table.keys() != shapes.keys():
        raise AssertionError(f"the table of names and the module differ in {sorted(table.keys() ^ shapes.keys())[:4]}")
    return table


def _slots(rows: Iterable[Row], abstract: Any, opened: Opened) -> tuple[Slot, ...]:
    shapes = {path: tuple(leaf.get_value().shape) for path, leaf in parameters(nnx.state(abstract)).items()}
    slots = []
    for path, row in pair(rows, shapes).items():
        shape = shapes[path]
        layers: Iterable[int | None] = range(shape[0]) if row.stacked else (None,)
        theirs = torch_shape(shape[1:] if row.stacked else shape, row.kind)
        for layer in layers:
            name = row.name(opened.dialect, layer)
            if row.alias and opened.dialect == "diffusers" and name not in opened.names:
                name = row.alias if row.alias in opened.names else name
            slots.append(Slot(row=row, layer=layer, source=opened.names.get(name, name), shape=theirs))
    return tuple(slots)


def _tied(slots: Iterable[Slot], opened: Opened) -> dict[str, Slot]:
    """The file's second names for tensors that it holds twice."""
    seconds = {opened.names.get(slot.row.alias or ""): slot for slot in slots if opened.dialect == "diffusers"}
    return {alias: slot for alias, slot in seconds.items() if alias is not None and alias != slot.source}


def _check_tied(tied: Mapping[str, Slot], opened: Opened) -> None:
    for alias, slot in tied.items():
        tensors = opened.tensors
        same = tensors.infos[slot.source].dtype == tensors.infos[alias].dtype and all(
            one.tobytes() == other.tobytes()
            for one, other in zip(tensors.pieces(slot.source), tensors.pieces(alias), strict=True)
        )
        if not same:
            raise CheckpointError(f"{opened.weights}: {slot.source!r} and {alias!r} should be the same and differ")


def listed(names: Iterable[str]) -> str:
    """Tensors by number and, the first few, by name."""
    names = list(names)
    some = ", ".join(map(repr, names[:3]))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} tensor{'' if len(names) == 1 else 's'} ({some}{more})" if names else "no tensors"


def sole_component(path: Path) -> ComponentName:
    """Which network a component's folder or a weights file holds.

    Raises:
        CheckpointError: none that this program knows.
    """
    if path.is_dir() and (path / "config.json").is_file():
        held = class_of(read_json(path / "config.json"))
        if (name := next((name for name in COMPONENTS if name == held), None)) is None:
            raise CheckpointError(f"{path} holds {held or 'something'}: not a network that this program knows")
        return name
    if found := components_in(path):
        return found[0]
    weights = locate(path, "transformer").weights
    names = strip_prefixes(open_tensors(weights).infos)
    if (known := recognise(names)) is None:
        raise CheckpointError(f"{weights} holds {listed(names)}: not a network that this program knows")
    return known[0]

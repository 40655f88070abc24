"""The load plan: which tensor of a checkpoint goes where, settled and checked before a byte of it is read.

One for every network and for every part of one: rows of a table are paired with the parameters of a module and with
the tensors of a file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from flax import nnx

from rehyat_jax.errors import CheckpointError
from rehyat_jax.weights.copying import blocks, largest
from rehyat_jax.weights.files import LARGEST, READABLE, TensorInfo, TensorSource, listed
from rehyat_jax.weights.opened import open_component
from rehyat_jax.weights.registry import Component
from rehyat_jax.weights.rows import Row, torch_shape
from rehyat_jax.weights.scaled import ScaledTensors


@runtime_checkable
class Change(Protocol):
    """What is done to a tensor while it is read, in float32 and in the file's shape: a LoRA's part is added."""

    def applied(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The same rows, changed.

        Raises:
            CheckpointError: what it adds cannot be read.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
    """One tensor of the file and its place in ours."""

    row: Row
    layer: int | None
    #: Along our leading axis.
    place: int | None
    #: As the file names it, prefix and all; more than one where the file holds it more than once (tied weights).
    sources: tuple[str, ...]
    #: As the file shapes it, or its part of the file's tensor.
    shape: tuple[int, ...]
    #: Where the file's tensor holds several: which of how many this one is.
    part: tuple[int, int] | None = None
    #: Axes of one that the file's tensor has in front.
    leading: int = 0
    changes: tuple[Change, ...] = ()

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape of the file's tensor."""
        first = self.shape[:1] if self.part is None else (self.part[1] * self.shape[0],)
        return (1,) * self.leading + first + self.shape[1:]

    def own(self, pieces: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Of the rows of the file's tensor its own, without axes in front."""
        start = 0 if self.part is None else self.part[0] * self.shape[0]
        stop, at = start + (self.shape[0] if self.shape else 1), 0
        for piece in pieces:
            piece = piece.reshape(piece.shape[self.leading :])
            if self.part is None:
                yield piece
                continue
            rows = piece[max(start - at, 0) : max(stop - at, 0)]
            if len(rows):
                yield rows
            at += len(piece)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """Checked weights, still on disk."""

    #: Of which network, or whose part.
    component: Component
    #: What they are, in words.
    title: str
    #: Of the file that holds them when they are written, without ending.
    stem: str
    dialect: str
    config: Any
    weights: Path
    tensors: TensorSource
    slots: tuple[Slot, ...]
    #: Tensors of the file that are no part of it.
    beside: tuple[str, ...]
    #: The module's shapes, without memory.
    abstract: Any

    def info(self, slot: Slot) -> TensorInfo:
        """What the file says of a slot's tensor; of several, of the widest."""
        return max((self.tensors.infos[name] for name in slot.sources), key=lambda info: info.nbytes)

    def read(self, slot: Slot, dtype: np.dtype) -> Iterator[np.ndarray]:
        """A tensor in the file's layout, some rows at a time.

        Raises:
            CheckpointError: a value is not finite, a tensor is all zeros that must not be, tied tensors differ, or the
                file was cut meanwhile.
        """
        source = self._settled(slot) if len(slot.sources) > 1 else slot.sources[0]
        found, what = not slot.row.not_zero, f"{self.weights}: tensor {source!r}"
        kept = (b for piece in slot.own(self.tensors.pieces(source)) for b in blocks(piece, dtype, what))
        for block in self._changed(slot, source, dtype) if slot.changes else kept:
            found = found or largest(block) > 0
            yield block
        if not found:
            raise CheckpointError(f"{self.weights}: the embedding {source!r} is all zeros")

    def read_rows(self, slot: Slot, kind: np.dtype) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """A matrix's rows in eight bits, and what each is to be multiplied by: as the file has them where it has such;
        else each row's largest number is the kind's.

        Raises:
            CheckpointError: as `read`.
        """
        (source,) = slot.sources
        kept = None
        if isinstance(self.tensors, ScaledTensors) and not slot.changes and slot.part is None:
            kept = self.tensors.rows_as_kept(source, kind)
        if kept is not None:
            for rows, scales in kept:
                if kind.kind != "i" and (np.bitwise_and(rows.view(np.uint8), 0x7F) == 0x7F).any():
                    raise CheckpointError(f"{self.weights}: tensor {source!r} holds NaN")
                yield rows, scales
            return
        for block in self.read(slot, np.dtype(np.float32)):
            top = np.abs(block).max(axis=1)
            scales = np.where(top > 0, top / LARGEST[kind], 1).astype(np.float32)
            even = block / scales[:, None]
            yield (np.rint(even) if kind.kind == "i" else even).astype(kind), scales

    def _changed(self, slot: Slot, source: str, dtype: np.dtype) -> Iterator[np.ndarray]:
        """A tensor with its changes: added in float32, and cast once."""
        what = f"{self.weights}: tensor {source!r}"
        wide: Iterator[np.ndarray] = (
            block
            for piece in slot.own(self.tensors.pieces(source))
            for block in blocks(piece, np.dtype(np.float32), what)
        )
        for change in slot.changes:
            wide = change.applied(wide)
        for block in wide:
            yield from blocks(block, dtype, f"{what} with what is added to it")

    def _settled(self, slot: Slot) -> str:
        """Which of tied tensors is read: they are the same, the same in a narrower type, or all but one are zeros."""
        infos = self.tensors.infos
        best, *others = sorted(slot.sources, key=lambda name: -infos[name].dtype.itemsize)
        for other in others:
            same, best_is_zero, other_is_zero = True, True, True
            rows = max((1 << 20) // max(infos[best].nbytes // max(infos[best].shape[0], 1), 1), 1)
            pairs = zip(self.tensors.pieces(best, rows=rows), self.tensors.pieces(other, rows=rows), strict=True)
            for one, two in pairs:
                with np.errstate(over="ignore", invalid="ignore"):
                    same = same and one.astype(two.dtype).tobytes() == two.tobytes()
                best_is_zero = best_is_zero and not largest(one)
                other_is_zero = other_is_zero and not largest(two)
            if best_is_zero and not other_is_zero:
                best = other
            elif not same and not other_is_zero:
                raise CheckpointError(f"{self.weights}: {best!r} and {other!r} should be the same and differ")
        return best


def make_plan(path: Path, name: str, *, dtype: Any = np.float32) -> LoadPlan:
    """Pair every tensor of a network's checkpoint with a parameter of the module, or fail.

    Raises:
        CheckpointError: tensors missing, unused or misshapen, or as `open_component` says.
        ConfigError: as `open_component` says.
    """
    opened = open_component(path, name)
    component, config, weights = opened.component, opened.config, opened.weights
    # A configuration of a million layers shall not keep us busy before it fails.
    if component.least_tensors(config) > len(opened.names):
        raise CheckpointError(f"{weights} holds {len(opened.names)} tensors, too few for its configuration {config}")
    abstract = component.abstract(config, dtype)
    return LoadPlan(
        component=component,
        title=component.title,
        stem=component.stem,
        dialect=opened.dialect,
        config=config,
        weights=weights,
        tensors=opened.tensors,
        slots=pair_tensors(
            component.table(config),
            abstract,
            dialect=opened.dialect,
            names=opened.names,
            tensors=opened.tensors,
            where=weights,
            user=f"a {component.title}",
        ),
        beside=opened.beside,
        abstract=abstract,
    )


def pair_tensors(
    rows: Iterable[Row],
    abstract: Any,
    *,
    dialect: str,
    names: Mapping[str, str],
    tensors: TensorSource,
    where: Path,
    user: str,
) -> tuple[Slot, ...]:
    """A module's parameters and a file's tensors, one to one.

    Args:
        names: the file's names by clean name, of all that must find a place.
        where, user: the file and what has use for its tensors, for messages.

    Raises:
        CheckpointError: tensors are missing, unused, misshapen, or of a type that is not read.
    """
    shapes = {path: tuple(leaf.get_value().shape) for path, leaf in parameters(nnx.state(abstract)).items()}
    slots: list[Slot] = []
    missing: list[str] = []
    taken: set[str] = set()
    for path, row in pair(rows, shapes).items():
        shape = shapes[path]
        theirs = torch_shape(shape[1:] if row.stacked else shape, row.layout)
        for place, layer in enumerate(row.numbers(shape)):
            spellings = row.spellings(dialect, layer)
            sources = tuple(names[spelling] for spelling in spellings if spelling in names)
            if not sources:
                missing.append(spellings[0] if spellings else f"{path} (the dialect {dialect!r} has no name for it)")
            taken.update(sources)
            slots.append(
                Slot(
                    row=row,
                    layer=layer,
                    place=place if row.stacked else None,
                    sources=sources,
                    shape=theirs,
                    part=row.part.get(dialect),
                    leading=row.leading.get(dialect, 0),
                )
            )
    if missing:
        raise CheckpointError(f"{where} lacks {listed(missing)}")
    if unused := [raw for raw in names.values() if raw not in taken]:
        raise CheckpointError(f"{where} holds {listed(unused)} that {user} has no use for")
    wrong = [(raw, slot) for slot in slots for raw in slot.sources if tensors.infos[raw].shape != slot.stored]
    if wrong:
        raw, slot = wrong[0]
        raise CheckpointError(
            f"{where}: {listed(raw for raw, _ in wrong)} misshapen: the first is {list(tensors.infos[raw].shape)} in "
            f"the file and {list(slot.stored)} by the configuration"
        )
    for slot in slots:
        if unread := next((raw for raw in slot.sources if not tensors.infos[raw].readable), None):
            raise CheckpointError(f"{where}: tensor {unread!r} is of type {tensors.infos[unread].kind}; {READABLE}")
    return tuple(slots)


def check_same(one: LoadPlan, other: LoadPlan) -> None:
    """
    Raises:
        CheckpointError: a weight of one checkpoint is another in the other, or of another size: bit for bit, in the
            narrower of their types.
    """
    if one.config != other.config:
        raise CheckpointError(f"{one.weights} and {other.weights} are of different sizes")
    differ = []
    for ours, theirs in zip(one.slots, other.slots, strict=True):
        kind = min(one.info(ours).dtype, other.info(theirs).dtype, key=lambda dtype: dtype.itemsize)
        a, b = (np.concatenate([b.copy() for b in p.read(s, kind)]) for p, s in ((one, ours), (other, theirs)))
        if not np.array_equal(a, b):
            differ.append(ours.sources[0])
    if differ:
        raise CheckpointError(
            f"{one.weights} and {other.weights} differ in {listed(differ)}: a model that was finetuned as a whole is "
            "no small change of its base"
        )


def unfilled(component: Component, config: Any) -> tuple[Slot, ...]:
    """The slots of a network of these sizes, without a file: what a file of it would hold."""
    shapes = {
        path: tuple(leaf.get_value().shape)
        for path, leaf in parameters(nnx.state(component.abstract(config, np.float32))).items()
    }
    return tuple(
        Slot(
            row=row,
            layer=layer,
            place=number if row.stacked else None,
            sources=(),
            shape=torch_shape(shapes[path][1:] if row.stacked else shapes[path], row.layout),
        )
        for path, row in pair(component.table(config), shapes).items()
        for number, layer in enumerate(row.numbers(shapes[path]))
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

"""The networks that checkpoints may hold: what each is called, configured, built from and recognised by.

Families (``models/wan``, ``models/umt5``) register theirs when they are imported; this package knows none of them.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax.numpy as jnp

from rehyat_jax.errors import CheckpointError
from rehyat_jax.runtime.variables import abstract_module
from rehyat_jax.weights.files import TensorInfo
from rehyat_jax.weights.rows import Row, renamed

if TYPE_CHECKING:
    from rehyat_jax.weights.plan import LoadPlan

#: The dialect in which checkpoints are written: diffusers', and transformers' for text encoders.
WRITTEN = "diffusers"


@runtime_checkable
class Config(Protocol):
    """A network's sizes."""

    def to_dict(self) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dialect:
    """One way of naming a network's tensors."""

    name: str
    #: A tensor name (without prefix) that begins so is this network's in this dialect, and no other's.
    mark: re.Pattern[str]
    #: Names by parameter, where the network's own rows do not give them.
    names: Mapping[str, str | tuple[str, ...]] = dataclasses.field(default_factory=dict)


class Shapes:
    """Shapes of a file's tensors by the name that `WRITTEN` has for them, whatever the file's dialect."""

    def __init__(self, infos: Mapping[str, TensorInfo], rows: tuple[Row, ...], dialect: str) -> None:
        self._infos, self._rows, self._dialect = infos, rows, dialect

    @property
    def dialect(self) -> str:
        """The file's."""
        return self._dialect

    def has(self, name: str) -> bool:
        """Is there a tensor, by the name that `WRITTEN` has for it?"""
        spellings = renamed(name, self._rows, WRITTEN, self._dialect) or (name,)
        return any(spelling in self._infos for spelling in spellings)

    def get(self, name: str, *, rank: int) -> tuple[int, ...]:
        """
        Raises:
            CheckpointError: there is no such tensor, or it has another number of dimensions.
        """
        spellings = renamed(name, self._rows, WRITTEN, self._dialect) or (name,)
        theirs = next((spelling for spelling in spellings if spelling in self._infos), spellings[0])
        if theirs not in self._infos:
            raise CheckpointError(f"tensor {theirs!r} is missing, and without a config.json its size is not known")
        shape = self._infos[theirs].shape
        if len(shape) != rank:
            raise CheckpointError(f"tensor {theirs!r} has shape {list(shape)}, which should have {rank} dimensions")
        return shape

    def layers(self, name: str) -> int:
        """How many layers a stack has, by a tensor of each, named as `WRITTEN` has it with ``{}`` for the number."""
        spellings = next((row.spellings(self._dialect) for row in self._rows if name in row.spellings(WRITTEN)), ())
        return max((self.most(re.escape(each).replace(r"\{\}", "([0-9]+)")) for each in spellings), default=0)

    def most(self, pattern: str) -> int:
        """One more than the largest number, the pattern's group that matched, of the file's names that begin so."""
        found = [match[match.lastindex or 0] for name in self._infos if (match := re.match(pattern, name))]
        return max((int(number) for number in found if len(number) < 9), default=-1) + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attached:
    """A network's part of its own, checked, its tensors still on disk."""

    plan: LoadPlan
    #: Weights that it has in the place of those around it.
    instead: LoadPlan | None = None


@runtime_checkable
class Attachment(Protocol):
    """A part that some checkpoints of a network have in a folder of its own, beside the weights."""

    #: The folder's name; ``instead`` is written in the folder `instead` within it.
    folder: str
    instead: str

    def plan(self, folder: Path, config: Any, *, dtype: Any) -> Attached:
        """
        Raises:
            CheckpointError, ConfigError: a file is missing, damaged or does not fit.
        """

    def describe(self, attached: Attached, config: Any, *, root: Path, others: Mapping[str, Any]) -> Any:
        """What `rehyat info` prints of it; ``others`` has the configurations of the checkpoint's other networks."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Component:
    """One network of a checkpoint."""

    #: Of its folder in the diffusers layout.
    name: str
    #: The name of the component by which its files are recognised, where that is another of the same tensors.
    kin: str = ""
    #: Of its folder in the release's layout, where that has one for it.
    released_in: str | None = None
    #: Folders of ComfyUI's ``models`` that hold it, in a folder without weights of its own.
    kept_in: tuple[str, ...] = ()
    #: Whether whole checkpoints may be without it.
    optional: bool = False
    title: str
    module: type[Any]
    config_type: type[Any]
    #: Does a ``config.json`` describe this network?
    described_by: Callable[[Mapping[str, Any]], bool]
    #: The table.
    rows: Callable[[Any], tuple[Row, ...]]
    dialects: tuple[Dialect, ...]
    #: Sizes, read from the tensors' shapes where no configuration lies beside them.
    infer: Callable[[Shapes], Any]
    #: A configuration from beside the tensors, with what only they tell.
    seen: Callable[[Any, Shapes], Any] = lambda config, shapes: config
    #: The least tensors that a configuration asks for, found without building anything.
    least_tensors: Callable[[Any], int]
    #: File name without ending, in the diffusers layout.
    stem: str
    #: Files that hold it in the release's layout, by the beginning or a part of their names.
    released_as: re.Pattern[str]
    #: What other networks of the family are, by a part of a tensor's name: refused by that name.
    foreign: Mapping[str, re.Pattern[str]] = dataclasses.field(default_factory=dict)
    #: Tensors that some files have beside it and that it does not need.
    unneeded: re.Pattern[str] | None = None
    attachment: Attachment | None = None
    #: See `known_by`; none: the default configuration.
    examples: tuple[Any, ...] = ()
    #: Sizes that were published, by the name that they are known by.
    published: Mapping[str, Callable[[], Any]] = dataclasses.field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The name of the component by which its files are recognised."""
        return self.kin or self.name

    def known_by(self) -> tuple[Any, ...]:
        """The configurations whose names, numbers aside, are those by which files are recognised."""
        return self.examples or (self.config_type(),)

    def all_rows(self) -> tuple[Row, ...]:
        """The rows of these configurations, each once."""
        tables = [self.table(config) for config in self.known_by()]
        return tuple({(row.ours, *map(str, row.names.values())): row for rows in tables for row in rows}.values())

    def table(self, config: Any) -> tuple[Row, ...]:
        """The rows with the names of every dialect."""
        return tuple(dataclasses.replace(row, names=self._names(row)) for row in self.rows(config))

    def _names(self, row: Row) -> dict[str, str | tuple[str, ...]]:
        more = {dialect.name: dialect.names for dialect in self.dialects}
        return {**row.names, **{name: names[row.ours] for name, names in more.items() if row.ours in names}}

    def abstract(self, config: Any, dtype: Any) -> Any:
        """The module without memory: shapes only."""
        kinds = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
        return abstract_module(self.module, config, **kinds)

    def with_dialect(self, dialect: Dialect) -> Component:
        """The same network, whose files may be in one more dialect."""
        return dataclasses.replace(self, dialects=(*self.dialects, dialect))


#: By name, in the order in which they are told of.
REGISTRY: dict[str, Component] = {}


def register(component: Component) -> None:
    """Make a network known to all that loads, saves, converts and describes; one of the same name is replaced."""
    REGISTRY[component.name] = component


def kinds() -> list[Component]:
    """The registered networks that files are recognised as."""
    return [each for each in REGISTRY.values() if each.kind == each.name]


def component(name: str) -> Component:
    """A registered network."""
    return REGISTRY[name]


#: Wrappers that torch puts between the parts of a path.
_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"})
#: Networks that training programs keep beside the one that they train.
_OTHER_ROLES = frozenset({"critic", "teacher", "fake_score", "real_score", "discriminator", "fake", "real"})
#: State that training programs and all-in-one files keep beside a network, by the first part of its tensors' names.
_BESIDE = re.compile(
    r"(optim\w*|(lr_)?schedulers?|scaler|amp|rng\w*|callbacks|loops|hyper_parameters|ema\w*|generator\w*|"
    r"vae|first_stage_model|text_encoders?|cond_stage_model|conditioner|clip\w*|image_encoder)\."
)
_NUMBER = re.compile(r"0|[1-9][0-9]*", re.ASCII)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holding:
    """A network that a file holds: which, in which dialect, and under which prefix."""

    component: Component
    dialect: Dialect
    #: With its final dot.
    prefix: str
    #: The file's names by clean name, of all that lies under the prefix.
    names: Mapping[str, str]
    #: How many of them the table knows.
    known: int


def holdings(names: Iterable[str]) -> dict[str, Holding]:
    """The networks whose tensors these are, by name.

    Training programs and all-in-one files put prefixes before names, each its own: that prefix is taken which leaves
    the most known names. Where a file has several such (a generator and its running average), the average is taken, as
    its authors advise.

    Raises:
        CheckpointError: a network is there twice, and nothing tells which one is meant.
    """
    clean = {name: unwrapped(name) for name in names}
    found: dict[tuple[str, str], dict[str, int]] = {}
    marked: set[tuple[str, str, str]] = set()
    index = _index(tuple(kinds()))
    marks = {(each.name, dialect.name): dialect for each in kinds() for dialect in each.dialects}
    for short in clean.values():
        parts, without_numbers = short.split("."), generic(short).split(".")
        for start in range(min(len(parts), 24)):
            for key in index.get(".".join(without_numbers[start:]), ()):
                prefix = "".join(f"{part}." for part in parts[:start])
                counts = found.setdefault(key, {})
                counts[prefix] = counts.get(prefix, 0) + 1
                if marks[key].mark.match(short[len(prefix) :]):
                    marked.add((*key, prefix))
    best: dict[str, Holding] = {}
    for (name, dialect), counts in found.items():
        counts = {prefix: count for prefix, count in counts.items() if (name, dialect, prefix) in marked}
        if not counts or (name in best and best[name].known >= max(counts.values())):
            continue
        prefix = _chosen(counts, clean)
        best[name] = Holding(
            component=REGISTRY[name],
            dialect=marks[name, dialect],
            prefix=prefix,
            names=_under(prefix, clean),
            known=counts[prefix],
        )
    return {name: best[name] for name in REGISTRY if name in best}


def unwrapped(name: str) -> str:
    """A name without what torch's wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def generic(name: str) -> str:
    """A name with ``{}`` in the place of each number."""
    return ".".join("{}" if _NUMBER.fullmatch(part) else part for part in name.split("."))


@functools.lru_cache(maxsize=2)
def _index(components: tuple[Component, ...]) -> dict[str, list[tuple[str, str]]]:
    """Networks and dialects by each name that they know, numbers replaced by ``{}``. Kept: every folder that is opened
    asks for it, and some thousand rows are behind it."""
    index: dict[str, list[tuple[str, str]]] = {}
    for each in components:
        for row in each.all_rows():
            for dialect in row.names:
                for spelling in row.spellings(dialect):
                    owners = index.setdefault(generic(spelling), [])
                    if (each.name, dialect) not in owners:
                        owners.append((each.name, dialect))
    return index


def _chosen(counts: Mapping[str, int], clean: Mapping[str, str]) -> str:
    candidates = [prefix for prefix in counts if not _OTHER_ROLES & set(prefix.split("."))] or list(counts)
    most = max(counts[prefix] for prefix in candidates)
    candidates = [prefix for prefix in candidates if counts[prefix] == most]
    if len(candidates) > 1:
        averages = [prefix for prefix in candidates if re.search(r"(^|[._])(ema|average)([._]|$)", prefix)]
        candidates = averages or candidates
    if len(candidates) > 1:
        one, other = (next(raw for raw, short in clean.items() if short.startswith(each)) for each in candidates[:2])
        raise CheckpointError(
            f"ambiguous checkpoint: the same network is there under {len(candidates)} prefixes, as in {one!r} and "
            f"{other!r}"
        )
    return candidates[0]


def _under(prefix: str, clean: Mapping[str, str]) -> dict[str, str]:
    names: dict[str, str] = {}
    for raw, short in clean.items():
        if short.startswith(prefix):
            rest = short[len(prefix) :]
            if rest in names:
                raise CheckpointError(f"ambiguous checkpoint: {names[rest]!r} and {raw!r} are both {rest!r}")
            names[rest] = raw
    return names


def beside(holding: Holding, others: Iterable[Holding], name: str, info: TensorInfo) -> bool:
    """Is this tensor, which the table does not know, no part of the network but something kept beside it?"""
    raw = holding.names[name]
    within = any(
        len(other.prefix) > len(holding.prefix) and unwrapped(raw).startswith(other.prefix)
        for other in others
        if other is not holding
    )
    unneeded = holding.component.unneeded
    # No parameter is a single number without dimensions.
    return (
        within or info.counts or not info.shape or bool(_BESIDE.match(name)) or bool(unneeded and unneeded.match(name))
    )


def narrow(row: Row, dtype: Any) -> Any:
    """The type in which a row is kept when the model is kept in ``dtype`` (diffusers' ``_keep_in_fp32_modules``)."""
    wide = row.float32 or (row.float32_for_float16 and jnp.dtype(dtype) == jnp.float16)
    return jnp.dtype(jnp.float32) if wide else jnp.dtype(dtype)

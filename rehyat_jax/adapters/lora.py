"""A LoRA file or folder, opened: its parts by module, their scales, what it says of itself. Numbers stay on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rehyat_jax.adapters.names import OTHERS, Kind, dialect_of, parse
from rehyat_jax.errors import CheckpointError, RehyatError
from rehyat_jax.runtime import arguments
from rehyat_jax.weights.copying import blocks
from rehyat_jax.weights.files import KINDS, TensorSource, listed, parse_object, read_json
from rehyat_jax.weights.opening import open_tensors, weights_in

#: PEFT's, beside its weights.
ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model"
#: diffusers'.
_DIFFUSERS_WEIGHTS = "pytorch_lora_weights"
#: In a file's header: what diffusers writes.
HEADER = "lora_adapter_metadata"
#: First values by which training changed the base as well, so that the file alone is not the difference.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq")
#: Where a header names the words that call up what was trained.
_TRIGGERS = ("modelspec.trigger_phrase", "trigger_words", "trigger_word", "trigger_phrase", "ss_trigger_words")


#: Experts by noise level.
Into = Literal["high", "low"]


@dataclasses.dataclass(frozen=True)
class Lora:
    """A LoRA file or folder, and how strongly it is added: 1 as it was trained, 0 not at all."""

    file: Path
    strength: float = 1.0
    #: By which it is told from others that are loaded; the file's, without its ending, when not given.
    name: str = ""
    #: Of a model of two experts, the one that it is for; None: both.
    into: Into | None = None

    def __post_init__(self) -> None:
        plain = self.file.parent if self.file.stem in (_ADAPTER_WEIGHTS, _DIFFUSERS_WEIGHTS) else self.file
        object.__setattr__(self, "name", self.name or (plain.stem if plain.suffix else plain.name))

    @classmethod
    def of(cls, given: Any) -> Lora:
        """From a path, a path and a strength, or a text ``[high:|low:]FILE[:strength]``.

        Raises:
            RehyatError: it is none of these, or the strength is no finite number.
        """
        if isinstance(given, Lora):
            return given
        path, strength = given if isinstance(given, tuple) and len(given) == 2 else (given, 1.0)
        into: Into | None = None
        if path is given and isinstance(path, str) and not os.path.lexists(path):
            start, colon, rest = path.partition(":")
            if colon and start in ("high", "low"):
                path, into = rest, start  # type: ignore[assignment]
            front, _, end = path.rpartition(":")
            # Else a colon within the path.
            with contextlib.suppress(ValueError):
                path, strength = front or path, float(end) if front else strength
        return cls(arguments.user_path("lora", path), arguments.number("strength", strength), into=into)

    def __str__(self) -> str:
        return f"{self.name}:{self.strength:g}"


def loras_of(given: Iterable[Any]) -> tuple[Lora, ...]:
    """Several, as `Lora.of` takes them.

    Raises:
        RehyatError: one is none, or two have the same name.
    """
    if isinstance(given, str | os.PathLike) or not isinstance(given, Iterable):
        raise arguments.wrong("loras", given, "a list of LoRAs")
    loras = tuple(Lora.of(each) for each in given)
    for number, lora in enumerate(loras):
        if any(lora.name == other.name for other in loras[:number]):
            raise RehyatError(f"two LoRAs are called {lora.name!r}: give each once, or a name of its own")
    return loras


def of_expert(loras: Iterable[Lora], expert: Into | None) -> tuple[Lora, ...]:
    """Those that one transformer gets: of two experts, or the only one.

    Raises:
        RehyatError: there is one transformer, and a LoRA is for one of two.
    """
    chosen = tuple(loras)
    if expert is None and (wrong := next((lora for lora in chosen if lora.into is not None), None)) is not None:
        raise RehyatError(f"the LoRA {wrong.name!r} is for the {wrong.into} expert, and this model has one transformer")
    return tuple(lora for lora in chosen if lora.into in (None, expert))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """What a file has for one module: tensors' names by kind."""

    module: str
    names: Mapping[Kind, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraFile:
    """An opened LoRA."""

    path: Path
    tensors: TensorSource
    dialect: str
    parts: tuple[Part, ...]
    #: ``adapter_config.json``, or the same from a header.
    config: Mapping[str, Any]
    #: What the header says otherwise.
    header: Mapping[str, str]

    def read(self, name: str) -> np.ndarray:
        """A tensor in float32.

        Raises:
            CheckpointError: a value is not finite, or the file was cut meanwhile.
        """
        what = f"{self.path}: tensor {name!r}"
        info = self.tensors.infos[name]
        float32 = np.dtype(np.float32)
        pieces = [b.copy() for piece in self.tensors.pieces(name) for b in blocks(piece, float32, what)]
        return np.concatenate(pieces).reshape(info.shape) if pieces else np.zeros(info.shape, float32)

    def rank(self, part: Part) -> int | None:
        """None: a part of differences alone."""
        down = part.names.get("down")
        return None if down is None else self.tensors.infos[down].shape[0]

    def scale(self, part: Part) -> float:
        """By what a module's product is multiplied beside the strength: alpha / rank, of the file's own words.

        Raises:
            CheckpointError: alpha is no number.
        """
        rank = self.rank(part)
        if rank is None:
            return 1.0
        if (name := part.names.get("alpha")) is not None:
            return (float(self.read(name).reshape(())) or float(rank)) / rank
        alpha = _patterned(self.config, "alpha_pattern", part.module, self.config.get("lora_alpha"))
        if alpha is None:
            return 1.0
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The different ones, largest first."""
        return tuple(sorted({rank for part in self.parts if (rank := self.rank(part)) is not None}, reverse=True))

    @property
    def trigger(self) -> str | None:
        """The words that call up what was trained, where the header names them."""
        return next((self.header[key] for key in _TRIGGERS if self.header.get(key)), None)


def open_lora(path: str | os.PathLike[str], *, beside: str = "") -> LoraFile:
    """A LoRA of any dialect: a file, or a folder of PEFT's or of one file.

    Args:
        beside: what the names of tensors begin with that are something else's.

    Raises:
        CheckpointError: missing, damaged, or no LoRA; another kind of adapter (LoHa, LoKr, DoRA, …), by name.
    """
    file, config_file = located(Path(path))
    tensors = open_tensors(file)
    # A training program's file has much beside its generator's LoRA.
    inside = [name for name in tensors.infos if name.startswith("generator_lora.")] or list(tensors.infos)
    inside = [name for name in inside if not (beside and name.startswith(beside))]
    for what, pattern in OTHERS.items():
        if found := next((name for name in inside if pattern.search(name)), None):
            raise CheckpointError(f"{file} is {what} (tensor {found!r}), which is not supported: only LoRA is")
    config = _config(file, tensors, config_file)
    modules: dict[str, dict[Kind, str]] = {}
    unknown = []
    for name in inside:
        parsed = parse(name)
        if parsed is None:
            unknown.append(name)
        elif parsed.kind in modules.setdefault(parsed.module, {}):
            raise CheckpointError(f"{file}: {modules[parsed.module][parsed.kind]!r} and {name!r} are the same part")
        else:
            modules[parsed.module][parsed.kind] = name
    if not modules:
        raise CheckpointError(f"{file} holds {listed(tensors.infos)}: no LoRA that this program knows")
    if unknown:
        raise CheckpointError(f"{file} holds {listed(unknown)} that no LoRA has")
    for module, names in modules.items():
        _check_part(file, tensors, module, names)
    return LoraFile(
        path=file,
        tensors=tensors,
        dialect=dialect_of(inside, configured=config_file is not None),
        parts=tuple(Part(module=module, names=names) for module, names in modules.items()),
        config=config,
        header={key: value for key, value in tensors.metadata.items() if key != HEADER},
    )


def located(path: Path) -> tuple[Path, Path | None]:
    """The weights, and PEFT's configuration where there is one."""
    if path.is_dir():
        found = weights_in(path)
        mine = [file for file in found if file.name.startswith((_ADAPTER_WEIGHTS, _DIFFUSERS_WEIGHTS))] or found
        if len(mine) != 1:
            names = ", ".join(file.name for file in mine[:4]) or "none"
            raise CheckpointError(f"{path} must hold one LoRA file, and holds {len(mine)} ({names}): name the file")
        path = mine[0]
    beside = path.parent / ADAPTER_CONFIG
    return path, beside if path.stem == _ADAPTER_WEIGHTS and beside.is_file() else None


def _config(file: Path, tensors: TensorSource, config_file: Path | None) -> Mapping[str, Any]:
    """PEFT's configuration, from its file or from diffusers' entry in the header."""
    config: dict[str, Any] = {}
    where = str(config_file)
    if config_file is not None:
        config = read_json(config_file)
    elif (text := tensors.metadata.get(HEADER)) is not None:
        where = f"{HEADER} of {file}"
        whole = parse_object(text.encode("utf-8", "replace"), where)
        config = {key.partition(".")[2]: value for key, value in whole.items() if key.startswith("transformer.")}
    first = str(config.get("init_lora_weights"))
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise CheckpointError(f"{where}: peft_type {str(kind)[:40]!r} is not supported: only LORA is")
    for option in ("use_dora", "fan_in_fan_out", "lora_bias", "use_qalora"):
        if config.get(option):
            raise CheckpointError(f"{where}: {option} is not supported")
    if first.startswith(_CHANGED_BASE):
        raise CheckpointError(f"{where}: init_lora_weights {first[:40]!r} changed the base, which this file has not")
    for option in ("lora_alpha", *_patterns(config, "alpha_pattern", where)):
        value = config.get(option) if option == "lora_alpha" else config["alpha_pattern"][option]
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise CheckpointError(f"{where}: alpha must be a number, not {str(value)[:40]!r}")
    return config


def _patterns(config: Mapping[str, Any], name: str, where: str) -> Iterator[str]:
    """PEFT's are regular expressions for the end of a module's name, or with ``^`` for the whole of it, as diffusers
    writes them again; plain ones are all that is needed."""
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{where}: {name} must be an object, not {json.dumps(patterns)[:40]}")
    for pattern in patterns:
        if not pattern.removeprefix("^").removesuffix("$").replace(".", "").replace("_", "").isalnum():
            raise CheckpointError(f"{where}: {name} {pattern[:80]!r} is no plain name, which is not supported")
        yield pattern


def _patterned(config: Mapping[str, Any], name: str, module: str, otherwise: Any) -> Any:
    """The value of the first pattern that a module's name ends with."""
    patterns: Mapping[str, Any] = config.get(name) or {}
    for key, value in patterns.items():
        name = key.removeprefix("^").removesuffix("$")
        own = module.removeprefix("base_model.model.").removeprefix("transformer.")
        if own == name or (not key.startswith("^") and module.endswith(f".{name}")):
            return value
    return otherwise


def _check_part(file: Path, tensors: TensorSource, module: str, names: Mapping[Kind, str]) -> None:
    """
    Raises:
        CheckpointError: half a pair, an alpha alone, or tensors that are none of a LoRA.
    """
    for one, other in (("down", "up"), ("up", "down"), ("alpha", "down")):
        if one in names and other not in names:
            raise CheckpointError(f"{file} is no whole LoRA: {names[one]!r} has nothing that it goes with")  # type: ignore[index]
    for kind, name in names.items():
        info = tensors.infos[name]
        # sd-scripts keeps an alpha that follows from the rank as a whole number.
        if not (info.readable or (kind == "alpha" and info.kind in KINDS)):
            raise CheckpointError(f"{file}: tensor {name!r} is of type {tensors.infos[name].kind}, which is not read")
    if "down" in names:
        down, up = (tensors.infos[names[kind]].shape for kind in ("down", "up"))
        if len(down) < 2 or len(up) != len(down) or down[0] != up[1] or not down[0] or math.prod(up[2:]) != 1:
            raise CheckpointError(f"{file}: {names['down']!r} {list(down)} and {names['up']!r} {list(up)} are no pair")
    if "alpha" in names and tensors.infos[names["alpha"]].size != 1:
        raise CheckpointError(f"{file}: {names['alpha']!r} must be one number")

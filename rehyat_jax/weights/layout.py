"""Where a checkpoint keeps each network: the diffusers layout, one folder for all, a network's own folder, a file."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rehyat_jax.errors import CheckpointError
from rehyat_jax.weights.files import read_json
from rehyat_jax.weights.opening import is_index, open_tensors, weights_in
from rehyat_jax.weights.registry import REGISTRY, Component, component, holdings, kinds

INDEX = "model_index.json"
_CONFIG = "config.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Location:
    """One network's weights (a file, an index of shards or the first of them), and its configuration if it has one."""

    component: Component
    weights: Path
    config: Mapping[str, Any] | None


def described(config: Mapping[str, Any]) -> Component | None:
    """The network that a ``config.json`` describes; None when it is none of ours."""
    return next((each for each in kinds() if each.described_by(config)), None)


def _called(config: Mapping[str, Any]) -> str:
    """What a ``config.json`` describes, in words."""
    if (known := described(config)) is not None:
        return known.title
    name = config.get("_class_name", config.get("model_type"))
    return name[:80] if isinstance(name, str) else "something unknown"


def locate(path: Path, name: str) -> Location:
    """The network ``name`` in a file, in its own folder, or in a whole checkpoint's.

    Raises:
        CheckpointError: there is none there, or there are several.
    """
    wanted = component(name)
    if not _there(path):
        raise CheckpointError(f"{path} does not exist")
    if path.is_file():
        return Location(component=wanted, weights=path, config=_config_beside(path, wanted))
    if (path / INDEX).is_file():
        if not (path / name).is_dir():
            raise CheckpointError(f"{path} has no {name} folder, so no {wanted.title}")
        return locate(path / name, name)
    if wanted.released_in is not None and (path / wanted.released_in).is_dir():
        return locate(path / wanted.released_in, name)
    if (kept := _kept_in(path, wanted)) is not None:
        return locate(kept, name)
    config = _config(path)
    if config is not None and described(config) is None:
        raise CheckpointError(f"{path} holds a {_called(config)}, not a {wanted.title}")
    own = _if_of(config, wanted)
    found = _sets(path, config)
    if not found:
        raise CheckpointError(f"{path} holds no weights (*.safetensors, *.pth)")
    # Where nothing is known of what is there, whoever opens it says what it is.
    if any(found.values()) and not any(owners is UNKNOWN or wanted.kind in owners for owners in found.values()):
        raise CheckpointError(f"{path} holds {_titles(found)}, not a {wanted.title}")
    return Location(component=wanted, weights=_only(path, found, wanted), config=own)


def components_in(path: Path) -> tuple[str, ...]:
    """The networks of a checkpoint's folder, of a network's own, or of a file.

    Raises:
        CheckpointError: a file that must be read for it is damaged.
    """
    if not _there(path):
        return ()
    if path.is_file():
        return tuple(holdings(open_tensors(path).infos))
    if not path.is_dir():
        return ()
    if (path / INDEX).is_file():
        return tuple(name for name in REGISTRY if (path / name).is_dir())
    owners = set().union(*_sets(path, _config(path)).values())
    owners |= {each.name for each in REGISTRY.values() if each.released_in and (path / each.released_in).is_dir()}
    owners |= {each.name for each in REGISTRY.values() if _kept_in(path, each) is not None}
    return tuple(name for name in REGISTRY if name in owners)


def _kept_in(path: Path, wanted: Component) -> Path | None:
    """Where a network is kept below a folder that has no weights of its own, without an index: by its own name, or as
    ComfyUI calls it; None where it is not."""
    folders = [path / name for name in (wanted.name, *wanted.kept_in) if (path / name).is_dir()]
    return folders[0] if folders and not weights_in(path) else None


def _there(path: Path) -> bool:
    """
    Raises:
        CheckpointError: it is no path at all: a null character, a name too long.
    """
    try:
        if "\0" not in str(path):
            return path.exists()
    except OSError:
        pass
    raise CheckpointError(f"{str(path)[:200]!r} is no path")


#: Of a set of weights that cannot be read.
UNKNOWN: frozenset[str] = frozenset({"unknown"})


def _sets(folder: Path, config: Mapping[str, Any] | None) -> dict[Path, frozenset[str]]:
    """The sets of weights in a folder, and which networks each holds.

    By the configuration and the names in use where they tell, so that a network is found without opening the files of
    the others; else by what is in the files.
    """
    held = None if config is None else described(config)
    files = weights_in(folder)
    found = {}
    for file in files:
        if held is not None and (len(files) == 1 or _stem(file) == held.stem):
            found[file] = frozenset({held.name})
        elif len(files) > 1 and (named := _released_as(file)) is not None:
            found[file] = frozenset({named})
        else:
            try:
                found[file] = frozenset(holdings(open_tensors(file).infos))
            except CheckpointError:
                found[file] = UNKNOWN
    return found


def _released_as(file: Path) -> str | None:
    return next((each.name for each in kinds() if each.released_as.match(file.name)), None)


def _stem(file: Path) -> str:
    return re.split(r"\.|-\d+-of-\d+", file.name)[0]


def _titles(found: Mapping[Path, frozenset[str]]) -> str:
    titles = [f"a {REGISTRY[name].title}" for name in REGISTRY if name in set().union(*found.values())]
    return " and ".join(titles) or "something unknown"


def _config(folder: Path) -> dict[str, Any] | None:
    return read_json(folder / _CONFIG) if (folder / _CONFIG).is_file() else None


def _if_of(config: Mapping[str, Any] | None, wanted: Component) -> Mapping[str, Any] | None:
    return config if config is not None and wanted.described_by(config) else None


def _config_beside(path: Path, wanted: Component) -> Mapping[str, Any] | None:
    config = _config(path.parent)
    if config is None or wanted.described_by(config):
        return config
    if described(config) is None and "_class_name" in config:
        raise CheckpointError(f"{path.parent / _CONFIG} says that {path.name} is a {_called(config)}: not supported")
    if described(config) is None:
        warnings.warn(f"{path.parent / _CONFIG} describes a {_called(config)}: it is not used", stacklevel=2)
    return None


def _only(folder: Path, found: Mapping[Path, frozenset[str]], wanted: Component) -> Path:
    """The one set of weights that holds a network: the standard name first (variants, ``.fp16.``, may lie beside it),
    then the better format."""
    mine = [file for file, owners in found.items() if wanted.kind in owners]
    plain = [file for file in mine if file.name.count(".") == (3 if is_index(file) else 1)]
    standard = [file for file in plain if _stem(file) == wanted.stem]
    unknown = [file for file, owners in found.items() if owners is UNKNOWN or not any(found.values())]
    candidates = standard[:1] or mine + unknown
    if len(candidates) > 1 and len({_format(file) for file in mine}) == len(mine) > 1:
        candidates = mine[:1]
    if len(candidates) > 1:
        names = ", ".join(file.name for file in candidates[:4])
        raise CheckpointError(
            f"{folder} holds more than one set of weights for a {wanted.title} ({names}): keep one of them there"
        )
    return candidates[0]


def _format(file: Path) -> bool:
    return ".safetensors" in file.name or file.suffix == ".sft"

"""Where a checkpoint keeps each network: the diffusers layout, the original release's, a component's folder, a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rehyat_jax.errors import CheckpointError
from rehyat_jax.weights.component import BY_NAME, COMPONENTS, ComponentName
from rehyat_jax.weights.files import read_json

_INDEX = ".safetensors.index.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Location:
    """One network's weights (a file or an index of shards) and its configuration, where there is one."""

    component: ComponentName
    weights: Path
    config: Mapping[str, Any] | None


def class_of(config: Mapping[str, Any]) -> str | None:
    """The network that a ``config.json`` describes: one of ours, or another's class name; None when it does not say."""
    if config.get("_class_name") in ("WanTransformer3DModel", "WanModel") or {"dim", "num_heads"} <= set(config):
        return "transformer"
    if config.get("_class_name") == "AutoencoderKLWan":
        return "vae"
    if config.get("model_type") == "umt5":
        return "text_encoder"
    name = config.get("_class_name", config.get("model_type"))
    return name if isinstance(name, str) else None


def locate(path: Path, name: ComponentName) -> Location:
    """The network ``name`` in a file, in its own folder, or in a whole checkpoint's.

    Raises:
        CheckpointError: there is none there, or there are several.
    """
    title = BY_NAME[name].title
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if path.is_file():
        return Location(component=name, weights=path, config=_config_beside(path, name))
    if (path / "model_index.json").is_file():
        if name == "transformer":
            _check_one_transformer(path)
        if not (path / name).is_dir():
            raise CheckpointError(f"{path} has no {name} folder, so no {title}")
        return _in_component_folder(path / name, name)
    config = read_json(path / "config.json") if (path / "config.json").is_file() else None
    held = class_of(config) if config is not None else None
    if held == name and config is not None and not _is_original(config):
        return _in_component_folder(path, name)
    if config is None or _is_original(config):
        # The original release: one folder for all, whose config.json is the transformer's.
        if found := _original_file(path, name):
            return Location(component=name, weights=found, config=config if name == "transformer" else None)
        if config is None and not any(_original_file(path, other) for other in COMPONENTS):
            return _in_component_folder(path, name)
        raise CheckpointError(f"{path} holds no {title}: no file there is named {BY_NAME[name].original_files[-1]}")
    titles = {other: BY_NAME[other].title for other in COMPONENTS}
    what = next((titles[other] for other in COMPONENTS if other == held), held or "something unknown")
    raise CheckpointError(f"{path} holds a {what}, not a {title}")


def components_in(path: Path) -> tuple[ComponentName, ...]:
    """The networks of a whole checkpoint's folder; empty for a component's folder or a file."""
    if not path.is_dir():
        return ()
    if (path / "model_index.json").is_file():
        return tuple(name for name in COMPONENTS if (path / name).is_dir())
    config = read_json(path / "config.json") if (path / "config.json").is_file() else None
    if config is None or _is_original(config):
        return tuple(name for name in COMPONENTS if _original_file(path, name))
    return ()


def _is_original(config: Mapping[str, Any]) -> bool:
    return {"dim", "num_heads"} <= set(config)


def _check_one_transformer(path: Path) -> None:
    second = read_json(path / "model_index.json").get("transformer_2")
    if isinstance(second, list) and any(second):
        raise CheckpointError(f"{path} is a Wan2.2 checkpoint of two transformers; name one of their folders instead")


def _config_beside(path: Path, name: ComponentName) -> Mapping[str, Any] | None:
    beside = path.parent / "config.json"
    if not beside.is_file():
        return None
    config = read_json(beside)
    return config if class_of(config) == name else None


def _in_component_folder(path: Path, name: ComponentName) -> Location:
    config = read_json(path / "config.json") if (path / "config.json").is_file() else None
    return Location(component=name, weights=_only_weights(path, BY_NAME[name].stem), config=config)


def _only_weights(folder: Path, stem: str) -> Path:
    """The index or the one file of a folder; the standard name first: variants (``.fp16.``) may lie beside it."""
    indices = sorted(folder.glob(f"*{_INDEX}"))
    shards = {str(file) for index in indices for file in _files_of(index)}
    singles = sorted(file for file in folder.glob("*.safetensors") if file.name not in shards)
    candidates = indices + singles
    candidates = [file for file in candidates if file.name in (f"{stem}{_INDEX}", f"{stem}.safetensors")] or candidates
    if not candidates:
        candidates = sorted(file for ending in ("pth", "pt", "bin") for file in folder.glob(f"*.{ending}"))
    if not candidates:
        raise CheckpointError(f"{folder} holds no weights (*.safetensors, *.pth)")
    if len(candidates) > 1:
        names = ", ".join(file.name for file in candidates[:4])
        raise CheckpointError(f"{folder} holds more than one set of weights ({names}): name the file to read")
    return candidates[0]


def _files_of(index: Path) -> set[Any]:
    where = read_json(index).get("weight_map")
    return set(map(str, where.values())) if isinstance(where, dict) else set()


def _original_file(folder: Path, name: ComponentName) -> Path | None:
    for pattern in BY_NAME[name].original_files:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise CheckpointError(f"{folder} holds several {pattern}: name the file to read")
        if found:
            return found[0]
    return None

"""What a run is: its settings and the content of what it reads, kept in its folder; a resumed run must be the same.

Paths are compared by what they lead to, so a source or a data folder may have moved and not changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.mixers.base import MixerConfig
from rehyat_jax.models.folder import find_model
from rehyat_jax.runtime.files import sample_digest, whole_file
from train.data.prepared import INDEX, Prepared

FILE = "run.json"
_VERSION = 1
#: Settings that say where and how often, and nothing of what is computed: a resumed run may have others.
FREE = frozenset({"out", "processes", "checkpoint_seconds", "most_skipped", "keep_last", "keep_every"})
#: Settings that may change in the middle of a run, when that is asked for: any name of this kind, at any depth.
CHANGEABLE = frozenset({"steps", "learning_rate", "mesh", "validation"})
#: Of a model's weights so many places of a megabyte are read.
_SAMPLES = 8
_MODEL_FILES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".json")

#: Settings by dotted name; of what is read, a digest of the content.
Identity = Mapping[str, Any]


def identity_of(config: Any) -> dict[str, Any]:
    """A configuration by dotted names, those aside that a resumed run may change as it likes."""
    return dict(_flat("", config))


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if isinstance(value, MixerConfig):  # mixers of equal fields differ by their names alone
            yield f"{name}.mixer", value.name
        for field in dataclasses.fields(value):
            if name or field.name not in FREE:
                yield from _flat(f"{name}.{field.name}" if name else field.name, getattr(value, field.name))
    elif isinstance(value, (tuple, list)):
        yield f"{name}.length", len(value)
        for number, each in enumerate(value):
            yield from _flat(f"{name}.{number}", each)
    elif isinstance(value, Path) or (isinstance(value, str) and _is_file(value)):
        yield name, f"{value} ({_content(Path(value))})"
    else:
        yield name, value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)


def settings_of(value: Any) -> Any:
    """A configuration as plain values for a record: as ``dataclasses.asdict`` has it, a mixer with its name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = {"mixer": value.name} if isinstance(value, MixerConfig) else {}
        return own | {field.name: settings_of(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: settings_of(each) for name, each in value.items()}
    return [settings_of(each) for each in value] if isinstance(value, (tuple, list)) else value


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False


def _content(path: Path) -> str:
    """A digest of what a path leads to; nothing of it where that is not there."""
    digest = hashlib.sha256()
    try:
        if path.is_file():
            digest.update(sample_digest(path))
            return digest.hexdigest()[:16]
        if (path / INDEX).is_file():
            return Prepared.read_index(path).identity[:16]
        folder = find_model(path)
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file.suffix in _MODEL_FILES:
                digest.update(file.relative_to(folder).as_posix().encode() + sample_digest(file, count=_SAMPLES))
    except (OSError, RehyatError):
        return "missing"
    return digest.hexdigest()[:16]


def _same(before: Any, now: Any) -> bool:
    if before == now:
        return True
    if isinstance(before, str) and isinstance(now, str) and before.endswith(")") and now.endswith(")"):
        contents = [text.rpartition(" (")[2] for text in (before, now)]
        return contents[0] == contents[1] != "missing)"
    return False


def differences(before: Identity, now: Identity) -> list[str]:
    """Names of settings that differ, in order. One that only one version of the program has does not count."""
    return [name for name in before if name in now and not _same(before[name], now[name])]


def may_change(name: str) -> bool:
    return not CHANGEABLE.isdisjoint(name.split("."))


def compare(folder: Path, now: Identity, *, change: bool = False) -> list[str]:
    """Whether a run's folder is of a run with the same identity.

    Args:
        change: settings that may change (`may_change`) may differ.

    Returns:
        What differs, in words.

    Raises:
        ConfigError: it is another run's, by the first setting that differs; its record is damaged.
    """
    before, said = _read(folder)["settings"], []
    for name in differences(before, now):
        how = f"{name} was {before[name]} and is {now[name]}"
        if not may_change(name):
            raise ConfigError(f"{folder} is of another run: {how}; choose another --out")
        if not change:
            raise ConfigError(f"{folder} is of another run: {how}; --change goes on so, or choose another --out")
        said.append(how)
    return said


def keep(folder: Path, now: Identity, *, step: int | None) -> None:
    """Record a run's identity, and what of it changes at ``step``, where there is a checkpoint (None: there is none).

    Raises:
        RehyatError: it cannot be written.
    """
    before = _read(folder) if step is not None else {"settings": {}, "changes": []}
    changes = [
        {"step": step, "name": name, "before": before["settings"][name], "now": now[name]}
        for name in differences(before["settings"], now)
    ]
    content = {"version": _VERSION, "settings": dict(now), "changes": [*before["changes"], *changes]}
    with whole_file(folder / FILE) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _read(folder: Path) -> dict[str, Any]:
    """The record; an empty one where a run began before there were records."""
    path = folder / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {"settings": dict(content["settings"]), "changes": list(content["changes"])}
    except FileNotFoundError:
        return {"settings": {}, "changes": []}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: choose another --out") from error

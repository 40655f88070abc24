"""Where a named model lives, and the settings that come with it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rehyat_jax.errors import CheckpointError, ConfigError
from rehyat_jax.sampling import FlowSchedule, Solver, UniPC, scheduler_from_config
from rehyat_jax.sampling.rollout import Remember, check_remember
from rehyat_jax.weights.files import read_json

_ASSETS = Path(__file__).parents[1] / "assets"
#: Beside ``model_index.json``: our file, because diffusers warns of keys in its own that it does not know.
DEFAULTS_FILE = "rehyat_defaults.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a model is run at when nothing else is asked for.

    The values here are Wan2.1 T2V-1.3B's: 480p, 81 frames and 50 steps as ``generate.py`` of Wan-Video/Wan2.1, guidance
    as its README advises for that model (diffusers' own default is 5). A folder may bring its own in
    ``rehyat_defaults.json``.
    """

    height: int = 480
    width: int = 832
    num_frames: int = 81
    num_inference_steps: int = 50
    guidance_scale: float | int = 6.0
    #: How a stream remembers its chunks: as the model was trained.
    remember: Remember = "steps"

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> Defaults:
        """
        Raises:
            ConfigError: an unknown name, or a value that is no number of its kind.
        """
        kinds: dict[str, type | tuple[type, ...]] = {field.name: int for field in dataclasses.fields(cls)}
        kinds |= {"guidance_scale": (int, float), "remember": (str, int, float)}
        for name, value in source.items():
            if name not in kinds:
                raise ConfigError(f"{DEFAULTS_FILE}: {name[:80]!r} is no setting; there are {', '.join(kinds)}")
            if not isinstance(value, kinds[name]) or isinstance(value, bool):
                raise ConfigError(f"{DEFAULTS_FILE}: {name} cannot be {str(value)[:80]!r}")
        try:
            check_remember(source.get("remember", "steps"))
        except ConfigError as error:
            raise ConfigError(f"{DEFAULTS_FILE}: {error}") from error
        return cls(**source)


def bundled_models() -> dict[str, Path]:
    """The models that ship with the package, by name."""
    return {path.parent.name: path.parent for path in sorted(_ASSETS.glob("*/model_index.json"))}


def find_model(name_or_path: str | os.PathLike[str]) -> Path:
    """The folder of a bundled model's name, of a path, or (explicitly) of ``hf:OWNER/NAME``.

    Raises:
        CheckpointError: there is no such model, or the hub's client is not installed or does not find it.
    """
    name = os.fspath(name_or_path)
    bundled = bundled_models()
    if name in bundled:
        return bundled[name]
    if name.startswith("hf:"):
        return _from_hub(name.removeprefix("hf:"))
    path = Path(name).expanduser()
    try:
        if name and path.is_dir():
            return path
    except (ValueError, OSError) as error:  # a null character; a name too long
        raise CheckpointError(f"{name[:200]!r} is no path") from error
    names = ", ".join(bundled) or "none"
    raise CheckpointError(f"there is no folder {name[:200]!r}, nor a bundled model of that name (bundled: {names})")


def _from_hub(repository: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(f"to fetch hf:{repository}, install huggingface_hub") from error
    try:
        return Path(snapshot_download(repository))
    except Exception as error:  # the client's own kinds of error, its network library's, and OSErrors
        why = str(error).strip().split("\n")[0]
        raise CheckpointError(f"cannot fetch {repository} from the Hugging Face hub: {why}") from error


def read_defaults(folder: Path) -> Defaults:
    """The folder's own defaults, else Wan2.1's.

    Raises:
        CheckpointError, ConfigError: the folder's file cannot be read or makes no sense.
    """
    path = folder / DEFAULTS_FILE
    return Defaults.from_dict(read_json(path)) if path.is_file() else Defaults()


def read_scheduler(folder: Path) -> tuple[FlowSchedule, Solver]:
    """The folder's ``scheduler/scheduler_config.json``; without one (the original layout) the original program's.

    That is UniPC on the official grid, with the shift that the README of Wan-Video/Wan2.1 advises for T2V-1.3B.

    Raises:
        CheckpointError, ConfigError: the file cannot be read, or describes a scheduler that we do not have.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    if path.is_file():
        return scheduler_from_config(read_json(path))
    return FlowSchedule(grid="official", shift=8.0), UniPC()

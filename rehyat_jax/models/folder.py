"""Where a named model lives, and the settings that come with it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from rehyat_jax.errors import CheckpointError, ConfigError
from rehyat_jax.models.networks import component, components_in, open_component
from rehyat_jax.models.wan.advice import Advice, advised
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.runtime.arguments import user_path
from rehyat_jax.sampling import FlowSchedule, Solver, UniPC, scheduler_from_config
from rehyat_jax.sampling.rollout import ContextNoise, check_context_noise
from rehyat_jax.sampling.schedule import Grid
from rehyat_jax.sampling.settings import SOLVERS
from rehyat_jax.weights.files import read_json
from rehyat_jax.weights.layout import INDEX

_ASSETS = Path(__file__).parents[1] / "assets"
#: Beside ``model_index.json``, or with the transformer that it is of: our file, because diffusers warns of keys in its
#: own that it does not know.
DEFAULTS_FILE = "rehyat_defaults.json"
SCHEDULER_FILE = Path("scheduler", "scheduler_config.json")
#: Where a student's own defaults lie, when its teacher is in the same folder and has others: with the student.
STUDENTS_DEFAULTS = Path("transformer", "rehyat", DEFAULTS_FILE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a model is run at when nothing else is asked for.

    A folder may bring its own in ``rehyat_defaults.json``, and its student others in ``rehyat/`` (few steps, where the
    teacher needs many); what neither says is as the authors of Wan advise for a model of its width
    (`models.wan.advice`); the values here are those for T2V-1.3B.
    """

    height: int = 480
    width: int = 832
    num_frames: int = 81
    #: Frames a second.
    fps: int = 16
    num_inference_steps: int = 50
    guidance_scale: float | int = 6.0
    #: Of the low-noise expert, where there are two; None: as the other's.
    guidance_scale_2: float | int | None = None
    negative_prompt: str = ""
    #: The context noise that a stream commits its chunks with: as the model was trained.
    remember: ContextNoise = "steps"
    #: Of a stream's first chunk, if more than the others'.
    first_chunk_steps: int | None = None
    #: Numbers of denoising steps that the model is good at, among which `rehyat generate --steps auto` chooses; none:
    #: its own alone.
    offered_steps: Sequence[int] = ()
    #: By name, where it is not the scheduler's: diffusers has none for a few-step student.
    solver: str | None = None
    #: The grid and shift of noise levels, where they are not the scheduler's.
    grid: Grid | None = None
    shift: float | int | None = None
    #: "folder": the noise levels are those of ``scheduler_config.json``. "authors": those of the authors' program, with
    #: the shift that they advise for the model and the size.
    schedule: Literal["folder", "authors"] = "folder"
    #: The transformer that all this is for; no setting of the file.
    model: WanConfig | None = dataclasses.field(default=None, compare=False)
    #: Whether that is one of two; no setting either.
    experts: bool = dataclasses.field(default=False, compare=False)

    @classmethod
    def from_dict(cls, source: Mapping[str, Any], *, otherwise: Defaults | None = None) -> Defaults:
        """
        Args:
            otherwise: has what ``source`` does not say; the class's own values when not given.

        Raises:
            ConfigError: an unknown name, or a value that is no number of its kind.
        """
        kinds: dict[str, type | tuple[type, ...]] = {
            field.name: int for field in dataclasses.fields(cls) if field.name not in ("model", "experts")
        }
        kinds |= dict.fromkeys(("guidance_scale", "guidance_scale_2"), (int, float))
        kinds |= {"remember": (str, int, float), "negative_prompt": str}
        kinds |= {"schedule": str, "solver": str, "offered_steps": list, "grid": str, "shift": (int, float)}
        for name, value in source.items():
            if name not in kinds:
                raise ConfigError(f"{DEFAULTS_FILE}: {name[:80]!r} is no setting; there are {', '.join(kinds)}")
            if not isinstance(value, kinds[name]) or isinstance(value, bool):
                raise ConfigError(f"{DEFAULTS_FILE}: {name} cannot be {str(value)[:80]!r}")
        if source.get("schedule", "folder") not in ("folder", "authors"):
            raise ConfigError(f"{DEFAULTS_FILE}: schedule must be folder or authors, not {source['schedule'][:80]!r}")
        try:
            check_context_noise(source.get("remember", "steps"))
        except ConfigError as error:
            raise ConfigError(f"{DEFAULTS_FILE}: {error}") from error
        steps = source.get("offered_steps", [])
        if not all(isinstance(each, int) and not isinstance(each, bool) and each > 0 for each in steps):
            raise ConfigError(
                f"{DEFAULTS_FILE}: offered_steps is a list of whole numbers above 0, not {str(steps)[:80]!r}"
            )
        if (grid := source.get("grid")) is not None and grid not in get_args(Grid):
            raise ConfigError(f"{DEFAULTS_FILE}: there is no grid {grid[:80]!r}, only {', '.join(get_args(Grid))}")
        if (solver := source.get("solver")) is not None and solver not in SOLVERS:
            raise ConfigError(f"{DEFAULTS_FILE}: there is no solver {solver[:80]!r}, only {', '.join(SOLVERS)}")
        return dataclasses.replace(otherwise or cls(), **source)

    @property
    def advice(self) -> Advice:
        """What the authors advise for the model, at its own size."""
        return advised(self.model or WanConfig.t2v_1_3b(), experts=self.experts)

    def advised_schedule(self, *, height: int, width: int) -> FlowSchedule | None:
        """The authors' noise levels for videos of this size; None where the folder has levels of its own."""
        if self.schedule == "folder" or self.model is None or self.grid is not None:
            return None
        advice = advised(self.model, height=height, width=width, experts=self.experts)
        return FlowSchedule(grid="official", shift=advice.shift)


def bundled_models() -> dict[str, Path]:
    """The models that ship with the package, by name."""
    return {path.parent.name: path.parent for path in sorted(_ASSETS.glob("*/model_index.json"))}


def find_model(name_or_path: str | os.PathLike[str]) -> Path:
    """The folder of a bundled model's name, of a path, or (explicitly) of ``hf:OWNER/NAME``.

    Raises:
        CheckpointError: there is no such model, or the hub's client is not installed or does not find it.
    """
    user_path("the model", name_or_path)
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
    with contextlib.suppress(ValueError, OSError):
        if path.is_file():
            raise CheckpointError(
                f"{name} is a single file, and a model is a folder with a transformer, a VAE, a text encoder and a "
                "tokenizer: put them into one folder and name that (rehyat info tells what a file holds)"
            )
    names = ", ".join(bundled) or "none"
    raise CheckpointError(f"there is no folder {name[:200]!r}, nor a bundled model of that name (bundled: {names})")


def find_checkpoint(name_or_path: str | os.PathLike[str]) -> Path:
    """As `find_model`, and a file too: whatever a checkpoint may be kept in."""
    user_path("path", name_or_path)
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if "\0" in name:  # which ``exists`` takes for a path that is not there
        raise CheckpointError(f"{name[:200]!r} is no path")
    with contextlib.suppress(ValueError, OSError):
        if path.is_file():
            return path
        if not path.exists() and name not in bundled_models() and not name.startswith("hf:"):
            raise CheckpointError(f"{name} does not exist, nor a bundled model of that name")
    return find_model(name)


def _from_hub(repository: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        how = "pip install 'rehyat-jax[hub]'"
        raise CheckpointError(f"to fetch hf:{repository}, install huggingface_hub ({how})") from error
    try:
        return Path(snapshot_download(repository))
    except Exception as error:  # the client's own kinds of error, its network library's, and OSErrors
        why = str(error).strip().split("\n")[0]
        raise CheckpointError(f"cannot fetch {repository} from the Hugging Face hub: {why}") from error


def defaults_files(folder: Path, *, student: bool = True) -> list[Path]:
    """The files with the folder's own defaults; a later one's word counts.

    Args:
        student: those of the student in the folder too, if there is one.
    """
    own = (Path(DEFAULTS_FILE), Path("transformer", DEFAULTS_FILE))
    files = own + ((STUDENTS_DEFAULTS, Path("rehyat", DEFAULTS_FILE)) if student else ())
    return [folder / file for file in files if (folder / file).is_file()]


def read_defaults(folder: Path, *, student: bool = True) -> Defaults:
    """The folder's own defaults; what it does not say is as the authors advise for its transformer.

    A folder without a scheduler (a release's) is run as the authors' program runs it: their noise levels, and their
    negative prompt where none is asked for.

    Args:
        student: what its student is run with; else its softmax teacher, or that converted anew.

    Raises:
        CheckpointError, ConfigError: a file of the folder cannot be read or makes no sense.
    """
    model = _transformer_of(folder)
    experts = "transformer_2" in components_in(folder)
    advice = advised(model, experts=experts)
    released = not (folder / SCHEDULER_FILE).is_file()
    otherwise = Defaults(
        height=advice.height,
        width=advice.width,
        num_frames=advice.num_frames,
        fps=advice.fps,
        num_inference_steps=advice.num_inference_steps,
        guidance_scale=advice.guidance_scale,
        guidance_scale_2=advice.guidance_scale_2,
        negative_prompt=advice.negative_prompt if released else "",
        schedule="authors" if released else "folder",
        model=model,
        experts=experts,
    )
    for file in defaults_files(folder, student=student):
        otherwise = Defaults.from_dict(read_json(file), otherwise=otherwise)
    return otherwise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
    """What a whole checkpoint says of how its networks work together."""

    #: An image goes in as a finished first latent frame: diffusers' ``expand_timesteps``.
    clean_first_frame: bool = False
    #: Of two experts: the share of the noise levels, from the lowest on, that is the second's; None: there is one.
    boundary_ratio: float | None = None

    def levels(self, expert: Literal["high", "low"] | None) -> tuple[float, float]:
        """From and to which noise level an expert is for; one transformer is for all."""
        if self.boundary_ratio is None or expert is None:
            return 0.0, 1.0
        return (self.boundary_ratio, 1.0) if expert == "high" else (0.0, self.boundary_ratio)

    def to_index(self) -> dict[str, Any]:
        """As ``model_index.json`` has it, beside the networks that every model has."""
        first = {"expand_timesteps": True} if self.clean_first_frame else {}
        if self.boundary_ratio is None:
            return first
        return first | {
            "boundary_ratio": self.boundary_ratio,
            "transformer_2": ["diffusers", "WanTransformer3DModel"],
        }


def read_traits(folder: Path) -> Traits:
    """By ``model_index.json``; of a release as its authors' program has it.

    Raises:
        CheckpointError: an expert is missing, or a file cannot be read.
        ConfigError: a value makes no sense.
    """
    names = components_in(folder)
    if not (folder / INDEX).is_file():
        experts = [component(name) for name in ("transformer", "transformer_2")]
        there = [(folder / each.released_in).is_dir() for each in experts if each.released_in]
        if any(there) and not all(there):
            raise CheckpointError(
                f"{folder} has one expert of two: {experts[there.index(False)].released_in} is missing"
            )
        advice = advised(_transformer_of(folder), experts="transformer_2" in names)
        boundary = advice.boundary_ratio if "transformer_2" in names else None
        return Traits(clean_first_frame=advice.clean_first_frame, boundary_ratio=boundary)
    index = read_json(folder / INDEX)
    value, boundary = index.get("expand_timesteps", False), index.get("boundary_ratio")
    if not isinstance(value, bool | None):
        raise ConfigError(f"{folder / INDEX}: expand_timesteps must be true or false, not {str(value)[:80]!r}")
    if boundary is not None:
        if not isinstance(boundary, int | float) or isinstance(boundary, bool) or not 0 < boundary < 1:
            raise ConfigError(f"{folder / INDEX}: boundary_ratio must be between 0 and 1, not {str(boundary)[:80]!r}")
        if missing := [name for name in ("transformer", "transformer_2") if name not in names]:
            raise CheckpointError(f"{folder} has two experts by its {INDEX}, and {missing[0]} is missing")
    return Traits(clean_first_frame=bool(value), boundary_ratio=boundary)


def _transformer_of(folder: Path) -> WanConfig:
    """The sizes of a folder's transformer; T2V-1.3B's where it has none."""
    if "transformer" not in components_in(folder):
        return WanConfig.t2v_1_3b()
    config: WanConfig = open_component(folder, "transformer").config
    return config


def read_scheduler(folder: Path, *, student: bool = True) -> tuple[FlowSchedule, Solver]:
    """How the folder's model is sampled at its own size: by its ``scheduler/scheduler_config.json``; without one (a
    release's folder) by the authors' program, which is UniPC on the official grid with the shift that they advise. The
    solver is another where the folder's own defaults name it.

    Args:
        student: as for `read_defaults`.

    Raises:
        CheckpointError, ConfigError: the file cannot be read, or describes a scheduler that we do not have.
    """
    defaults = read_defaults(folder, student=student)
    advice = defaults.advised_schedule(height=defaults.height, width=defaults.width)
    named = None if defaults.solver is None else SOLVERS[defaults.solver]()
    if (folder / SCHEDULER_FILE).is_file():
        schedule, solver = scheduler_from_config(read_json(folder / SCHEDULER_FILE))
    else:
        schedule, solver = FlowSchedule(grid="official", shift=defaults.advice.shift), UniPC()
    own: dict[str, Any] = {name: value for name in ("grid", "shift") if (value := getattr(defaults, name)) is not None}
    return advice or dataclasses.replace(schedule, **own), named or solver

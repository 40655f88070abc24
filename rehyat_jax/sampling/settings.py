"""How a video is made, and the same as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

from rehyat_jax.errors import ConfigError
from rehyat_jax.sampling.guidance import Guidance
from rehyat_jax.sampling.rollout import ContextNoise, check_context_noise
from rehyat_jax.sampling.schedule import FlowSchedule, Grid, SamplingSteps, sampling_steps
from rehyat_jax.sampling.solvers import Euler, Renoise, Solver, UniPC

_NUMBERS: dict[str, type | tuple[type, ...]] = {
    "num_frames": int,
    "height": int,
    "width": int,
    "num_inference_steps": int,
    "guidance_scale": (int, float),
    "remember": (str, int, float),
    "first_chunk_steps": (int, type(None)),
    "guidance_scale_2": (int, float, type(None)),
}
_SCHEDULE: dict[str, type | tuple[type, ...]] = {"grid": str, "shift": (int, float), "num_train_timesteps": int}
#: By name, as files have it.
SOLVERS: dict[str, type[Euler] | type[UniPC] | type[Renoise]] = {"Euler": Euler, "UniPC": UniPC, "Renoise": Renoise}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a video is made, every value resolved: see ``TextToVideo.settings``."""

    #: Of a stream: the first block's.
    num_frames: int
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    schedule: FlowSchedule
    solver: Solver
    #: The context noise that a stream commits its chunks with.
    remember: ContextNoise = "steps"
    #: Of a stream's first chunk, if more than the others'.
    first_chunk_steps: int | None = None
    #: Of the low-noise expert, where there are two; None: as the other's.
    guidance_scale_2: float | None = None

    @property
    def guidance(self) -> Guidance:
        """The two prompts one after the other, in the memory of one."""
        return self.guidances[0]

    @property
    def guidances(self) -> tuple[Guidance, ...]:
        """Of each expert, the highest noise level first."""
        low = self.guidance_scale if self.guidance_scale_2 is None else self.guidance_scale_2
        return tuple(Guidance(scale=scale, forward="two") for scale in (self.guidance_scale, low))

    @property
    def draws_noise(self) -> bool:
        """Whether the solver draws noise on the way. A call of a model that streams then makes its video as a stream
        does: a few-step student knows no past but finished chunks."""
        return self.solver.stochastic

    def steps(self, *, of_first_chunk: bool = False) -> SamplingSteps:
        """
        Raises:
            ConfigError: the schedule has no such number of steps, or the solver does not accept its levels; the first
                chunk has more steps where every step has a state of its own.
        """
        count = self.num_inference_steps
        if of_first_chunk and self.first_chunk_steps is not None and self.first_chunk_steps > count:
            if self.remember == "steps":
                raise ConfigError('a first chunk of more steps needs finished chunks to be remembered, not "steps"')
            count = self.first_chunk_steps
        return sampling_steps(self.schedule, self.solver, num_steps=count)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it.

        Raises:
            ConfigError: the solver is none of this package's.
        """
        name = type(self.solver).__name__
        if type(self.solver) is not SOLVERS.get(name):
            raise ConfigError(f"a stream with the solver {name} cannot be saved: only with {' or '.join(SOLVERS)}")
        numbers = {key: getattr(self, key) for key in _NUMBERS}
        solver = {"name": name, **dataclasses.asdict(self.solver)}
        return numbers | {"schedule": dataclasses.asdict(self.schedule), "solver": solver}

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> Settings:
        """From ``to_dict``'s; what the values mean to a model is not checked.

        Raises:
            ConfigError: a name is unknown or missing, or a value is not of its kind.
        """
        # Of streams saved before there were these.
        source = {"remember": "steps", "first_chunk_steps": None, "guidance_scale_2": None} | dict(source)
        numbers = _known({k: v for k, v in source.items() if k not in ("schedule", "solver")}, _NUMBERS, "settings")
        check_context_noise(numbers["remember"])
        schedule, solver = source.get("schedule"), source.get("solver")
        if not isinstance(schedule, Mapping) or not isinstance(solver, Mapping):
            raise ConfigError("the settings name no schedule or no solver")
        name = solver.get("name")
        kind = SOLVERS.get(name) if isinstance(name, str) else None
        if kind is None:
            raise ConfigError(f"there is no solver {str(name)[:80]!r}")
        order: dict[str, type | tuple[type, ...]] = {"order": int} if kind is UniPC else {}
        options = _known({k: v for k, v in solver.items() if k != "name"}, order, f"solver {name}")
        schedule = _known(schedule, _SCHEDULE, "schedule")
        if schedule["grid"] not in get_args(Grid):
            raise ConfigError(f"there is no grid of noise levels {schedule['grid'][:80]!r}")
        return cls(**numbers, schedule=FlowSchedule(**schedule), solver=kind(**options))


def _known(source: Mapping[str, Any], kinds: Mapping[str, type | tuple[type, ...]], what: str) -> dict[str, Any]:
    if source.keys() != kinds.keys():
        wrong = str(min(source.keys() ^ kinds.keys()))[:80]
        raise ConfigError(f"the {what} {'lacks' if wrong in kinds else 'knows no'} {wrong!r}")
    for name, value in source.items():
        # No number that is of use is larger; NaN is not smaller.
        wild = isinstance(value, int | float) and not abs(value) < 1e12
        if not isinstance(value, kinds[name]) or isinstance(value, bool) or wild:
            raise ConfigError(f"{name} in the {what} cannot be {str(value)[:80]!r}")
    return dict(source)

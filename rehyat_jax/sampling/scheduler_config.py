"""diffusers' ``scheduler/scheduler_config.json``, read into a schedule and a solver, and written from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rehyat_jax.errors import ConfigError
from rehyat_jax.sampling.schedule import FlowSchedule
from rehyat_jax.sampling.solvers import Euler, Solver, UniPC

_UNIPC = "UniPCMultistepScheduler"
_EULER = "FlowMatchEulerDiscreteScheduler"

#: What a file must say of the variants that we do not have, as (diffusers' default where it says nothing, our value).
_REQUIRED: dict[str, dict[str, tuple[Any, Any]]] = {
    _UNIPC: {
        "prediction_type": ("epsilon", "flow_prediction"),
        "use_flow_sigmas": (False, True),
        "predict_x0": (True, True),
        "solver_type": ("bh2", "bh2"),
        "solver_p": (None, None),
        "lower_order_final": (True, True),
        "disable_corrector": ([], []),
        "thresholding": (False, False),
        "final_sigmas_type": ("zero", "zero"),
    },
    _EULER: {
        "invert_sigmas": (False, False),
        "stochastic_sampling": (False, False),
    },
}
_REQUIRED_OF_BOTH: dict[str, tuple[Any, Any]] = {
    "use_dynamic_shifting": (False, False),
    "use_karras_sigmas": (False, False),
    "use_exponential_sigmas": (False, False),
    "use_beta_sigmas": (False, False),
    "shift_terminal": (None, None),
}


def scheduler_from_config(config: Mapping[str, Any]) -> tuple[FlowSchedule, Solver]:
    """The schedule and the solver that a ``scheduler_config.json`` describes.

    Raises:
        ConfigError: another scheduler's file, a variant that is not supported, or an impossible value.
    """
    name = config.get("_class_name")
    if name not in (_UNIPC, _EULER):
        raise ConfigError(f"scheduler {name!r} is not supported: only {_UNIPC} and {_EULER}")
    for key, (default, required) in {**_REQUIRED[name], **_REQUIRED_OF_BOTH}.items():
        value = config.get(key, default)
        if value != required:
            raise ConfigError(f"{name}: {key} = {value!r} is not supported (only {required!r})")
    steps = _integer(name, config, key="num_train_timesteps", default=1000)
    if name == _EULER:
        shift = _number(name, config, key="shift", default=1.0)
        return FlowSchedule(grid="diffusers-euler", shift=shift, num_train_timesteps=steps), Euler()
    shift = _number(name, config, key="flow_shift", default=1.0)
    order = _integer(name, config, key="solver_order", default=2)
    return FlowSchedule(grid="diffusers", shift=shift, num_train_timesteps=steps), UniPC(order)


def scheduler_to_config(schedule: FlowSchedule, solver: Solver) -> dict[str, Any]:
    """The ``scheduler_config.json`` with which diffusers takes the same steps.

    Raises:
        ConfigError: no scheduler of diffusers has this solver on this grid.
    """
    match schedule.grid, solver:
        case "diffusers", UniPC():
            name, own = _UNIPC, {"flow_shift": schedule.shift, "solver_order": solver.order}
        case "diffusers-euler", Euler():
            name, own = _EULER, {"shift": schedule.shift}
        case _:
            solver_name = type(solver).__name__
            raise ConfigError(f"no scheduler of diffusers has the solver {solver_name} on the grid {schedule.grid!r}")
    fixed = {key: required for key, (_, required) in {**_REQUIRED[name], **_REQUIRED_OF_BOTH}.items()}
    return {
        "_class_name": name,
        "_diffusers_version": "0.37.0",
        "num_train_timesteps": schedule.num_train_timesteps,
        **own,
        **fixed,
    }


def _number(name: str, config: Mapping[str, Any], *, key: str, default: float) -> float:
    value = config.get(key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ConfigError(f"{name}: {key} must be a number, not {value!r}")
    return float(value)


def _integer(name: str, config: Mapping[str, Any], *, key: str, default: int) -> int:
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name}: {key} must be a whole number, not {value!r}")
    return value

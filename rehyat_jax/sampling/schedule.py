"""Noise levels: the grids on which the programs around Wan solve the flow from noise (sigma 1) to data (sigma 0)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from rehyat_jax.errors import ConfigError
from rehyat_jax.sampling.solvers import Solver

Grid = Literal["diffusers", "diffusers-euler", "official", "warped", "causvid", "rcm"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowSchedule:
    """Noise levels of rectified flow, x_sigma = (1 - sigma) data + sigma noise.

    Even levels s are shifted to shift s / (1 + (shift - 1) s): the larger the video, the larger the shift (Wan2.1 1.3B
    at 480p: 3 by the published configuration, 8 by the authors' advice). The grid says whose levels are meant, to the
    last bit of float32:

    - ``"diffusers"``: ``UniPCMultistepScheduler(use_flow_sigmas=True)`` since 0.37 (before, it used the official
      levels): from 1, nudged to 0.999999, towards 1 / num_train_timesteps.
    - ``"diffusers-euler"``: ``FlowMatchEulerDiscreteScheduler``: from 1 down to its lowest level, which it has
      shifted already when it shifts the whole grid once more.
    - ``"official"``: Wan-Video/Wan2.1 ``wan/utils/fm_solvers_unipc.py``: from 0.999 towards 0, as ``wan/text2video.py``
      sets it up.
    - ``"warped"``: from 1 towards 0 in equal parts, shifted: guandeh17/Self-Forcing and ModelTC's four-step models.
    - ``"causvid"``, ``"rcm"``: the levels that these few-step models were trained at, whatever the shift.

    Each appends the level 0. Any solver runs on any grid that it accepts (UniPC: the first level below 1).

    Raises:
        ConfigError: an unknown grid, or a number that is out of range.
    """

    grid: Grid = "diffusers"
    shift: float | int = 3.0
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        if self.grid not in _LEVELS:
            raise ConfigError(f"FlowSchedule.grid must be one of {', '.join(_LEVELS)}, not {self.grid!r}")
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise ConfigError(f"FlowSchedule.shift must be a positive number, not {self.shift!r}")
        if not 2 <= self.num_train_timesteps <= 1_000_000:
            raise ConfigError(f"FlowSchedule.num_train_timesteps must be 2 to 1000000, not {self.num_train_timesteps}")

    def sigmas(self, num_steps: int) -> Float32[np.ndarray, "{num_steps}+1"]:
        """The levels of ``num_steps`` steps, strictly descending; the last is 0.

        Raises:
            ConfigError: ``num_steps`` is out of range, or levels coincide in float32 (an extreme shift).
        """
        sigmas = np.append(self._levels(num_steps), 0.0).astype(np.float32)
        if not (np.diff(sigmas) < 0).all():
            raise ConfigError(f"shift {self.shift} is too extreme for {num_steps} steps: noise levels coincide")
        return sigmas

    def timesteps(self, num_steps: int) -> Float32[np.ndarray, "{num_steps}"]:
        """What the transformer is told at each step, in 0..num_train_timesteps.

        Whole numbers (cut, not rounded) on the two UniPC grids, fractions on the others.
        """
        levels = self._levels(num_steps)
        if self.grid not in _WHOLE:
            return levels.astype(np.float32) * np.float32(self.num_train_timesteps)
        return np.trunc(levels * self.num_train_timesteps).astype(np.float32)

    @property
    def noise_scale(self) -> float:
        """What a sample's first noise is multiplied by: rCM's begins below all noise, without data in its place."""
        return float(_RCM[0]) if self.grid == "rcm" else 1.0

    def _levels(self, num_steps: int) -> np.ndarray:
        if not 1 <= num_steps <= self.num_train_timesteps:
            raise ConfigError(f"the number of steps must be from 1 to {self.num_train_timesteps}, not {num_steps}")
        return _LEVELS[self.grid](self.shift, self.num_train_timesteps, num_steps)


class SamplingSteps(NamedTuple):
    """What the steps of a run need to know of its noise levels: a pytree with a leading axis of steps.

    A scan takes it as its ``xs``; a loop takes ``at(i)``, and a function of such a row compiles once for all steps.
    """

    #: 0, 1, …
    number: Int[Array | np.ndarray, "*steps"]
    #: What the transformer is told, 0 to 1000.
    timestep: Float[Array | np.ndarray, "*steps"]
    #: The solver's.
    coefficients: Any

    def at(self, step: Any) -> SamplingSteps:
        """The row of one step, a whole number or a traced one."""
        return jax.tree.map(lambda table: (table if isinstance(step, int) else jnp.asarray(table))[step], self)


def sampling_steps(
    schedule: FlowSchedule, solver: Solver, *, num_steps: int, levels: tuple[float, float] = (0.0, 1.0)
) -> SamplingSteps:
    """The steps of a run, worked out on the host.

    Args:
        levels: only the steps at noise levels from the first to below the second (1: all above) are taken, by a solver
            that begins with the first of them: those of one of two experts.

    Raises:
        ConfigError: the schedule has no such number of steps, none of them is at such levels, or the solver does not
            accept its levels.
    """
    timesteps, (low, high) = schedule.timesteps(num_steps), levels
    inside = np.flatnonzero((timesteps >= 1000 * low) & ((timesteps < 1000 * high) | (high >= 1)))
    if not len(inside):
        raise ConfigError(f"of {num_steps} steps none is at noise levels from {low:g} to {high:g}: take more steps")
    first, end = int(inside[0]), int(inside[-1]) + 1
    coefficients = solver.coefficients(schedule.sigmas(num_steps)[first : end + 1])
    return SamplingSteps(np.arange(end - first, dtype=np.int32), timesteps[first:end], coefficients)


def _shifted(sigma, shift):
    return shift * sigma / (1 + (shift - 1) * sigma)


# Each returns float64 [num_steps], without the final 0. The float32 roundings inside are the programs' own: a timestep
# is cut to a whole number after them.


def _diffusers(shift: float, num_train_timesteps: int, num_steps: int) -> np.ndarray:
    sigmas = _shifted(np.linspace(1, 1 / num_train_timesteps, num_steps + 1)[:-1], shift)
    # At exactly 1 there is no data in the sample, and UniPC's log signal-to-noise ratio would be infinite.
    sigmas[0] -= 1e-6
    return sigmas


def _diffusers_euler(shift: float, num_train_timesteps: int, num_steps: int) -> np.ndarray:
    trained = _shifted(np.array([num_train_timesteps, 1], np.float32) / np.float32(num_train_timesteps), shift)
    highest, lowest = trained.astype(np.float64) * num_train_timesteps
    return _shifted(np.linspace(highest, lowest, num_steps) / num_train_timesteps, shift)


def _official(shift: float, num_train_timesteps: int, num_steps: int) -> np.ndarray:
    highest = float(np.float32(1 - 1 / num_train_timesteps))
    return _shifted(np.linspace(highest, 0, num_steps + 1)[:-1], shift)


def _warped(shift: float, num_train_timesteps: int, num_steps: int) -> np.ndarray:
    return _shifted(np.linspace(1, 0, num_steps + 1)[:-1], shift)


def _listed(*levels: float, fewer: bool = False) -> Callable[[float, int, int], np.ndarray]:
    """
    Args:
        fewer: the first of them may be taken alone.
    """

    def of_training(shift: float, num_train_timesteps: int, num_steps: int) -> np.ndarray:
        if num_steps > len(levels) or (num_steps < len(levels) and not fewer):
            takes = "as many steps or fewer" if fewer else "as many steps"
            raise ConfigError(f"this model was trained at {len(levels)} noise levels: it takes {takes}")
        return np.array(levels[:num_steps])

    return of_training


#: NVlabs/rcm: angles between data and noise; sigma is the noise's share.
_RCM = tuple(math.sin(angle) / (math.sin(angle) + math.cos(angle)) for angle in (math.atan(80), 1.5, 1.4, 1.0))
#: Grids whose programs tell the transformer whole numbers.
_WHOLE = ("diffusers", "official")
_LEVELS: dict[str, Callable[[float, int, int], np.ndarray]] = {
    "diffusers": _diffusers,
    "diffusers-euler": _diffusers_euler,
    "official": _official,
    "warped": _warped,
    "causvid": _listed(1.0, 0.757, 0.522),
    "rcm": _listed(*_RCM, fewer=True),
}

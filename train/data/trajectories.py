"""The teacher's own sampling, cut into turns: many trajectories side by side, each at a step of its own.

A batch holds B trajectories. Round after round each goes one step on, and begins again, with another prompt and other
noise, when it has ended. Row r is ⌊r·S/B⌋ steps ahead of row 0 (S steps in all), so that every batch has every level of
noise; to get there its first trajectory is cut short. Which trajectory a row is at, and at which step of it, follows
from the round's number alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from rehyat_jax.sampling import FlowSchedule, Guidance, SamplingSteps, Solver, sampling_steps


class Points(NamedTuple):
    """Inputs of a forward pass of the teacher."""

    latents: Float[Array, "R T h w z"]
    #: 0 to 1000; a row's, or each frame's own.
    timesteps: Float[Array, "R *frames"]
    text: Float[Array, "R L D"]


class Rollouts(NamedTuple):
    """Trajectories under way."""

    #: The solver's state; every leaf has a leading axis of rows.
    solver: Any
    text: Float[Array, "B L D"]


class HostBatch(NamedTuple):
    """What one round needs from the host."""

    #: Each row's place in `Sampling.table`.
    places: Int[Array, " B"]
    #: Rows that begin again, padded with B, and the numbers and prompts of their new trajectories.
    fresh: Int[Array, " R"]
    numbers: Int[Array, " R"]
    text: Float[Array, "R L D"]


#: Embeddings of the prompts of trajectories with these numbers.
Prompts = Callable[[Int[np.ndarray, " R"]], Float[Array, "R L D"]]


@runtime_checkable
class Trajectories(Protocol):
    """Whole trajectories of a teacher, all rows of which stand at one step: what measurements go along."""

    @property
    def num_steps(self) -> int: ...

    def begin(
        self, key: Key[Array, ""], numbers: Int[Array, " R"], text: Float[Array, "R L D"], *, shape: tuple[int, ...]
    ) -> Any:
        """Before the first step; ``shape`` is their latents' [T, h, w, z]."""

    def points_at(
        self,
        carried: Any,
        place: Int[Array, ""],
        negative: Float[Array, "1 L D"],
        teacher: Any,
        *,
        shape: tuple[int, ...],
    ) -> Points:
        """What goes into the teacher at a step; ``shape`` as in `begin`."""

    def after(self, carried: Any, place: Int[Array, ""], velocity: Float[Array, "R T h w z"]) -> Any:
        """One step on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the teacher samples. With several schedules a row's trajectories take them in turn."""

    schedules: tuple[FlowSchedule, ...]
    solver: Solver
    num_steps: int
    guidance: Guidance

    @property
    def table(self) -> SamplingSteps:
        """The steps of every schedule, one schedule after the other.

        Raises:
            ConfigError: a schedule has no such number of steps, or the solver does not accept its levels.
        """
        tables = [sampling_steps(schedule, self.solver, num_steps=self.num_steps) for schedule in self.schedules]
        return jax.tree.map(lambda *parts: jnp.asarray(np.concatenate(parts), jnp.float32), *tables)

    def host_batch(self, index: int, batch: int, prompts: Prompts) -> HostBatch:
        """What round ``index`` of a batch needs; before round 0 stands `begin`."""
        steps = self.num_steps
        rows = np.arange(batch)
        ahead = rows * steps // batch
        begun = (index + ahead) // steps  # trajectories that each row began after its first
        step = np.where(begun == 0, index, (index + ahead) % steps)
        places = (rows + begun) % len(self.schedules) * steps + step
        fresh = rows[(step == 0) & (begun > 0)]
        padding = np.full(-(-batch // steps) - len(fresh), batch)
        numbers = np.append(begun[fresh] * batch + fresh, np.zeros_like(padding))
        return HostBatch(
            jnp.asarray(places, jnp.int32),
            jnp.asarray(np.append(fresh, padding), jnp.int32),
            jnp.asarray(numbers, jnp.int32),
            prompts(numbers),
        )

    def begin(
        self, key: Key[Array, ""], numbers: Int[Array, " R"], text: Float[Array, "R L D"], *, shape: tuple[int, ...]
    ) -> Rollouts:
        """The trajectories of these numbers before their first step; ``shape`` is their latents' [T, h, w, z]."""
        noise = jax.vmap(lambda n: jax.random.normal(jax.random.fold_in(key, n), shape))(numbers)
        return Rollouts(jax.vmap(self.solver.init)(noise), text)

    def restart(self, rollouts: Rollouts, host_batch: HostBatch, key: Key[Array, ""]) -> Rollouts:
        """The round's fresh rows at their beginning, the others as they are."""
        fresh = self.begin(key, host_batch.numbers, host_batch.text, shape=rollouts.solver.latents.shape[1:])
        return jax.tree.map(lambda old, new: old.at[host_batch.fresh].set(new, mode="drop"), rollouts, fresh)

    def points(self, rollouts: Rollouts, steps: SamplingSteps, negative: Float[Array, "1 L D"]) -> Points:
        """Where the trajectories stand: of the prompt, and of the negative prompt where that counts."""
        latents, timesteps, text = rollouts.solver.latents, jnp.asarray(steps.timestep), rollouts.text
        if self.guidance.needs_negative:
            latents, timesteps = jnp.concatenate([latents, latents]), jnp.concatenate([timesteps, timesteps])
            text = jnp.concatenate([text, jnp.broadcast_to(negative, text.shape)])
        return Points(latents, timesteps, text)

    def advance(self, rollouts: Rollouts, steps: SamplingSteps, velocity: Float[Array, "R T h w z"]) -> Rollouts:
        """One step on, from the velocities at `points`."""
        parts = jnp.split(velocity.astype(rollouts.solver.latents.dtype), self.guidance.evaluations)

        def step(state: Any, velocity: Array, coefficients: Any) -> Any:
            return self.solver.step(state, velocity, coefficients=coefficients)

        solver = jax.vmap(step)(rollouts.solver, self.guidance.combine(parts), steps.coefficients)
        return Rollouts(solver, rollouts.text)

    def points_at(
        self,
        carried: Rollouts,
        place: Int[Array, ""],
        negative: Float[Array, "1 L D"],
        teacher: Any,
        *,
        shape: tuple[int, ...],
    ) -> Points:
        return self.points(carried, self._all_at(carried, place), negative)

    def after(self, carried: Rollouts, place: Int[Array, ""], velocity: Float[Array, "R T h w z"]) -> Rollouts:
        return self.advance(carried, self._all_at(carried, place), velocity)

    def _all_at(self, rollouts: Rollouts, place: Int[Array, ""]) -> SamplingSteps:
        return self.table.at(jnp.full(len(rollouts.text), place))

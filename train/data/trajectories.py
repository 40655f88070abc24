"""The teacher's own sampling, cut into turns: many trajectories side by side, each at a step of its own.

A batch holds B trajectories. Round after round each goes one step on, and begins again, with another prompt and other
noise, when it has ended. Row r is ⌊r·S/B⌋ steps ahead of row 0 (S steps in all), so that every batch has every level of
noise; to get there its first trajectory is cut short. Which trajectory a row is at, and at which step of it, follows
from the round's number alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from rehyat_jax.errors import ConfigError
from rehyat_jax.sampling import FlowSchedule, Guidance, SamplingSteps, Solver, sampling_steps
from rehyat_jax.sampling.condition import Condition


class Points(NamedTuple):
    """Inputs of a forward pass of the teacher."""

    #: With whatever channels the teacher is shown beside them.
    latents: Float[Array, "R T h w d"]
    #: 0 to 1000; a row's, or each frame's own.
    timesteps: Float[Array, "R *frames"]
    text: Float[Array, "R L D"]
    #: Features of an image, for a teacher that attends to them.
    image: Float[Array, "R I E"] | None = None

    def under(self, condition: Condition | None) -> Points:
        """The same as a model is shown them under a condition, a row's each."""
        if condition is None:
            return self
        latents, timesteps = condition.seen(self.latents, self.timesteps)
        return Points(latents, timesteps, self.text, condition.image)


class Given(NamedTuple):
    """What trajectories have of a clip each beside its prompt; a row each."""

    #: How a model that takes images is shown the clip's.
    condition: Condition | None = None
    #: The clip's normalised latents, for trajectories that begin with them under noise (of the lower expert).
    clip: Float[Array, "R T h w z"] | None = None


_NOTHING = Given()


class Rollouts(NamedTuple):
    """Trajectories under way."""

    #: The solver's state; every leaf has a leading axis of rows.
    solver: Any
    text: Float[Array, "B L D"]
    condition: Condition | None = None


class HostBatch(NamedTuple):
    """What one round needs from the host."""

    #: Each row's place in `Sampling.table`.
    places: Int[Array, " B"]
    #: Rows that begin again, padded with B, and the numbers and prompts of their new trajectories.
    fresh: Int[Array, " R"]
    numbers: Int[Array, " R"]
    text: Float[Array, "R L D"]
    given: Given = _NOTHING


#: Embeddings of the prompts of trajectories with these numbers.
Prompts = Callable[[Int[np.ndarray, " R"]], Float[Array, "R L D"]]
#: What they have of their clips.
Clips = Callable[[Int[np.ndarray, " R"]], Given]


@runtime_checkable
class Trajectories(Protocol):
    """Whole trajectories of a teacher, all rows of which stand at one step: what measurements go along."""

    @property
    def num_steps(self) -> int: ...

    def begin(
        self,
        key: Key[Array, ""],
        numbers: Int[Array, " R"],
        text: Float[Array, "R L D"],
        *,
        shape: tuple[int, ...],
        given: Given = _NOTHING,
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
    #: Of a whole video's.
    grid_steps: int
    guidance: Guidance
    #: The noise levels whose steps the trajectories take: all, or an expert's. See `sampling_steps`.
    levels: tuple[float, float] = (0.0, 1.0)

    @functools.cached_property
    def _tables(self) -> list[SamplingSteps]:
        how: Any = {"num_steps": self.grid_steps, "levels": self.levels}
        tables = [sampling_steps(schedule, self.solver, **how) for schedule in self.schedules]
        if len(counts := {len(table.timestep) for table in tables}) > 1:
            raise ConfigError(
                f"of the shifts' steps different numbers are at the expert's noise levels ({sorted(counts)}): give one"
            )
        return tables

    @property
    def num_steps(self) -> int:
        """Of a trajectory."""
        return len(self._tables[0].timestep)

    @property
    def table(self) -> SamplingSteps:
        """The steps of every schedule, one schedule after the other.

        Raises:
            ConfigError: a schedule has no such number of steps, or the solver does not accept its levels; the schedules
                have different numbers of steps at these levels.
        """
        return jax.tree.map(lambda *parts: jnp.asarray(np.concatenate(parts), jnp.float32), *self._tables)

    def host_batch(self, index: int, batch: int, prompts: Prompts, clips: Clips | None = None) -> HostBatch:
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
            _NOTHING if clips is None else clips(numbers),
        )

    def begin(
        self,
        key: Key[Array, ""],
        numbers: Int[Array, " R"],
        text: Float[Array, "R L D"],
        *,
        shape: tuple[int, ...],
        given: Given = _NOTHING,
    ) -> Rollouts:
        """The trajectories of these numbers before their first step; ``shape`` is their latents' [T, h, w, z]."""
        latents = jax.vmap(lambda n: jax.random.normal(jax.random.fold_in(key, n), shape))(numbers)
        if given.clip is not None:
            level = float(self._tables[0].timestep[0]) / 1000
            latents = (1 - level) * given.clip + level * latents
        return Rollouts(jax.vmap(self.solver.init)(latents), text, given.condition)

    def restart(self, rollouts: Rollouts, host_batch: HostBatch, key: Key[Array, ""]) -> Rollouts:
        """The round's fresh rows at their beginning, the others as they are."""
        shape = rollouts.solver.latents.shape[1:]
        fresh = self.begin(key, host_batch.numbers, host_batch.text, shape=shape, given=host_batch.given)
        return jax.tree.map(lambda old, new: old.at[host_batch.fresh].set(new, mode="drop"), rollouts, fresh)

    def points(self, rollouts: Rollouts, steps: SamplingSteps, negative: Float[Array, "1 L D"]) -> Points:
        """Where the trajectories stand: of the prompt, and of the negative prompt where that counts."""
        text = rollouts.text
        points = Points(rollouts.solver.latents, jnp.asarray(steps.timestep), text).under(rollouts.condition)
        if not self.guidance.needs_negative:
            return points
        without = points._replace(text=jnp.broadcast_to(negative, text.shape))
        return jax.tree.map(lambda *rows: jnp.concatenate(rows), points, without)

    def advance(self, rollouts: Rollouts, steps: SamplingSteps, velocity: Float[Array, "R T h w z"]) -> Rollouts:
        """One step on, from the velocities at `points`."""
        parts = jnp.split(velocity.astype(rollouts.solver.latents.dtype), self.guidance.evaluations)

        def step(state: Any, velocity: Array, coefficients: Any) -> Any:
            return self.solver.step(state, velocity, coefficients=coefficients)

        solver = jax.vmap(step)(rollouts.solver, self.guidance.combine(parts), steps.coefficients)
        return Rollouts(solver, rollouts.text, rollouts.condition)

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

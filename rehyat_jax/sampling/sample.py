"""From noise to latents: all steps as one scan, or one step at a time."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rehyat_jax.sampling.guidance import Velocity
from rehyat_jax.sampling.schedule import FlowSchedule
from rehyat_jax.sampling.solvers import Solver


class Steps(NamedTuple):
    """What the steps of a run need to know of its noise levels: a pytree with a leading axis of steps.

    A scan takes it as its ``xs``; a loop takes ``at(i)``, and a function of such a row compiles once for all steps.
    """

    timestep: Float[Array | np.ndarray, "*steps"]
    coefficients: Any

    def at(self, step: Any) -> "Steps":
        """The row of one step, a whole number or a traced one."""
        return jax.tree.map(lambda table: jnp.asarray(table)[step], self)


def plan_steps(schedule: FlowSchedule, solver: Solver, *, num_steps: int) -> Steps:
    """The steps of a run, worked out on the host.

    Raises:
        ConfigError: the schedule has no such number of steps, or the solver does not accept its levels.
    """
    return Steps(schedule.timesteps(num_steps), solver.coefficients(schedule.sigmas(num_steps)))


def sampling_step(velocity: Velocity, state: Any, *, step: Steps, solver: Solver) -> Any:
    """One denoising step: from the solver's state to its next one.

    A caller that shows progress jits a function of (parameters, state, step) around this one and calls it in a loop:

        steps = plan_steps(schedule, solver, num_steps=num_steps)
        state = solver.init(noise)
        for i in range(num_steps):
            state = one_step(parameters, state, steps.at(i))
        latents = state.latents

    A sweep that keeps a state of the network at each step scans over (steps, network states) and calls this with a
    velocity that closes over the network's state; or it calls ``solver.step`` itself.
    """
    latents = state.latents
    t = jnp.broadcast_to(jnp.asarray(step.timestep, jnp.float32), latents.shape[:1])
    return solver.step(state, velocity(latents, t), coefficients=step.coefficients)


def sample(
    velocity: Velocity, noise: Float[Array, "B *shape"], *, schedule: FlowSchedule, solver: Solver, num_steps: int
) -> Float[Array, "B *shape"]:
    """Latents from standard normal noise: a scan over the steps, to be called inside jit.

    There is no callback here: a program with one is not kept in JAX's compilation cache. For progress, see
    ``sampling_step``.

    Raises:
        ConfigError: as ``plan_steps``.
    """

    def body(state: Any, step: Steps) -> tuple[Any, None]:
        return sampling_step(velocity, state, step=step, solver=solver), None

    state, _ = jax.lax.scan(body, solver.init(noise), plan_steps(schedule, solver, num_steps=num_steps))
    return state.latents

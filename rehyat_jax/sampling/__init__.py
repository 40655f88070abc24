"""Sampling by flow matching: noise levels, solvers, guidance, noise, the loops, and a session that has all of it ready.

Models are arguments: nothing here imports one.
"""

from rehyat_jax.sampling.guidance import Guidance, Model, Velocity, guided_velocity
from rehyat_jax.sampling.rollout import sampling_step
from rehyat_jax.sampling.schedule import FlowSchedule, SamplingSteps, sampling_steps
from rehyat_jax.sampling.scheduler_config import scheduler_from_config, scheduler_to_config
from rehyat_jax.sampling.solvers import Euler, Renoise, Solver, UniPC

__all__ = [
    "Euler",
    "FlowSchedule",
    "Guidance",
    "Model",
    "Renoise",
    "SamplingSteps",
    "Solver",
    "UniPC",
    "Velocity",
    "guided_velocity",
    "sampling_step",
    "sampling_steps",
    "scheduler_from_config",
    "scheduler_to_config",
]

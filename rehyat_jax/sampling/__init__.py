"""Sampling by flow matching: schedules, solvers, guidance, the loop."""

from rehyat_jax.sampling.guidance import Guidance, Model, Velocity, guided_velocity
from rehyat_jax.sampling.sample import Steps, plan_steps, sample, sampling_step
from rehyat_jax.sampling.schedule import FlowSchedule
from rehyat_jax.sampling.scheduler_config import scheduler_from_config, scheduler_to_config
from rehyat_jax.sampling.solvers import Euler, Solver, UniPC

__all__ = [
    "Euler",
    "FlowSchedule",
    "Guidance",
    "Model",
    "Solver",
    "Steps",
    "UniPC",
    "Velocity",
    "guided_velocity",
    "plan_steps",
    "sample",
    "sampling_step",
    "scheduler_from_config",
    "scheduler_to_config",
]

"""The gradient of a batch, which may go through in parts: less memory, the same sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from rehyat_jax.runtime.mesh import mesh_in_force
from train.parallel.sharding import parameter_specs


class Batch(NamedTuple):
    """Clips of a step, each at a noise level of its own, or its latent frames at theirs."""

    noisy: Float[Array, "B T h w z"]
    #: 1000 times the noise level.
    timesteps: Float[Array, "B *T"]
    text: PyTree
    #: What is to be learned: noise − video.
    velocity: Float[Array, "B T h w z"]
    #: What each latent frame counts in the loss, 0 or 1; none: all the same.
    weights: Float[Array, "B T"] | None = None


#: From parameters that learn, others that do not, and a batch: what is minimised, and values to log.
Loss = Callable[[PyTree, PyTree, Batch], tuple[Array, dict[str, Array]]]


def gradients_of(
    loss: Loss, params: PyTree, frozen: PyTree, batch: Batch, *, parts: int
) -> tuple[PyTree, dict[str, Array]]:
    """Of the mean over a batch that goes through in so many parts, summed in float32; and the means to log.

    Every part has clips of all levels of noise and, on a mesh, as many on each device.
    """
    gradient = jax.grad(loss, has_aux=True)
    if parts == 1:
        gradients, metrics = gradient(params, frozen, batch)
        return _as_parameters(gradients), metrics

    def add(total: PyTree, part: Batch) -> tuple[PyTree, dict[str, Array]]:
        gradients, metrics = gradient(params, frozen, part)
        total = jax.tree.map(lambda t, g: t + g.astype(jnp.float32) / parts, total, gradients)
        return _as_parameters(total), metrics

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    total, metrics = jax.lax.scan(add, zeros, cut(batch, parts))
    return total, jax.tree.map(lambda m: jnp.mean(m, axis=0), metrics)


def _as_parameters(gradients: PyTree) -> PyTree:
    """On a mesh in force, cut as the parameters are: what devices sum goes to the one that needs it alone."""
    if mesh_in_force() is None:
        return gradients
    return jax.tree.map(jax.lax.with_sharding_constraint, gradients, parameter_specs(gradients))


def cut(batch: Batch, parts: int) -> Batch:
    """Part i has rows i, i + parts, …: neighbours, which a mesh keeps on one device, go to different parts."""
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)

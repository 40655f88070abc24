"""Means and their gradients over a batch, which may go through in parts: less memory, the same gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from rehyat_jax.runtime.mesh import mesh_in_force
from rehyat_jax.runtime.sharding import parameter_specs


class Mean(NamedTuple):
    """A mean as numerator and denominator: those of a batch's parts are summed, each by itself, before the division.

    The denominator is known from the batch alone: no gradient goes through it. Where it is 0, so is the mean.
    """

    numerator: Float[Array, ""]
    denominator: Float[Array, ""]
    #: By which it enters what is minimised; 0: it is logged and no more.
    weight: float = 1.0

    @classmethod
    def of(cls, values: Float[Array, "*shape"], counts: Array | None = None, *, weight: float = 1.0) -> Mean:
        """Of values that count 1 each, or so much (of a shape that broadcasts to theirs)."""
        if counts is None:
            return cls(jnp.sum(values), jnp.full((), values.size, values.dtype), weight)
        counts = jnp.broadcast_to(counts, values.shape)
        return cls(jnp.sum(values * counts), jnp.sum(counts), weight)

    @property
    def value(self) -> Float[Array, ""]:
        some, one = self.denominator != 0, jnp.ones_like(self.denominator)
        return jnp.where(some, self.numerator / jnp.where(some, self.denominator, one), jnp.zeros_like(self.numerator))


def gradients_of(
    loss: Callable[[PyTree, Any], Mapping[str, Mean]], params: PyTree, batch: Any, *, parts: int
) -> tuple[PyTree, dict[str, Array]]:
    """The gradient of a loss, the weighted sum of its means over the whole batch; and the means.

    Args:
        loss: of the parameters and a batch or a part of it.
        parts: that the batch goes through in, one after the other; gradients are summed in float32 (or wider).
            Every part has clips of all levels of noise and, on a mesh, as many on each device.
    """

    def objective(params: PyTree, part: Any, whole: Mapping[str, Array] | None) -> tuple[Array, dict[str, Array]]:
        means = dict(loss(params, part))
        for name, mean in means.items():
            denominator = mean.denominator if whole is None else whole[name]
            means[name] = mean._replace(denominator=jax.lax.stop_gradient(denominator))
        values = {name: mean.value for name, mean in means.items()}
        minimised = [means[name].weight * value for name, value in values.items() if means[name].weight]
        return sum(minimised[1:], minimised[0]), values

    gradient = jax.grad(objective, has_aux=True)
    if parts == 1:
        gradients, values = gradient(params, batch, None)
        return _as_parameters(gradients), values
    pieces = cut(batch, parts)
    # The network's own output has no use here: the compiler leaves it out.
    each = jax.lax.map(lambda part: {name: mean.denominator for name, mean in loss(params, part).items()}, pieces)
    whole = {name: jnp.sum(denominators) for name, denominators in each.items()}

    def add(total: PyTree, part: Any) -> tuple[PyTree, dict[str, Array]]:
        gradients, values = gradient(params, part, whole)
        return _as_parameters(jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, gradients)), values

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, np.promote_types(p.dtype, jnp.float32)), params)
    total, values = jax.lax.scan(add, zeros, pieces)
    # A part's values are its share of the whole batch's.
    return total, {name: jnp.sum(value) for name, value in values.items()}


def means_of(loss: Callable[[Any], Mapping[str, Mean]], batch: Any, *, parts: int) -> dict[str, Array]:
    """The means alone, of a batch that goes through in so many parts."""
    sums = jax.lax.map(lambda part: {k: (m.numerator, m.denominator) for k, m in loss(part).items()}, cut(batch, parts))
    return {k: Mean(jnp.sum(numerators), jnp.sum(denominators)).value for k, (numerators, denominators) in sums.items()}


def _as_parameters(gradients: PyTree) -> PyTree:
    """On a mesh in force, sharded as the parameters are: what devices sum goes to the one that needs it alone."""
    if (mesh := mesh_in_force()) is None:
        return gradients
    return jax.tree.map(jax.lax.with_sharding_constraint, gradients, parameter_specs(gradients, mesh=mesh))


def cut(batch: PyTree, parts: int) -> PyTree:
    """Part i has rows i, i + parts, …: neighbours, which a mesh keeps on one device, go to different parts."""
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)

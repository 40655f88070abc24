"""How parameters, optimiser and averages are sharded over a mesh.

A parameter's dimensions are said where it is made (`rehyat_jax.runtime.variables.Axes`), and
`rehyat_jax.runtime.mesh.ALONG` names the mesh axes of a dimension. The optimiser's moments and the moving average are
sharded as their parameters are: they are variables with the same metadata.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from rehyat_jax.runtime.mesh import spec
from rehyat_jax.runtime.variables import axes_of, map_variables


def parameter_spec(variable: Any, shape: tuple[int, ...]) -> PartitionSpec:
    """Of an array of a model's parameters, by its variable's `Axes`.

    What has none (norms, biases, modulation: a thousandth of a model) is replicated.
    """
    if (axes := axes_of(variable)) is None or not any(axes.dimensions) or len(shape) < len(axes.dimensions):
        return PartitionSpec()
    return spec(*[None] * (len(shape) - len(axes.dimensions)), *axes.dimensions)


def parameter_specs(tree: PyTree) -> PyTree:
    """`parameter_spec` of each array of a model's parameters, or of a train state with such in it."""
    return map_variables(lambda variable, x: parameter_spec(variable, x.shape), tree)


def on_mesh(mesh: Mesh, specs: PyTree) -> PyTree:
    """Shardings, as ``jax.jit`` and ``jax.device_put`` take them."""
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, PartitionSpec))

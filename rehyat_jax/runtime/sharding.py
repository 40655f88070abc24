"""How parameters, optimiser and averages are sharded over a mesh.

A parameter's dimensions are said where it is made (`rehyat_jax.runtime.variables.Axes`), and
`rehyat_jax.runtime.mesh.ALONG` names the mesh axes of a dimension. The optimiser's moments and the moving average are
sharded as their parameters are: they are variables with the same metadata.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from rehyat_jax.runtime.mesh import spec, spec_of
from rehyat_jax.runtime.variables import axes_of, map_variables


def parameter_spec(variable: Any, shape: tuple[int, ...], *, mesh: Mesh | AbstractMesh | None = None) -> PartitionSpec:
    """Of an array of a model's parameters, by its variable's `Axes`.

    What has none (norms, biases, modulation: a thousandth of a model) is replicated.

    Args:
        mesh: sharded by those of its axes alone that divide the array (`rehyat_jax.runtime.mesh.spec_of`); None: by
            all that the array's dimensions have.
    """
    if (axes := axes_of(variable)) is None or not any(axes.dimensions) or len(shape) < len(axes.dimensions):
        return PartitionSpec()
    dimensions = *[None] * (len(shape) - len(axes.dimensions)), *axes.dimensions
    return spec(*dimensions) if mesh is None else spec_of(shape, *dimensions, mesh=mesh)


def parameter_specs(tree: PyTree, *, mesh: Mesh | AbstractMesh | None = None) -> PyTree:
    """`parameter_spec` of each array of a model's parameters, or of a train state with such in it."""
    return map_variables(lambda variable, x: parameter_spec(variable, x.shape, mesh=mesh), tree)


def on_mesh(mesh: Mesh, specs: PyTree) -> PyTree:
    """Shardings, as ``jax.jit`` and ``jax.device_put`` take them."""
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, PartitionSpec))

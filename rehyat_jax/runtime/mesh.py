"""The axes of a device mesh, and which dimension of an array goes along which.

A mesh is put in force by ``jax.set_mesh``; the models then run on all of it. Nothing here is needed on one device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, PyTree

from rehyat_jax.errors import RehyatError
from rehyat_jax.runtime.mesh_config import AXES

#: A dimension of a model's arrays.
Dimension = Literal["batch", "time", "heads", "stream heads", "hidden", "width", "features", "channels"]

#: The mesh axes that each dimension is sharded along. ``width`` shards parameters by two axes and activations by none:
#: every device needs the weights of a layer whole, but only while it is at that layer.
ALONG: dict[Dimension, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "time": ("context",),
    "heads": ("tensor",),
    # Of a stream's states and of attention within a chunk, where time is too short to be sharded by chunks.
    "stream heads": ("tensor", "context"),
    "hidden": ("tensor",),
    "width": ("fsdp", "context"),
    "features": ("fsdp",),
    "channels": ("context",),
}


def spec(*dimensions: Dimension | None) -> PartitionSpec:
    """How an array of these dimensions is sharded; None: a dimension that is replicated."""
    return PartitionSpec(*(None if d is None else ALONG[d] for d in dimensions))


def mesh_in_force() -> AbstractMesh | None:
    """The mesh of ``jax.set_mesh`` where it has `AXES`, and None inside a ``shard_map`` over it or without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if set(AXES) <= set(mesh.axis_names) and not mesh.manual_axes else None


def whole_on_each_device() -> bool:
    """Whether what is traced now is one device's own part: XLA cannot divide the kernels among devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() == 1 if mesh.empty else mesh.are_all_axes_manual or mesh.size == 1


def devices_along(dimension: Dimension) -> int:
    """Into how many pieces the mesh in force shards a dimension."""
    mesh = mesh_in_force()
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ALONG[dimension])


def spec_of(
    shape: Sequence[int], *dimensions: Dimension | None, mesh: Mesh | AbstractMesh | None = None
) -> PartitionSpec:
    """As `spec`, of an array of this shape on a mesh (that in force by default): along an axis that does not divide a
    dimension, after those before it, that is not sharded. One video over many devices is no batch to be sharded, and
    every device has it."""
    if (mesh := mesh or mesh_in_force()) is None:
        return PartitionSpec()
    axes_of: list[tuple[str, ...] | None] = []
    for size, dimension in zip(shape, dimensions, strict=True):
        pieces, axes = 1, []
        for axis in () if dimension is None else ALONG[dimension]:
            if size % (pieces * mesh.shape[axis]) == 0:
                pieces *= mesh.shape[axis]
                axes.append(axis)
        axes_of.append(tuple(axes) or None)
    return PartitionSpec(*axes_of)


def constrain_sharding(x: Array, *dimensions: Dimension | None) -> Array:
    """The same array, sharded along these dimensions over the mesh in force, as `spec_of` has it."""
    return x if mesh_in_force() is None else jax.lax.with_sharding_constraint(x, spec_of(x.shape, *dimensions))


def replicated(tree: PyTree) -> PyTree:
    """The same arrays, on every device of the mesh in force."""
    return jax.tree.map(lambda x: constrain_sharding(x, *[None] * x.ndim), tree)


def frames_on_devices(frames: int, chunk: int) -> int:
    """Frames of a video that is padded at its end so that every device along time has whole chunks, and as many.

    Raises:
        RehyatError: time is sharded, and the video itself is not whole chunks: its last chunk would see padding.
    """
    devices = devices_along("time")
    if devices == 1:
        return frames
    if frames % chunk:
        raise RehyatError(
            f"{frames} latent frames are not whole chunks of {chunk}, which a mesh that cuts time (context {devices}) "
            "needs"
        )
    return -(-frames // (devices * chunk)) * devices * chunk

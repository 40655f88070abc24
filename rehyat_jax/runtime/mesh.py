"""The axes of a device mesh, and which dimension of an array goes along which.

A mesh is put in force by ``jax.set_mesh``; the models then run on all of it. Nothing here is needed on one device.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array

from rehyat_jax.errors import RehyatError

#: The names of a mesh's axes, slowest links first. All four are there, some of size 1.
AXES = ("data", "fsdp", "context", "tensor")

#: A dimension of a model's arrays.
Dimension = Literal["batch", "time", "heads", "hidden", "width", "features", "channels"]

#: The mesh axes that each dimension is cut along. Of parameters, ``width`` is cut by two axes although activations are
#: cut by neither there: every device needs the weights of a layer whole, but only while it is at that layer.
ALONG: dict[Dimension, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "time": ("context",),
    "heads": ("tensor",),
    "hidden": ("tensor",),
    "width": ("fsdp", "context"),
    "features": ("fsdp",),
    "channels": ("context",),
}


def spec(*dimensions: Dimension | None) -> PartitionSpec:
    """How an array of these dimensions is cut; None: a dimension that is whole on every device."""
    return PartitionSpec(*(None if d is None else ALONG[d] for d in dimensions))


def mesh_in_force() -> AbstractMesh | None:
    """The mesh of ``jax.set_mesh`` where it has `AXES`, and None inside a ``shard_map`` over it or without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if set(AXES) <= set(mesh.axis_names) and not mesh.manual_axes else None


def devices_along(dimension: Dimension) -> int:
    """Into how many pieces the mesh in force cuts a dimension."""
    mesh = mesh_in_force()
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ALONG[dimension])


def laid_out(x: Array, *dimensions: Dimension | None) -> Array:
    """The same array, cut along these dimensions over the mesh in force."""
    return x if mesh_in_force() is None else jax.lax.with_sharding_constraint(x, spec(*dimensions))


def frames_on_devices(frames: int, chunk: int) -> int:
    """Frames of a video that is padded at its end so that every device along time has whole chunks, and as many.

    Raises:
        RehyatError: time is cut, and the video itself is no whole number of chunks: its last chunk would see padding.
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

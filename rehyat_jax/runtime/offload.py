"""Weights that stay in the host's memory and come to the device layer by layer, as the loop over layers needs them."""

from __future__ import annotations

import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import SingleDeviceSharding

from rehyat_jax.errors import ConfigError

#: What JAX calls the host's memory that a device reads by itself.
_HOST = "pinned_host"


def host_memory() -> SingleDeviceSharding | None:
    """The host's memory as the first device reads it; None where that is the device's own, or none it can read."""
    device = jax.local_devices()[0]
    if device.platform == "cpu" or _HOST not in {memory.kind for memory in device.addressable_memories()}:
        return None
    return SingleDeviceSharding(device, memory_kind=_HOST)


def keep_on_host(module: Any) -> None:
    """Make of a module of shapes alone, of layers stacked, one whose matrices are put into the host's memory when it is
    filled. Vectors stay on the device: together they are small, each would be a transfer of its own, and a TPU cannot
    cut one in bfloat16 out of many in the host's memory.

    Raises:
        ConfigError: the device cannot read the host's memory.
    """
    device = jax.local_devices()[0]
    if _HOST not in {memory.kind for memory in device.addressable_memories()}:
        raise ConfigError(f"a {device.platform} device cannot fetch layers from the host's memory: leave offload out")
    place = SingleDeviceSharding(device, memory_kind=_HOST)
    state = nnx.state(module)

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place if len(x.shape) > 2 else None)

    nnx.update(module, jax.tree.map(placed, state))


def fetched(layer: Any) -> Any:
    """A layer's parameters on the device; inside jit."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), layer)


def bytes_on_device(weights: Any) -> int:
    """Of arrays, what lies in a device's own memory: of those that are sharded, one device's part."""
    mine = (x for x in jax.tree.leaves(weights) if x.sharding.memory_kind != _HOST)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in mine)


def bytes_on_host(weights: Any) -> int:
    """Of arrays, those that lie in the host's memory."""
    return sum(x.nbytes for x in jax.tree.leaves(weights) if x.sharding.memory_kind == _HOST)

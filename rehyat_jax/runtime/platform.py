"""What programs are compiled for: the platform, its kind of device, and the precision of its products.

This is the one place that asks. Kernels and layers that differ by platform ask it while they are traced.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def platform() -> str:
    """``"cpu"``, ``"gpu"`` or ``"tpu"``: where a program that is traced now will run.

    That is the platform of the mesh in force, whose devices need not be this machine's (a topology that is compiled
    for ahead of time), else of JAX's default device.
    """
    return _device().platform


def device_kind() -> str:
    """As ``jax.Device.device_kind``, of a device of `platform`: ``"NVIDIA H200"``, ``"TPU v5 lite"``, …"""
    return _device().device_kind


def precision(dtype: DTypeLike) -> AbstractContextManager[None]:
    """Float32 means float32: accelerators would otherwise multiply it in TF32 or bfloat16."""
    return jax.default_matmul_precision("highest") if jnp.dtype(dtype) == jnp.float32 else nullcontext()


def _device() -> Any:
    """Something with a ``platform`` and a ``device_kind``."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0] if described is None else described

"""Hybrid attention on GPU, by Pallas and XLA."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels.gpu.hybrid import hybrid
from pallas_kernels.gpu.triton import TritonKernels
from pallas_kernels.gpu.windows import Kernels

__all__ = ["Kernels", "TritonKernels", "hybrid", "kernels"]


def kernels(device_kind: str, q: Float[Array, "B N H D"], *, chunk: int) -> Kernels:
    """The fastest that can do it, by ``jax.Device.device_kind``."""
    return TritonKernels()

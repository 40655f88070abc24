"""Hybrid attention on GPU, by Pallas, XLA and cuDNN."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from pallas_kernels.gpu.cudnn import CudnnBackward
from pallas_kernels.gpu.hopper import HopperKernels
from pallas_kernels.gpu.hybrid import hybrid
from pallas_kernels.gpu.triton import TritonKernels
from pallas_kernels.gpu.windows import Kernels

__all__ = ["CudnnBackward", "HopperKernels", "Kernels", "TritonKernels", "hybrid", "kernels"]


def kernels(
    device_kind: str, q: Float[Array | jax.ShapeDtypeStruct, "B N H D"], *, chunk: int, overlap: int
) -> Kernels:
    """Those for ``jax.Device.device_kind``, where they can do it, else Triton's."""
    hopper = HopperKernels()
    is_hopper = any(name in device_kind for name in ("H100", "H200", "GH200", "H800", "H20"))
    return hopper if is_hopper and not hopper.lacking(q, chunk=chunk, overlap=overlap) else TritonKernels()

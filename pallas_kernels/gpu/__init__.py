"""Hybrid attention on GPU, by Pallas, XLA and cuDNN."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from pallas_kernels.gpu.cudnn import CudnnBackward
from pallas_kernels.gpu.features import FeatureKernels, Layers, feature_map
from pallas_kernels.gpu.hopper import HopperKernels
from pallas_kernels.gpu.hybrid import hybrid
from pallas_kernels.gpu.triton import TritonKernels
from pallas_kernels.gpu.windows import Kernels

__all__ = [
    "CudnnBackward", "FeatureKernels", "HopperKernels", "Kernels", "Layers", "TritonKernels", "feature_kernels",
    "feature_map", "hybrid", "kernels",
]  # fmt: skip


def kernels(
    device_kind: str, q: Float[Array | jax.ShapeDtypeStruct, "B N H D"], *, chunk: int, overlap: int
) -> Kernels:
    """Those for ``jax.Device.device_kind``, where they can do it, else Triton's."""
    hopper = HopperKernels()
    fits = _is_hopper(device_kind) and not hopper.lacking(q, chunk=chunk, overlap=overlap)
    return hopper if fits else TritonKernels()


def feature_kernels(
    device_kind: str, x: Float[Array | jax.ShapeDtypeStruct, "B N H D"], *, degree: int
) -> FeatureKernels | None:
    """Those for ``jax.Device.device_kind``, where their blocks fit its memory and they can do it."""
    return FeatureKernels() if _is_hopper(device_kind) and not FeatureKernels().lacking(x, degree) else None


def _is_hopper(device_kind: str) -> bool:
    return any(name in device_kind for name in ("H100", "H200", "GH200", "H800", "H20"))

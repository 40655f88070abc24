"""Hybrid attention on GPU, by Pallas, XLA and cuDNN."""

from __future__ import annotations

import functools
import pathlib

import jax
from jaxtyping import Array, Float

from pallas_kernels.devices import is_hopper
from pallas_kernels.gpu.cudnn import CudnnBackward
from pallas_kernels.gpu.eight_bits import Int8Product
from pallas_kernels.gpu.features import FeatureKernels, Layers, feature_map
from pallas_kernels.gpu.hopper import HopperKernels
from pallas_kernels.gpu.hybrid import hybrid
from pallas_kernels.gpu.triton import TritonKernels
from pallas_kernels.gpu.windows import Kernels
from pallas_kernels.tuning import Table

__all__ = [
    "TABLE",
    "CudnnBackward",
    "FeatureKernels",
    "HopperKernels",
    "Int8Product",
    "Kernels",
    "Layers",
    "TritonKernels",
    "feature_kernels",
    "feature_map",
    "hybrid",
    "kernels",
]

TABLE = Table(
    pathlib.Path(__file__).with_name("tuning.json"),
    {HopperKernels: ["head_dim"], FeatureKernels: ["head_dim", "features"], TritonKernels: ["head_dim"]},
)


def kernels(
    device_kind: str, q: Float[Array | jax.ShapeDtypeStruct, "B N H D"], *, chunk: int, overlap: int
) -> Kernels:
    """Those for ``jax.Device.device_kind``, where they can do it with the table's blocks or the default ones, else
    Triton's."""
    tuned = functools.partial(TABLE.blocks, device_kind=device_kind, dtype=q.dtype, head_dim=q.shape[3])
    triton = TritonKernels(**tuned(TritonKernels))
    for blocks in (tuned(HopperKernels), {}) if is_hopper(device_kind) else ():
        hopper = HopperKernels(**blocks, backward_kernels=CudnnBackward(otherwise=triton))
        if not hopper.unsupported(q, chunk=chunk, overlap=overlap):
            return hopper
    return triton


def feature_kernels(
    device_kind: str, x: Float[Array | jax.ShapeDtypeStruct, "B N H D"], *, degree: int
) -> FeatureKernels | None:
    """Those for ``jax.Device.device_kind``, with the table's blocks or the default ones, where these fit its memory and
    they can do it, which no block decides."""
    width = x.shape[3]
    blocks = TABLE.blocks(FeatureKernels, device_kind, x.dtype, head_dim=width, features=degree * width)
    kernels = FeatureKernels(**blocks)
    return kernels if is_hopper(device_kind) and not kernels.unsupported(x, degree) else None

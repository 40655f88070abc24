"""Hybrid attention on TPU, by Pallas and Mosaic."""

from pallas_kernels.tpu.blocks import TABLE, Blocks, tuned
from pallas_kernels.tpu.hybrid import hybrid

__all__ = ["TABLE", "Blocks", "hybrid", "tuned"]

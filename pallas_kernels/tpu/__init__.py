"""Hybrid attention on TPU, by Pallas and Mosaic."""

from pallas_kernels.tpu.blocks import Blocks, tuned
from pallas_kernels.tpu.hybrid import hybrid

__all__ = ["Blocks", "hybrid", "tuned"]

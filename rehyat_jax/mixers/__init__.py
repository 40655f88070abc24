"""What a transformer block's self-attention may be: one mixer a file, found through a registry (`mixers.base`)."""

from rehyat_jax.mixers.base import Mixer, MixerConfig, Weights, register, unwritten, whole
from rehyat_jax.mixers.config import BlockMixers, Conversion, HybridConfig, read_conversion
from rehyat_jax.mixers.hybrid import Hybrid
from rehyat_jax.mixers.linear import Linear
from rehyat_jax.mixers.softmax import Softmax
from rehyat_jax.mixers.window import Window

__all__ = [
    "BlockMixers",
    "Conversion",
    "Hybrid",
    "HybridConfig",
    "Linear",
    "Mixer",
    "MixerConfig",
    "Softmax",
    "Weights",
    "Window",
    "read_conversion",
    "register",
    "unwritten",
    "whole",
]

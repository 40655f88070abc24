"""Checkpoints of the networks that this program has: loaded, saved, converted and described.

The engine in `rehyat_jax.weights` knows no network; `models.networks` makes them known to it.
"""

from rehyat_jax.models.checkpoints.converting import convert, save_conversion
from rehyat_jax.models.checkpoints.describing import describe
from rehyat_jax.models.checkpoints.loading import load_text_encoder, load_transformer, load_vae
from rehyat_jax.models.checkpoints.saving import save_text_encoder, save_transformer, save_vae

__all__ = [
    "convert",
    "describe",
    "load_text_encoder",
    "load_transformer",
    "load_vae",
    "save_conversion",
    "save_text_encoder",
    "save_transformer",
    "save_vae",
]

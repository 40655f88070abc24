"""Checkpoints: any dialect in, the diffusers layout out."""

from rehyat_jax.weights.convert import convert
from rehyat_jax.weights.inspect import CheckpointInfo, ComponentInfo, describe
from rehyat_jax.weights.load import load_text_encoder, load_transformer, load_vae
from rehyat_jax.weights.save import save_text_encoder, save_transformer, save_vae

__all__ = [
    "CheckpointInfo",
    "ComponentInfo",
    "convert",
    "describe",
    "load_text_encoder",
    "load_transformer",
    "load_vae",
    "save_text_encoder",
    "save_transformer",
    "save_vae",
]

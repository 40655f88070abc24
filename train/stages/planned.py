"""What stages that are planned have in common: sizes from the configuration alone, host batches that are shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from rehyat_jax.errors import ConfigError
from rehyat_jax.models.wan.config import VAEConfig, WanConfig
from rehyat_jax.text.prompt_encoder import TEXT_LENGTH
from train.data.pools import Pool


def planned_model(said: WanConfig | None, folder: Path) -> WanConfig:
    """
    Raises:
        ConfigError: the configuration does not say what the model is.
    """
    if said is None:
        raise ConfigError(f"the configuration says nothing of the sizes of {folder}: give it a model, as WanConfig")
    return said


def latent_shape(vae: VAEConfig, *, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Latent frames, rows and columns of a video."""
    return (frames - 1) // vae.temporal_factor + 1, height // vae.spatial_factor, width // vae.spatial_factor


def check_planned(vae: VAEConfig, model: WanConfig, *, frames: int, size: tuple[int, int]) -> None:
    """
    Raises:
        ConfigError: such videos do not fit the VAE and the model's patches.
    """
    if (frames - 1) % vae.temporal_factor or any(
        side % (vae.spatial_factor * patch) for side, patch in zip(size[::-1], model.patch_size[1:], strict=True)
    ):
        raise ConfigError(f"videos of {frames} frames, {size[0]}x{size[1]}, do not fit the VAE and the patches")


class PlannedFeed:
    """Latents and embeddings of a round, as shapes; a `train.data.pools.Feed`."""

    def __init__(self, count: int, latents: tuple[int, ...], width: int, dtype: Any) -> None:
        text, self._dtype = (TEXT_LENGTH, width), dtype
        self._shapes = {
            "latents": jax.ShapeDtypeStruct((count, *latents), jnp.bfloat16),
            "text": jax.ShapeDtypeStruct((count, *text), jnp.bfloat16),
        }
        self.frozen: PyTree = {"empty": jax.ShapeDtypeStruct((1, *text), dtype)}

    def host_batch(self, index: int) -> PyTree:
        raise NotImplementedError

    def host_batch_shapes(self) -> PyTree:
        return self._shapes

    def pool(self, host_batch: PyTree, frozen: PyTree, models: PyTree) -> Pool:
        return Pool(host_batch["latents"].astype(jnp.float32), host_batch["text"].astype(self._dtype))

    def null_embedding(self, frozen: PyTree, models: PyTree) -> Array:
        return frozen["empty"]

    def prompts(self, host_batch: PyTree) -> PyTree:
        """The captions' embeddings."""
        return host_batch["text"]

"""What a stage reads of the model that its student begins with."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from rehyat_jax.models.checkpoints import load_vae
from rehyat_jax.models.wan.config import VAEConfig
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.sprites import world
from rehyat_jax.text.tokenizer import Tokenizer
from train.data.clips import Bucket
from train.data.prepared import Prepared, PreparedClips
from train.stages.flow import Show
from train.stages.planned import latent_shape
from train.stages.sizes import whole_model
from train.stages.videos import showing


class FromSource:
    """The source's parts, each read when it is first asked for, and the sizes that follow from them."""

    training: Any

    @property
    def prepared(self) -> Mapping[Path, Prepared]:
        """The opened folders of clips that were prepared."""
        raise NotImplementedError

    @functools.cached_property
    def source(self) -> Path:
        return whole_model(self.training.source, expert=getattr(self.training, "expert", None))

    @functools.cached_property
    def dtype(self) -> jnp.dtype:
        """Of the computation."""
        return jnp.dtype(self.training.dtype)

    @functools.cached_property
    def vae(self) -> WanVAE:
        return load_vae(self.source, dtype=self.dtype)

    @functools.cached_property
    def vae_config(self) -> VAEConfig:
        return self.vae.config

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.source)

    @functools.cached_property
    def show(self) -> Show | None:
        """How a validation shows videos; None: it is to show none."""
        validation = self.training.validation
        if not (validation.every and validation.prompts):
            return None
        return showing(validation.prompts, folder=self.source, dtype=self.dtype, defaults=self.training.defaults)

    def shape_of(self, clips: Bucket | PreparedClips) -> tuple[int, int, int]:
        """Latent frames, rows and columns of clips."""
        if isinstance(clips, PreparedClips):
            frames, rows, columns = self.prepared[clips.folder].plan.latents[:3]
            return frames, rows, columns
        return latent_shape(self.vae_config, frames=clips.frames, height=world.HEIGHT, width=clips.width)

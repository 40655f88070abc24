"""The programs of attention distillation from shapes alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from rehyat_jax.models.wan.config import VAEConfig
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.runtime.devices import Devices
from rehyat_jax.sampling import FlowSchedule, UniPC
from rehyat_jax.text.prompt_encoder import TEXT_LENGTH
from train.data.sources import Inputs, OwnTrajectories, Shown
from train.stages.clips_given import planned_clips
from train.stages.distill import DistillTraining
from train.stages.distill_stage import DistillStage
from train.stages.from_image import FromImage, takes_image
from train.stages.planned import planned_model


class PlannedDistill(DistillStage):
    """The same programs, from shapes: no weights and no prompts are read."""

    def __init__(self, training: DistillTraining, among: Sequence[Any]) -> None:
        super().__init__(training)
        self._among, self.folder = among, training.teacher
        self.vae = VAEConfig.published_for(planned_model(training.model, training.teacher))
        self.sampling = training.sampling(FlowSchedule(shift=5.0), UniPC(), levels=self.levels)
        self.vae_module = nnx.eval_shape(lambda: WanVAE(self.vae, dtype=self.dtype, rngs=nnx.Rngs(0)))

    @property
    def levels(self) -> tuple[float, float]:
        """All: which are an expert's says a folder that need not be here."""
        return 0.0, 1.0

    @property
    def begins_with_clips(self) -> bool:
        return self.training.expert == "low"

    @functools.cached_property
    def shown(self) -> Shown | None:
        takes = takes_image(self.model, self.vae)
        return FromImage.of(self.model, self.vae, None).shown(lambda: self.vae_module, None) if takes else None

    @functools.cached_property
    def teacher(self) -> WanTransformer:
        model = planned_model(self.training.model, self.training.teacher)
        return nnx.eval_shape(lambda: WanTransformer(model, dtype=self.dtype, param_dtype=self.dtype, rngs=nnx.Rngs(0)))

    @functools.cached_property
    def devices(self) -> Devices:
        return self.training.devices(self.model, self.shapes, among=self._among)

    @functools.cached_property
    def blocks(self) -> tuple[Any, ...]:
        return self.learner.mixing.parted(nnx.eval_shape(lambda: self.training.blocks(self.model)))

    def inputs(self) -> list[Inputs]:
        def embed(texts: Sequence[str]) -> Array:
            return jnp.zeros((len(texts), TEXT_LENGTH, self.model.text_dim), self.dtype)

        return [
            OwnTrajectories(
                source,
                sampling=self.sampling,
                texts=lambda number: "",
                embed=embed,
                shape=shape,
                key=jax.random.key(0),
                clips=planned_clips(self.shown, shape, begins=self.begins_with_clips),
            )
            for source, shape in zip(self.training.sources, self.shapes, strict=True)
        ]

"""What is to be made of videos and captions, checked before anything is decoded or any weights are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from rehyat_jax.errors import ConfigError
from rehyat_jax.models.folder import find_model, read_defaults
from rehyat_jax.models.memory import encoder_bytes, fitting_size, size_unit, text_encoder_bytes, weights_bytes
from rehyat_jax.models.networks import open_component
from rehyat_jax.runtime.memory import Need
from rehyat_jax.text.prompt_encoder import PromptEncoder
from train.data.encoders import latent_frames_per_step
from train.data.footage import Found, Unusable
from train.data.prepared import EncodePlan, identity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoding:
    """What is to be done: nothing was decoded and no weights were read yet."""

    plan: EncodePlan
    found: Found
    model: Path
    videos_per_shard: int
    #: More videos that cannot be used end the run.
    most_unusable: int

    def check_limit(self, unusable: Sequence[Unusable]) -> None:
        """
        Raises:
            ConfigError: too many videos cannot be used.
        """
        if len(unusable) > self.most_unusable:
            total = len(self.found.footage) + len(self.found.unusable)
            raise ConfigError(
                f"{len(unusable)} of {total} videos cannot be used, and --most-unusable is {self.most_unusable}: "
                f"{unusable[0].reason}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """What clips and captions are made into.

    Attributes:
        frames, height, width: of a clip; None: the model's defaults.
        repair_prompts: have ftfy repair captions, as `TextToVideo.from_pretrained` has prompts.
    """

    frames: int | None
    height: int | None
    width: int | None
    fps: int
    dtype: str
    repair_prompts: bool = True


def plan_encoding(
    found: Found, settings: ClipSettings, *, model: str, videos_per_shard: int, most_unusable: int | None = None
) -> Encoding:
    """Check all that can be checked of the settings and the model.

    Args:
        most_unusable: None: half of the videos.

    Raises:
        CheckpointError, ConfigError: no such model or size; too many videos cannot be used.
    """
    fps, dtype = settings.fps, settings.dtype
    for name, value in (("fps", fps), ("videos_per_shard", videos_per_shard)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")
    folder = find_model(model)
    defaults = read_defaults(folder)
    frames = settings.frames or defaults.num_frames
    height, width = settings.height or defaults.height, settings.width or defaults.width
    vae: Any = open_component(folder, "vae").config
    transformer: Any = open_component(folder, "transformer").config
    if (frames - 1) % vae.temporal_factor:
        raise ConfigError(f"{frames} frames are not {vae.temporal_factor}k + 1")
    for side, of_patch in zip((height, width), transformer.patch_size[1:], strict=True):
        if side % (vae.spatial_factor * of_patch):
            raise ConfigError(f"a side of {side} is no multiple of {vae.spatial_factor * of_patch} pixels")
    shape = ((frames - 1) // vae.temporal_factor + 1, height // vae.spatial_factor, width // vae.spatial_factor)
    total = len(found.footage) + len(found.unusable)
    encoding = Encoding(
        plan=EncodePlan(
            vae=identity(folder, "vae"),
            text_encoder=identity(folder, "text_encoder"),
            frames=frames,
            height=height,
            width=width,
            fps=fps,
            latents=(*shape, vae.z_dim),
            text=PromptEncoder(folder, dtype=jnp.dtype(dtype)).text_dim,
            dtype=dtype,
            repair_prompts=settings.repair_prompts,
        ),
        found=found,
        model=folder,
        videos_per_shard=videos_per_shard,
        most_unusable=total // 2 if most_unusable is None else most_unusable,
    )
    encoding.check_limit(found.unusable)
    return encoding


def memory_need(encoding: Encoding) -> Need:
    """What encoding takes: first the text encoder is at work, then the VAE.

    Raises:
        CheckpointError, ConfigError: the model has not both networks.
    """
    plan, vae = encoding.plan, open_component(encoding.model, "vae").config
    step = latent_frames_per_step(vae, height=plan.height, width=plan.width)
    sizes = {"frames": plan.frames, "height": plan.height, "width": plan.width}
    video = encoder_bytes(vae, **sizes, latent_frames_per_step=step)
    video += weights_bytes(encoding.model, "vae", dtype=jnp.float32)
    text = text_encoder_bytes(encoding.model, dtype=jnp.dtype(plan.dtype))
    largest = {"encoding a clip": video} if video > text else {"the text encoder": text}
    # A clip as frames, and stacked.
    return Need(device=largest, host=2 * 3 * plan.frames * plan.height * plan.width)


def smaller_size(encoding: Encoding) -> str | None:
    """A size of clips for which there is room, as an option."""

    def need(height: int, width: int) -> Need:
        plan = dataclasses.replace(encoding.plan, height=height, width=width)
        return memory_need(dataclasses.replace(encoding, plan=plan))

    plan = encoding.plan
    return fitting_size(need, height=plan.height, width=plan.width, multiple=size_unit(encoding.model))

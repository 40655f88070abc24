"""How Wan's models take images: as channels beside the noise, as a finished first frame, or not at all.

Sources: Wan-Video/Wan2.1 ``wan/image2video.py``, ``wan/first_last_frame2video.py``; Wan-Video/Wan2.2
``wan/textimage2video.py``; diffusers ``pipelines/wan/pipeline_wan_i2v.py``.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from rehyat_jax.errors import CheckpointError, RehyatError
from rehyat_jax.models.wan.config import VAEConfig, WanConfig
from rehyat_jax.sampling.codec import Codec
from rehyat_jax.sampling.condition import Condition
from rehyat_jax.video.images import Images, fitted


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoSize:
    """Of the video that the images are for, in pixels; ``count`` videos side by side."""

    count: int
    frames: int
    height: int
    width: int


@runtime_checkable
class Conditioning(Protocol):
    """How a model takes images."""

    def check(self, images: Images) -> None:
        """
        Raises:
            RehyatError: there is an image that the model does not take, or none where it needs one.
        """

    def condition(self, images: Images, size: VideoSize, *, codec: Codec) -> Condition:
        """Images that were checked, as sampling takes them."""

    def of_stream(self) -> Conditioning:
        """How it takes them where a video is made chunk by chunk."""


class NoImages:
    """A text-to-video model."""

    def check(self, images: Images) -> None:
        if images.first is not None or images.last is not None:
            raise RehyatError("this model makes videos from text alone: it takes no image, but in a per-chunk sweep")

    def condition(self, images: Images, size: VideoSize, *, codec: Codec) -> Condition:
        return Condition()

    def of_stream(self) -> Conditioning:
        return CleanFirstFrame()  # as finished chunks are committed; it was not trained to see one beside noisy frames


class CleanFirstFrame:
    """Wan2.2's 5B: with an image the first latent frame is finished from the start, without one it is as any other."""

    def check(self, images: Images) -> None:
        if images.last is not None:
            raise RehyatError("this model takes an image as its first frame; it takes no last_image")

    def condition(self, images: Images, size: VideoSize, *, codec: Codec) -> Condition:
        if images.first is None:
            return Condition()
        image = fitted("image", images.first, height=size.height, width=size.width)
        frames = codec.latent_shape(num_frames=size.frames, height=size.height, width=size.width)[0]
        latents = repeated(codec.encode(image[None, None], frames_per_step=1), size.count)
        return Condition(clean=jnp.pad(latents, ((0, 0), (0, frames - 1), *[(0, 0)] * 3)), given=jnp.arange(frames) < 1)

    def of_stream(self) -> Conditioning:
        return self


def repeated(latents: Float[Array, "1 T h w z"], count: int) -> Float[Array, "B T h w z"]:
    return jnp.broadcast_to(latents, (count, *latents.shape[1:]))


def conditioning_of(model: WanConfig, vae: VAEConfig, *, clean_first_frame: bool) -> Conditioning:
    """
    Args:
        clean_first_frame: diffusers' ``expand_timesteps``.

    Raises:
        CheckpointError: the two networks do not fit each other.
    """
    if model.in_channels == model.out_channels == vae.z_dim:
        return CleanFirstFrame() if clean_first_frame else NoImages()
    raise CheckpointError(
        f"the transformer takes {model.in_channels} channels and gives {model.out_channels}, and the VAE's latents "
        f"have {vae.z_dim}"
    )

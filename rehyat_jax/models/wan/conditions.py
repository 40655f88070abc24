"""How Wan's models take images: as channels beside the noise, as a finished first frame, or not at all.

Sources: Wan-Video/Wan2.1 ``wan/image2video.py``, ``wan/first_last_frame2video.py``; Wan-Video/Wan2.2
``wan/textimage2video.py``; diffusers ``pipelines/wan/pipeline_wan_i2v.py``.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from rehyat_jax.errors import CheckpointError, RehyatError
from rehyat_jax.models.wan.config import VAEConfig, WanConfig
from rehyat_jax.sampling.codec import Codec
from rehyat_jax.sampling.condition import Condition
from rehyat_jax.sampling.settings import Settings
from rehyat_jax.video.images import Images, fitted


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoSize:
    """Of the video that the images are for, in pixels; ``count`` videos side by side."""

    count: int
    frames: int
    height: int
    width: int

    @classmethod
    def of(cls, settings: Settings, count: int) -> VideoSize:
        return cls(count=count, frames=settings.num_frames, height=settings.height, width=settings.width)


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

    def of_stream(self) -> StreamConditioning:
        """How it takes them where a video has no end.

        Raises:
            RehyatError: its videos have one.
        """


@runtime_checkable
class StreamConditioning(Protocol):
    """How a model takes images where a video is made chunk by chunk, without an end."""

    def check(self, images: Images) -> None:
        """As of `Conditioning`."""

    def condition(self, images: Images, size: VideoSize, *, codec: Codec) -> Condition:
        """As of `Conditioning`; ``size`` is the first chunk's."""

    def going_on(self, beginning: UInt8[np.ndarray, "B F H W 3"], size: VideoSize, *, codec: Codec) -> Condition:
        """The condition of streams that go on from these frames."""

    def lasting(self, size: VideoSize, *, codec: Codec) -> Condition:
        """The shapes of what lasts of it (`Condition.lasting`)."""


@runtime_checkable
class Features(Protocol):
    """Of images, by a model's image encoder."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of one image: tokens, width."""

    def __call__(self, images: Images) -> Float[Array, "L D"]: ...


class NoImages:
    """A text-to-video model."""

    def check(self, images: Images) -> None:
        if images.first is not None or images.last is not None:
            raise RehyatError("this model makes videos from text alone: it takes no image, but in a per-chunk sweep")

    def condition(self, images: Images, size: VideoSize, *, codec: Codec) -> Condition:
        return Condition()

    def of_stream(self) -> StreamConditioning:
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

    def of_stream(self) -> StreamConditioning:
        return self

    def going_on(self, beginning: UInt8[np.ndarray, "B F H W 3"], size: VideoSize, *, codec: Codec) -> Condition:
        return Condition()

    def lasting(self, size: VideoSize, *, codec: Codec) -> Condition:
        return Condition()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageChannels:
    """Wan2.1's and Wan2.2's image-to-video models: a mask and the latents of a clip that is grey but for the images go
    in beside the noise; Wan2.1's attend to CLIP's features as well.

    Args:
        features: of one or two images [L, D], for models that attend to them.
        takes_last: whether there may be a second image; must_last: whether there has to be one.
    """

    features: Features | None
    takes_last: bool
    must_last: bool

    def of_stream(self) -> StreamConditioning:
        if self.must_last:
            raise RehyatError("this model makes a video between two images: it does not stream")
        return EndlessImageChannels(dataclasses.replace(self, takes_last=False))

    def check(self, images: Images) -> None:
        if images.first is None:
            raise RehyatError("this model makes a video from an image: give image")
        if images.last is not None and not self.takes_last:
            raise RehyatError("this model takes an image as its first frame; it takes no last_image")
        if images.last is None and self.must_last:
            raise RehyatError("this model makes a video between two images: give last_image as well")

    def condition(self, images: Images, size: VideoSize, *, codec: Codec) -> Condition:
        # 127.5 is 0 of -1..1.
        clip = np.full((1, size.frames, size.height, size.width, 3), 127.5, np.float32)
        for place, name, image in ((0, "image", images.first), (-1, "last_image", images.last)):
            if image is not None:
                clip[0, place] = fitted(name, image, height=size.height, width=size.width)
        latents = codec.encode(clip, frames_per_step=1)
        time = codec.config.temporal_factor
        known = np.zeros((size.frames + time - 1,), np.float32)
        known[:time] = 1  # the first latent frame stands for one frame, and the mask has all its places
        if images.last is not None:
            known[-1] = 1
        mask = jnp.asarray(known.reshape(1, -1, 1, 1, time))
        mask = jnp.broadcast_to(mask, (*latents.shape[:-1], time))
        features = None if self.features is None else repeated(self.features(images)[None], size.count)
        return Condition(channels=repeated(jnp.concatenate([mask, latents], axis=-1), size.count), image=features)


@dataclasses.dataclass(frozen=True)
class EndlessImageChannels:
    """As `ImageChannels`, of a video without an end: an image, then grey frames until the encoder, which looks back in
    time so far and no further, has forgotten it. What its latents and the empty mask are then, they stay."""

    whole: ImageChannels

    def check(self, images: Images) -> None:
        self.whole.check(images)

    def condition(self, images: Images, size: VideoSize, *, codec: Codec) -> Condition:
        return self.whole.condition(images, self._known(size, codec), codec=codec)

    def going_on(self, beginning: UInt8[np.ndarray, "B F H W 3"], size: VideoSize, *, codec: Codec) -> Condition:
        one = dataclasses.replace(size, count=1)
        rows = [self.condition(Images(first=frames[0]), one, codec=codec) for frames in beginning]
        return jax.tree.map(lambda *each: jnp.concatenate(each), *rows)

    def lasting(self, size: VideoSize, *, codec: Codec) -> Condition:
        known = self._known(size, codec)
        *places, channels = codec.latent_shape(num_frames=known.frames, height=size.height, width=size.width)
        features, width = self.whole.features, channels + codec.config.temporal_factor
        return Condition(
            channels=jax.ShapeDtypeStruct((size.count, *places, width), jnp.float32),
            image=None if features is None else jax.ShapeDtypeStruct((size.count, *features.shape), jnp.float32),
        )

    @staticmethod
    def _known(size: VideoSize, codec: Codec) -> VideoSize:
        return dataclasses.replace(size, frames=codec.num_frames(codec.config.encoder_memory + 1))


def repeated(one: Float[Array, "1 *shape"], count: int) -> Float[Array, "B *shape"]:
    return jnp.broadcast_to(one, (count, *one.shape[1:]))


def conditioning_of(
    model: WanConfig,
    vae: VAEConfig,
    *,
    clean_first_frame: bool,
    features: Features | None = None,
) -> Conditioning:
    """
    Args:
        clean_first_frame: diffusers' ``expand_timesteps``.
        features: of images, by the model's image encoder, where it has one.

    Raises:
        CheckpointError: the networks do not fit each other, or the image encoder is missing.
    """
    attends = model.image_dim is not None
    if attends and features is None:
        raise CheckpointError("the transformer attends to an image's features, and there is no image encoder")
    if model.out_channels == vae.z_dim:
        if model.in_channels == vae.z_dim and not attends:
            return CleanFirstFrame() if clean_first_frame else NoImages()
        if model.in_channels == 2 * vae.z_dim + vae.temporal_factor:
            two = model.pos_embed_seq_len is not None
            return ImageChannels(features=features if attends else None, takes_last=two or not attends, must_last=two)
    raise CheckpointError(
        f"the transformer takes {model.in_channels} channels and gives {model.out_channels}, and the VAE's latents "
        f"have {vae.z_dim}: it is no model that this program runs"
    )

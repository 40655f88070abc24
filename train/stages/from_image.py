"""What an image-to-video model is shown of a clip in training: the clip's own first frame, as the model takes images;
a model between two images its last frame too.

The frames are had of the clip's latents, decoded; so prepared clips need no pixels beside these.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from rehyat_jax.models.clip.config import ImageEncoderConfig, Preparation
from rehyat_jax.models.clip.encoder import ImageEncoder
from rehyat_jax.models.clip.features import ImageFeatures
from rehyat_jax.models.wan.config import VAEConfig, WanConfig
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.runtime.mesh import devices_along, spec
from rehyat_jax.sampling.condition import Condition
from train.data.sources import Shown
from train.engine.stage import Models, Network


def takes_image(model: WanConfig, vae: VAEConfig) -> bool:
    """Whether a mask and an image's latents go in beside the noise."""
    return model.out_channels == vae.z_dim and model.in_channels == 2 * vae.z_dim + vae.temporal_factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromImage:
    """The images of one model's training; its networks are in the roles "vae" and, with CLIP, "image"."""

    vae: VAEConfig
    #: Of images for CLIP; None: the model has none.
    prepare: Preparation | None
    #: The model makes videos between two images.
    between: bool = False

    @classmethod
    def of(cls, model: WanConfig, vae: VAEConfig, features: ImageFeatures | None) -> FromImage:
        """
        Args:
            features: the model's image encoder, where it has one; without, for a plan, the published one's.
        """
        if model.image_dim is None:
            return cls(vae=vae, prepare=None)
        prepare = Preparation.of(ImageEncoderConfig()) if features is None else features.preparation
        return cls(vae=vae, prepare=prepare, between=model.pos_embed_seq_len is not None)

    def shown(self, vae: Callable[[], WanVAE], features: ImageFeatures | None) -> Shown:
        """The same with networks of its own; arguments as of `networks`."""
        made = {role: nnx.split(network.make()) for role, network in self.networks(vae, features).items()}
        graphs = {role: graph for role, (graph, _) in made.items()}
        return Shown(
            {role: weights for role, (_, weights) in made.items()},
            lambda weights, latents: self.condition(Models(graphs, frozen=weights), latents),
        )

    def networks(self, vae: Callable[[], WanVAE], features: ImageFeatures | None) -> dict[str, Network]:
        """The frozen networks that it needs; by shapes where there is no encoder to be read.

        Args:
            vae: makes the autoencoder.
        """
        found = {"vae": Network(make=vae)}
        if self.prepare is not None:

            def planned() -> ImageEncoder:
                made: ImageEncoder = nnx.eval_shape(lambda: ImageEncoder(ImageEncoderConfig(), rngs=nnx.Rngs(0)))
                return made

            found["image"] = Network(make=planned if features is None else features.read)
        return found

    def condition(self, models: Models, latents: Float[Array, "B T h w z"]) -> Condition:
        """Of clips, by normalised latents: as `rehyat_jax.models.wan.conditions.ImageChannels` makes it of the frame
        that the autoencoder makes of the first of them."""
        frames = latents.shape[1]
        return self.of_stream(models, latents, frames=frames).chunk(0, frames)

    def of_stream(self, models: Models, latents: Float[Array, "B T h w z"], *, frames: int) -> Condition:
        """As far as it changes within so many latent frames, for `Condition.chunk`."""
        roles = [role for role in ("vae", "image") if role in models]
        graphs, weights = zip(*(nnx.split(models[role]) for role in roles), strict=True)
        shown, pieces = functools.partial(self._shown, graphs, frames), devices_along("batch")
        if pieces > 1 and len(latents) % pieces == 0:
            # A loop over frames whose clips are cut over devices would gather them at each.
            batch = spec("batch")
            shown = jax.shard_map(shown, in_specs=(PartitionSpec(), batch), out_specs=batch, check_vma=False)
        channels, image = shown(weights, latents)
        return Condition(channels=channels, image=image)

    def _shown(
        self, graphs: tuple[Any, ...], frames: int, weights: tuple[Any, ...], latents: Float[Array, "B T h w z"]
    ) -> tuple[Array, Array | None]:
        """Channels, as far as they change, and CLIP's features."""
        vae, *clip_encoder = (nnx.merge(*each) for each in zip(graphs, weights, strict=True))
        time = self.vae.temporal_factor
        given, known = jnp.zeros(frames * time, jnp.float32).at[:time].set(1), frames
        images: tuple[Array, ...]
        if self.between:
            video = vae.decode(vae.denormalize(latents), frames_per_step=1).astype(jnp.float32)
            images = video[:, :1], video[:, -1:]
            clip = jnp.zeros_like(video).at[:, :1].set(images[0]).at[:, -1:].set(images[1])
            given = given.at[frames * time - 1].set(1)
        else:
            images = (vae.decode_first(vae.denormalize(latents[:, :1]))[0].astype(jnp.float32),)
            # The encoder has forgotten the image then: what it makes of grey frames stays the same.
            known = min(frames, self.vae.encoder_memory + 1)
            clip = jnp.pad(images[0], ((0, 0), (0, time * (known - 1)), *[(0, 0)] * 3))
        shown = vae.normalize(vae.encode(clip, frames_per_step=1).astype(jnp.float32))
        mask = given[: known * time].reshape(1, known, 1, 1, time)
        channels = jnp.concatenate([jnp.broadcast_to(mask, (*shown.shape[:-1], time)), shown], axis=-1)
        if self.prepare is None:
            return channels, None
        seen = [clip_encoder[0](prepared_frames(image[:, 0] / 2 + 0.5, self.prepare)) for image in images]
        return channels, jnp.concatenate(seen, axis=1)


def prepared_frames(frames: Float[Array, "B H W 3"], prepare: Preparation) -> Float[Array, "B h w 3"]:
    """As `Preparation` makes pixels of 0..1 ready for CLIP, inside a program; not rounded to eight bits on the way."""
    rows, columns = frames.shape[1:3]
    scale = prepare.shortest_edge / min(rows, columns)
    size = max(int(scale * rows), prepare.height), max(int(scale * columns), prepare.width)
    resized = jax.image.resize(frames, (len(frames), *size, 3), "cubic", antialias=True)
    top, left = (size[0] - prepare.height) // 2, (size[1] - prepare.width) // 2
    middle = jnp.clip(resized[:, top : top + prepare.height, left : left + prepare.width], 0.0, 1.0)
    mean, std = (jnp.asarray(values, jnp.float32).reshape(1, 1, 1, 3) for values in (prepare.mean, prepare.std))
    return (middle - mean) / std


def shown(condition: Condition | None, latents: Float[Array, "B T h w z"]) -> tuple[Array, dict[str, Array]]:
    """What a model that takes images is shown of noisy latents, and its call's ``image``."""
    if condition is None:
        return latents, {}
    seen, _ = condition.seen(latents, jnp.zeros(len(latents)))
    return seen, {} if condition.image is None else {"image": condition.image}

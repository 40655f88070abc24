"""What a video is made under beside its texts: frames that are given, channels beside the noise's, image features."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Condition:
    """A pytree; what a model has no use for is None. T counts the latent frames of the video, or of a chunk of it."""

    #: Finished latents [B, T, h, w, z], of which the `given` frames stand in the place of noisy ones, at time 0, when
    #: the transformer is asked, and in the result (Wan2.2's 5B). Frames that are not given are never read.
    clean: Any = None
    #: [T], of truth values.
    given: Any = None
    #: [B, T, h, w, c], shown to the transformer after the noisy latents' own channels (Wan's image-to-video models).
    channels: Any = None
    #: [B, L, D], features of images that the blocks attend to beside the text.
    image: Any = None

    def seen(
        self, latents: Float[Array, "B T h w z"], t: Num[Array, " B"]
    ) -> tuple[Float[Array, "B T h w d"], Num[Array, "B *frames"]]:
        """What the transformer is shown of noisy latents, and at which times: a video's, or each frame's own."""
        if self.clean is not None:
            latents = self.finished(latents)
            t = jnp.where(self.given[None], jnp.zeros_like(t)[:, None], t[:, None])
        if self.channels is not None:
            latents = jnp.concatenate([latents, self.channels.astype(latents.dtype)], axis=-1)
        return latents, t

    def finished(self, latents: Float[Array, "B T h w z"]) -> Float[Array, "B T h w z"]:
        """The latents with the given frames in their places."""
        if self.clean is None:
            return latents
        return jnp.where(self.given[None, :, None, None, None], self.clean.astype(latents.dtype), latents)

    def lasting(self) -> Condition:
        """What counts for frames after those that are given."""
        return dataclasses.replace(self, clean=None, given=None)

    def chunk(self, first_frame: int | Int[Array, ""], frames: int) -> Condition:
        """Of a chunk of a video. After the end of what is known no frame is given, and the last channels go on."""
        numbers = jnp.asarray(first_frame, jnp.int32) + jnp.arange(frames, dtype=jnp.int32)

        def part(known: Array, axis: int) -> Array:
            return jnp.take(known, jnp.minimum(numbers, known.shape[axis] - 1), axis=axis)

        clean = given = channels = None
        if self.clean is not None:
            clean, given = part(self.clean, 1), part(self.given, 0) & (numbers < len(self.given))
        if self.channels is not None:
            channels = part(self.channels, 1)
        return Condition(clean=clean, given=given, channels=channels, image=self.image)

"""Noise of a video: it belongs to a latent frame.

It is drawn from the video's key and the frame's number alone, so that neither the length of a video nor its chunks nor
the batch change it, and every way to sample begins with the same.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from rehyat_jax.errors import RehyatError
from rehyat_jax.runtime import arguments
from rehyat_jax.runtime.arguments import seed_number

#: Frames, height, width and channels of latents.
Shape: TypeAlias = tuple[int, int, int, int]

#: The same numbers on every device, whatever JAX is configured to draw by default.
RANDOM = "threefry2x32"
#: Folded into a video's key for its context noise, and below it the steps' own: the numbers of no frames.
_CONTEXT = (1 << 32) - 1


def video_keys(seed: Any, *, count: int) -> Key[Array, " count"]:
    """Keys of the noise of ``count`` videos: the i-th has that of ``seed + i``.

    Raises:
        RehyatError: a seed is not in 0 to 2³² − 1.
    """
    first = seed_number(seed, count=count)
    return jnp.stack([jax.random.key(first + i, impl=RANDOM) for i in range(count)])


def seeds(keys: Key[Array, " B"]) -> tuple[int, ...]:
    """The seeds that `video_keys` made keys of."""
    return tuple((int(high) << 32) + int(low) for high, low in np.asarray(jax.random.key_data(keys)))


@partial(jax.jit, static_argnames="shape")
def frame_noise(
    keys: Key[Array, " B"], shape: Shape, *, first_frame: int | Int[Array, ""] = 0
) -> Float[Array, "B T h w z"]:
    """Standard normal noise, float32, of latent frames ``first_frame``, ``first_frame + 1``, … of each key's video."""
    numbers = jnp.asarray(first_frame, jnp.int32) + jnp.arange(shape[0], dtype=jnp.int32)

    def frame(key: Key[Array, ""], number: Int[Array, ""]) -> Float[Array, "h w z"]:
        return jax.random.normal(jax.random.fold_in(key, number), shape[1:], jnp.float32)

    return jax.vmap(jax.vmap(frame, (None, 0)), (0, None))(keys, numbers)


class ChunkNoise(NamedTuple):
    """All noise of some consecutive latent frames of each video; a pytree, drawn where it is asked for."""

    keys: Key[Array, " B"]
    #: The first of the frames, counted from the video's beginning.
    first_frame: int | Int[Array, ""] = 0

    def initial(self, shape: Shape) -> Float[Array, "B T h w z"]:
        """What sampling begins with."""
        return frame_noise(self.keys, shape, first_frame=self.first_frame)

    def fresh(self, shape: Shape, step: int | Int[Array | np.ndarray, ""]) -> Float[Array, "B T h w z"]:
        """As `initial`, and independent of it: what a stochastic solver takes at a step, by its number."""
        place = np.uint32(_CONTEXT - 1) - jnp.asarray(step).astype(jnp.uint32)
        keys = jax.vmap(lambda key: jax.random.fold_in(key, place))(self.keys)
        return frame_noise(keys, shape, first_frame=self.first_frame)

    def context(self, shape: Shape) -> Float[Array, "B T h w z"]:
        """As `initial`, and independent of it: what finished frames are committed with."""
        keys = jax.vmap(lambda key: jax.random.fold_in(key, np.uint32(_CONTEXT)))(self.keys)
        return frame_noise(keys, shape, first_frame=self.first_frame)


def initial_noise(
    shape: Shape, *, count: int, seed: int, noise: Float[Array | np.ndarray, "..."] | None
) -> Float[Array, "B T h w z"]:
    """What a caller gave, checked, or else the seeds' own.

    Raises:
        RehyatError: it is no array of ``[count, *shape]``.
    """
    if noise is None:
        return ChunkNoise(video_keys(seed, count=count)).initial(shape)
    if not isinstance(noise, np.ndarray | Array):
        raise arguments.wrong("noise", noise, "an array")
    if noise.shape != (count, *shape):
        raise RehyatError(f"the noise has shape {noise.shape}, and these settings need {(count, *shape)}")
    return jnp.asarray(noise, jnp.float32)

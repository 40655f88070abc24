"""Frames into latents and latents into frames: a video autoencoder, compiled, one latent frame at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, UInt8

from rehyat_jax.errors import CheckpointError, NotFiniteError
from rehyat_jax.runtime.platform import precision
from rehyat_jax.sampling.noise import Shape
from rehyat_jax.sampling.rows import stacked, unstacked, zeros

#: From -1..1, and what lies beyond it, to what is handed out.
Pixels: TypeAlias = Callable[[Array], Array]


@runtime_checkable
class Decoder(Protocol):
    """What sampling asks of a decoder; `rehyat_jax.models.wan.vae.WanVAE` says what each means."""

    config: Any
    dtype: Any

    def decode_first(self, latents: Array, *, clip: bool) -> tuple[Array, Any]: ...

    def decode_next(self, latents: Array, state: Any, *, clip: bool) -> tuple[Array, Any]: ...

    def denormalize(self, latents: Array) -> Array: ...


@runtime_checkable
class Autoencoder(Decoder, Protocol):
    """As `Decoder`, of an autoencoder."""

    def encode(self, video: Array, *, frames_per_step: int | None) -> Array: ...

    def normalize(self, latents: Array) -> Array: ...


def check_decoder(vae: Autoencoder, decoder: Decoder) -> None:
    """
    Raises:
        CheckpointError: the decoder is not for this autoencoder's latents.
    """
    names = {
        "z_dim": "channels of latents",
        "spatial_factor": "pixels a side of a latent pixel",
        "temporal_factor": "frames of a latent frame",
    }
    for name, what in names.items():
        theirs, ours = (getattr(network.config, name) for network in (decoder, vae))
        if theirs != ours:
            raise CheckpointError(f"the decoder is for {theirs} {what}, and this model's autoencoder has {ours}")


def to_float(video: Float[Array, "B F H W 3"]) -> Float[Array, "B F H W 3"]:
    """From -1..1 to 0..1, as diffusers' ``VideoProcessor``."""
    return jnp.clip(video.astype(jnp.float32) * 0.5 + 0.5, 0.0, 1.0)


def to_uint8(video: Float[Array, "B F H W 3"]) -> UInt8[Array, "B F H W 3"]:
    """From -1..1 to 8 bits."""
    return jnp.round(to_float(video) * 255.0).astype(jnp.uint8)


class Shown(NamedTuple):
    """Frames as they are handed out, and whether the pixels that they were made of are finite."""

    frames: Array
    finite: Bool[Array, ""]


class Codec:
    """An autoencoder for sampling; latents are normalised, as the transformer takes them.

    Args:
        vae: split once, so that its weights at this moment are what all calls use.
        decoder: decodes in the autoencoder's place: a smaller one of the same latents.
        compute: the dtype whose `precision` its products have; the autoencoder's own by default.

    Raises:
        CheckpointError: the decoder is for other latents.
    """

    def __init__(self, vae: Any, *, decoder: Any = None, compute: DTypeLike | None = None) -> None:
        if decoder is not None:
            check_decoder(vae, decoder)
        self.config = vae.config
        self.graph, self.weights = nnx.split(vae)
        self._decoder, self._decoder_weights = (self.graph, self.weights) if decoder is None else nnx.split(decoder)
        self._compute = vae.dtype if compute is None else compute

    def latent_shape(self, *, num_frames: int, height: int, width: int) -> Shape:
        """Of the latents of a video of this size in pixels."""
        space = self.config.spatial_factor
        frames = (num_frames - 1) // self.config.temporal_factor + 1
        return frames, height // space, width // space, self.config.z_dim

    def num_frames(self, latent_frames: int) -> int:
        """Frames of a video with so many latent frames."""
        return latent_frames and 1 + self.config.temporal_factor * (latent_frames - 1)

    def encode(
        self, video: UInt8[np.ndarray, "B F H W 3"] | Float[np.ndarray, "B F H W 3"], *, frames_per_step: int
    ) -> Float[Array, "B T h w z"]:
        """A video's latents, so many latent frames at a time; 0 to 255, whole numbers or not.

        Raises:
            RehyatError: the number of frames is not 4k + 1, or a side is not a multiple of 8 (Wan's factors).
        """
        with precision(self._compute):
            return encode(self.weights, jnp.asarray(video), graph=self.graph, frames_per_step=frames_per_step)

    def decode(
        self, latents: Float[Array, "B T h w z"], state: Any = None, *, first_frame: int = 0, pixels: Pixels = to_uint8
    ) -> Iterator[tuple[Array, Any]]:
        """Frames of each latent frame in turn, and the state after it; memory does not grow with the video.

        Args:
            state: of the frames before, donated; none before a video's first.
            first_frame: the first of these latent frames, counted from the video's beginning.

        Raises:
            NotFiniteError: pixels are not finite; as 8 bits they would look like any others.
        """
        for i in range(latents.shape[1]):
            latent = latents[:, i : i + 1]
            with precision(self._compute):
                if first_frame + i:
                    shown, state = decode_next(self._decoder_weights, latent, state, graph=self._decoder, pixels=pixels)
                else:
                    shown, state = decode_first(self._decoder_weights, latent, graph=self._decoder, pixels=pixels)
            if not bool(shown.finite):
                raise NotFiniteError(f"decoding latent frame {first_frame + i} made pixels that are not finite")
            yield shown.frames, state

    def decode_rows(
        self, latents: Float[Array, "rows B T h w z"], states: tuple[Any, ...], *, pixels: Pixels = to_uint8
    ) -> tuple[list[Shown], tuple[Any, ...]]:
        """As `decode`, the latents of several streams, none of which stands at its first frame: of each latent frame
        the frames [rows, B, F, H, W, 3] and which rows are finite; and each row's state after them.

        Args:
            states: of each row; donated.
        """
        shown = []
        for i in range(latents.shape[2]):
            with precision(self._compute):
                frames, states = decode_rows(
                    self._decoder_weights, latents[:, :, i : i + 1], states, graph=self._decoder, pixels=pixels
                )
            shown.append(frames)
        return shown, states

    def init_state(self, batch: int, *, height: int, width: int) -> Any:
        """Zeros of the shapes that the decoder's state has; height and width are the latents'."""
        latents = jax.ShapeDtypeStruct((batch, 1, height, width, self.config.z_dim), jnp.float32)
        first = partial(decode_first, graph=self._decoder, pixels=to_uint8)
        _, state = jax.eval_shape(first, self._decoder_weights, latents)
        return zeros(state)

    def is_as(self, other: Codec) -> bool:
        """Whether the other does the same: the same weights, not equal ones."""
        if (self.graph, self._decoder) != (other.graph, other._decoder):
            return False
        mine, others = (jax.tree.leaves((each.weights, each._decoder_weights)) for each in (self, other))
        return all(a is b for a, b in zip(mine, others, strict=True))


@partial(jax.jit, static_argnames=("graph", "frames_per_step"))
def encode(
    weights: Any,
    video: UInt8[Array, "B F H W 3"] | Float[Array, "B F H W 3"],
    *,
    graph: Any,
    frames_per_step: int,
) -> Float[Array, "B T h w z"]:
    """The program of `Codec.encode`."""
    vae: Autoencoder = nnx.merge(graph, weights)
    latents = vae.encode(video.astype(jnp.float32) / 127.5 - 1, frames_per_step=frames_per_step)
    return vae.normalize(latents.astype(jnp.float32))


@partial(jax.jit, static_argnames=("graph", "pixels"))
def decode_first(weights: Any, latents: Array, *, graph: Any, pixels: Pixels) -> tuple[Shown, Any]:
    """A video's first latent frame, and what the decoder needs of it."""
    decoder: Decoder = nnx.merge(graph, weights)
    video, state = decoder.decode_first(decoder.denormalize(latents), clip=False)
    return Shown(pixels(video), jnp.isfinite(video).all()), state


@partial(jax.jit, static_argnames=("graph", "pixels"), donate_argnames="state")
def decode_next(weights: Any, latents: Array, state: Any, *, graph: Any, pixels: Pixels) -> tuple[Shown, Any]:
    """The next latent frame, and what the decoder needs of all so far."""
    decoder: Decoder = nnx.merge(graph, weights)
    video, state = decoder.decode_next(decoder.denormalize(latents), state, clip=False)
    return Shown(pixels(video), jnp.isfinite(video).all()), state


@partial(jax.jit, static_argnames=("graph", "pixels"), donate_argnames="states")
def decode_rows(
    weights: Any, latents: Array, states: tuple[Any, ...], *, graph: Any, pixels: Pixels
) -> tuple[Shown, tuple[Any, ...]]:
    """As `decode_next`, of each of several streams."""
    decoder: Decoder = nnx.merge(graph, weights)

    def one(latents: Array, state: Any) -> tuple[Shown, Any]:
        video, state = decoder.decode_next(decoder.denormalize(latents), state, clip=False)
        return Shown(pixels(video), jnp.isfinite(video).all()), state

    shown, after = jax.vmap(one)(latents, stacked(states))
    return shown, unstacked(after, len(states))

"""Frames into latents and latents into frames: a video autoencoder, compiled, one latent frame at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, PyTree, UInt8

from rehyat_jax.errors import CheckpointError, NotFiniteError
from rehyat_jax.runtime.devices import PictureDevices
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


def moved(network: Any, devices: PictureDevices) -> Any:
    """The same network, its parameters on these devices."""
    graph, weights = nnx.split(network)
    return nnx.merge(graph, devices.replicated(weights))


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
        devices: on which the weights lie already. Frames and the decoder's state stay there.

    Raises:
        CheckpointError: the decoder is for other latents.
    """

    def __init__(
        self,
        vae: Any,
        *,
        decoder: Any = None,
        compute: DTypeLike | None = None,
        devices: PictureDevices | None = None,
    ) -> None:
        if decoder is not None:
            check_decoder(vae, decoder)
        self.config = vae.config
        self.graph, self.weights = nnx.split(vae)
        self._decoder, self._decoder_weights = (self.graph, self.weights) if decoder is None else nnx.split(decoder)
        self._compute = vae.dtype if compute is None else compute
        self._devices = devices

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
        factor, given = self.config.spatial_factor, jnp.asarray(video)
        place = self._place(height=given.shape[2] // factor, width=given.shape[3] // factor)
        given = given if place is None else jax.device_put(given, place)
        with precision(self._compute):
            latents = encode(
                self.weights, given, graph=self.graph, frames_per_step=frames_per_step, sharded=_sharded(place)
            )
        return latents if place is None else jnp.asarray(np.asarray(latents))

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
        place = self._place(height=latents.shape[2], width=latents.shape[3])
        if place is not None:
            latents, state = jax.device_put((latents, state), place)
        how: dict[str, Any] = {"graph": self._decoder, "pixels": pixels, "sharded": _sharded(place)}
        for i in range(latents.shape[1]):
            latent = latents[:, i : i + 1]
            with precision(self._compute):
                if first_frame + i:
                    shown, state = decode_next(self._decoder_weights, latent, state, **how)
                else:
                    shown, state = decode_first(self._decoder_weights, latent, **how)
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
        if (place := self._place(height=latents.shape[3], width=latents.shape[4])) is not None:
            latents, states = jax.device_put((latents, states), place)
        for i in range(latents.shape[2]):
            with precision(self._compute):
                frames, states = decode_rows(
                    self._decoder_weights, latents[:, :, i : i + 1], states, graph=self._decoder, pixels=pixels
                )
            shown.append(frames)
        return shown, states

    @property
    def takes_rows(self) -> bool:
        """Whether `decode_rows` is for it: whole frames are decoded by one device."""
        return self._devices is None or self._devices.count == 1

    def _place(self, *, height: int, width: int) -> Sharding | None:
        """Of the latents' height and width; None for where they are."""
        return None if self._devices is None else self._devices.sharding(height=height, width=width)

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


def _sharded(place: Sharding | None) -> NamedSharding | None:
    """Where several devices have parts of a picture."""
    return place if isinstance(place, NamedSharding) else None


def _constrained(tree: PyTree, sharded: NamedSharding | None) -> PyTree:
    return tree if sharded is None else jax.lax.with_sharding_constraint(tree, sharded)


@partial(jax.jit, static_argnames=("graph", "frames_per_step", "sharded"))
def encode(
    weights: Any,
    video: UInt8[Array, "B F H W 3"] | Float[Array, "B F H W 3"],
    *,
    graph: Any,
    frames_per_step: int,
    sharded: NamedSharding | None = None,
) -> Float[Array, "B T h w z"]:
    """The program of `Codec.encode`."""
    vae: Autoencoder = nnx.merge(graph, weights)
    latents = vae.encode(video.astype(jnp.float32) / 127.5 - 1, frames_per_step=frames_per_step)
    return _constrained(vae.normalize(latents.astype(jnp.float32)), sharded)


@partial(jax.jit, static_argnames=("graph", "pixels", "sharded"))
def decode_first(
    weights: Any, latents: Array, *, graph: Any, pixels: Pixels, sharded: NamedSharding | None = None
) -> tuple[Shown, Any]:
    """A video's first latent frame, and what the decoder needs of it."""
    decoder: Decoder = nnx.merge(graph, weights)
    video, state = decoder.decode_first(decoder.denormalize(latents), clip=False)
    video, state = _constrained((video, state), sharded)
    return Shown(pixels(video), jnp.isfinite(video).all()), state


@partial(jax.jit, static_argnames=("graph", "pixels", "sharded"), donate_argnames="state")
def decode_next(
    weights: Any, latents: Array, state: Any, *, graph: Any, pixels: Pixels, sharded: NamedSharding | None = None
) -> tuple[Shown, Any]:
    """The next latent frame, and what the decoder needs of all so far."""
    decoder: Decoder = nnx.merge(graph, weights)
    video, state = decoder.decode_next(decoder.denormalize(latents), state, clip=False)
    video, state = _constrained((video, state), sharded)
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

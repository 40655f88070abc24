"""TAEHV's decoders (madebyollin/taehv): latents into frames at a hundredth of the autoencoder's cost, for previews.

Each block sees its own input of one frame before, which is all that is remembered. A latent frame makes as many frames
as the autoencoder's does; of a video's first one the last alone is a frame, as there.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from rehyat_jax.errors import RehyatError
from rehyat_jax.models.taehv.config import TinyDecoderConfig
from rehyat_jax.models.wan.conv import repeat_pixels
from rehyat_jax.runtime.variables import described, kernel

#: The last input frame of each block of each level.
State: TypeAlias = tuple[tuple[Array, ...], ...]
#: Blocks with a memory, of a level.
BLOCKS = 3


def _conv(width: int, out: int, *, bias: bool = True, **kw: Any) -> nnx.Conv:
    """3x3, of every frame by itself."""
    return nnx.Conv(width, out, (3, 3), padding="SAME", use_bias=bias, **kw)


class MemoryBlock(nnx.Module):
    """Three convolutions of a frame beside the one before it, added to the frame."""

    def __init__(self, width: int, **kw: Any) -> None:
        self.convs = nnx.List([_conv(2 * width, width, **kw), _conv(width, width, **kw), _conv(width, width, **kw)])

    def __call__(
        self, x: Float[Array, "B F H W C"], past: Float[Array, "B 1 H W C"] | None
    ) -> tuple[Float[Array, "B F H W C"], Float[Array, "B 1 H W C"]]:
        past = jnp.zeros_like(x[:, :1]) if past is None else past
        y = jnp.concatenate([x, jnp.concatenate([past, x[:, :-1]], axis=1)], axis=-1)
        first, second, third = self.convs
        y = third(jax.nn.relu(second(jax.nn.relu(first(y)))))
        return jax.nn.relu(x + y), x[:, -1:]


class Level(nnx.Module):
    """Blocks, then twice the height and width and ``times`` frames of each."""

    def __init__(self, width: int, out: int, *, times: int, dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> None:
        kw: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.blocks = nnx.List([MemoryBlock(width, **kw) for _ in range(BLOCKS)])
        shape = width, times * width
        self.grow = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape, param_dtype), **kernel(None, None))
        self.conv = _conv(width, out, bias=False, **kw)
        self.times = times

    def __call__(
        self, x: Float[Array, "B F h w C"], past: tuple[Array, ...] | None
    ) -> tuple[Float[Array, "B frames H W O"], tuple[Array, ...]]:
        after = []
        for block, before in zip(self.blocks, past or (None,) * BLOCKS, strict=True):
            x, last = block(x, before)
            after.append(last)
        # Published code makes pixels before frames: a product of each pixel by itself, it is the same and four times
        # the work.
        x = jnp.einsum("bfhwc,cd->bfhwd", x, self.grow[...].astype(x.dtype))
        batch, frames, height, width, _ = x.shape
        x = jnp.moveaxis(x.reshape(batch, frames, height, width, self.times, -1), 4, 2)
        return self.conv(repeat_pixels(x.reshape(batch, frames * self.times, height, width, -1))), tuple(after)


class TinyDecoder(nnx.Module):
    """Latents [B,T,h,w,z] as the transformer makes them, not denormalised, to videos [B,F,H,W,3] in -1..1.

    Args:
        config: sizes.
        dtype: of computation and of results.
        param_dtype: of the parameters.
        rngs: the stream ``params`` draws the initial values.
    """

    def __init__(
        self, config: TinyDecoderConfig, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        kw: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        widths = config.widths
        self.config, self.dtype = config, dtype
        self.conv_in = _conv(config.z_dim, widths[0], **kw)
        self.levels = nnx.List(
            Level(width, out, times=times, **kw)
            for width, out, times in zip(widths, widths[1:], config.times, strict=False)
        )
        self.conv_out = _conv(widths[-1], 3 * config.patch_size**2, **kw)

    def __repr__(self) -> str:
        return described(self, f"{self.config.z_dim} channels, {jnp.dtype(self.dtype)}")

    def denormalize(self, latents: Float[Array, "B T h w z"]) -> Float[Array, "B T h w z"]:
        """As they are: it was trained on the transformer's own latents."""
        return latents

    def decode_first(
        self, latents: Float[Array, "B T h w z"], *, clip: bool = True
    ) -> tuple[Float[Array, "B F H W 3"], State]:
        """A video's first frames, F = 1 + 4 (T - 1), and the state for `decode_next`.

        Raises:
            RehyatError: the latents do not have ``config.z_dim`` channels.
        """
        video, state = self._decode(latents, None, clip=clip)
        return video[:, self.config.temporal_factor - 1 :], state

    def decode_next(
        self, latents: Float[Array, "B T h w z"], state: State, *, clip: bool = True
    ) -> tuple[Float[Array, "B F H W 3"], State]:
        """Four frames for each further latent frame, and the next state, laid out as ``state``."""
        return self._decode(latents, state, clip=clip)

    def _decode(
        self, latents: Float[Array, "B T h w z"], state: State | None, *, clip: bool
    ) -> tuple[Float[Array, "B F H W 3"], State]:
        if latents.shape[-1] != self.config.z_dim:
            raise RehyatError(f"latents have {latents.shape[-1]} channels, and this decoder takes {self.config.z_dim}")
        x = jnp.tanh(latents.astype(self.dtype) / 3) * 3
        x, after = jax.nn.relu(self.conv_in(x)), []
        for level, past in zip(self.levels, state or (None,) * len(self.levels), strict=True):
            x, last = level(x, past)
            after.append(last)
        video = 2 * self._unfolded(self.conv_out(jax.nn.relu(x))) - 1
        return jnp.clip(video, -1.0, 1.0) if clip else video, tuple(after)

    def _unfolded(self, x: Float[Array, "B F H W c"]) -> Float[Array, "B F rows columns 3"]:
        """Channels into pixels as torch's ``pixel_shuffle``: colour, row, column (Wan's own have the column first)."""
        batch, frames, height, width, _ = x.shape
        patch = self.config.patch_size
        x = x.reshape(batch, frames, height, width, 3, patch, patch).transpose(0, 1, 2, 5, 3, 6, 4)
        return x.reshape(batch, frames, height * patch, width * patch, 3)

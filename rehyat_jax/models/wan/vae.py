"""Wan's causal video autoencoders (diffusers, ``models/autoencoders/autoencoder_kl_wan.py``): Wan2.1's, and that of
Wan2.2's 5B, whose levels are residual groups (`models.wan.residual`) on pixels folded into channels.

Eight or sixteen pixels a side and four frames become one latent pixel; the first frame becomes a latent frame of its
own. Every layer looks back in time only, so that each is a map from (frames, state) to (frames, state), and the
whole is too: a video goes through at once, parallel in time, or in pieces of any length with the state handed on, with
the same result.

A state of ``None`` means the start. There the layers that change the frame rate let the very first frame pass as it is:

* halving: the first frame, then a convolution of stride two over all frames;
* doubling: the first frame, then two frames for each further one by a convolution that sees zeros in place of the first
  frame (the ``"Rep"`` rule of diffusers' and the official code).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from rehyat_jax.errors import RehyatError
from rehyat_jax.models.wan.config import VAEConfig
from rehyat_jax.models.wan.conv import CausalConv3d, RMSNorm, at_least_float32
from rehyat_jax.models.wan.residual import DownGroup, UpGroup, fold_pixels, unfold_pixels
from rehyat_jax.models.wan.vae_layers import (
    CUBE,
    POINT,
    Downsample,
    Frames,
    MidBlock,
    ResidualBlock,
    State,
    UpBlock,
    Upsample,
    run,
)
from rehyat_jax.runtime.variables import described


class Moments(NamedTuple):
    """A diagonal Gaussian over latents, in the autoencoder's own units."""

    mean: Float[Array, "B T h w z"]
    logvar: Float[Array, "B T h w z"]


#: Without it, a patch of one plain colour would leave no trace of its brightness behind the first norm.
_first_bias = nnx.initializers.normal(0.1)


def _plain_down(config: VAEConfig, **kw: Any) -> list[nnx.Module]:
    """Wan2.1's levels, one layer after the other."""
    layers: list[nnx.Module] = []
    width = config.base_dim
    for level, multiple in enumerate(config.dim_mult):
        for _ in range(config.num_res_blocks):
            layers.append(ResidualBlock(width, multiple * config.base_dim, **kw))
            width = multiple * config.base_dim
        if level < len(config.temperal_downsample):
            layers.append(Downsample(width, time=config.temperal_downsample[level], **kw))
    return layers


def _plain_up(config: VAEConfig, **kw: Any) -> list[nnx.Module]:
    """Wan2.1's levels; each upsampling halves the channels."""
    blocks: list[nnx.Module] = []
    width, doubling = config.dim_mult[-1] * config.decoder_dim, config.temperal_downsample[::-1]
    for level, multiple in enumerate(config.dim_mult[::-1]):
        out = multiple * config.decoder_dim
        upsampler = Upsample(out, out // 2, time=doubling[level], **kw) if level < len(doubling) else None
        blocks.append(UpBlock(width, out, blocks=config.num_res_blocks + 1, upsampler=upsampler, **kw))
        width = out // 2 if upsampler else out
    return blocks


def _residual_down(config: VAEConfig, **kw: Any) -> list[nnx.Module]:
    """Wan2.2's levels."""
    widths = [config.base_dim, *(multiple * config.base_dim for multiple in config.dim_mult)]
    times = (*config.temperal_downsample, None)
    return [
        DownGroup(width, out, blocks=config.num_res_blocks, time=time, **kw)
        for width, out, time in zip(widths, widths[1:], times, strict=False)
    ]


def _residual_up(config: VAEConfig, **kw: Any) -> list[nnx.Module]:
    """Wan2.2's levels."""
    multiples = config.dim_mult[::-1]
    widths = [multiple * config.decoder_dim for multiple in (multiples[0], *multiples)]
    times = (*config.temperal_downsample[::-1], None)
    return [
        UpGroup(width, out, blocks=config.num_res_blocks + 1, time=time, **kw)
        for width, out, time in zip(widths, widths[1:], times, strict=False)
    ]


class Encoder(nnx.Module):
    """Folded frames [B,F,H,W,c] to features [B,T,h,w,2z]."""

    def __init__(self, config: VAEConfig, **kw: Any) -> None:
        self.conv_in = CausalConv3d(
            config.pixel_channels, config.base_dim, kernel_size=CUBE, bias_init=_first_bias, **kw
        )
        width = config.dim_mult[-1] * config.base_dim
        self.down_blocks = nnx.List((_residual_down if config.is_residual else _plain_down)(config, **kw))
        self.mid_block = MidBlock(width, **kw)
        self.norm_out = RMSNorm(width, **kw)
        self.conv_out = CausalConv3d(width, 2 * config.z_dim, kernel_size=CUBE, **kw)

    def __call__(self, x: Frames, state: State | None) -> tuple[Frames, State]:
        first, down, mid, last = (None,) * 4 if state is None else state
        x, first = self.conv_in(x, first)
        x, down = run(self.down_blocks, x, down)
        x, mid = self.mid_block(x, mid)
        x, last = self.conv_out(jax.nn.silu(self.norm_out(x)), last)
        return x, (first, down, mid, last)


class Decoder(nnx.Module):
    """Latents [B,T,h,w,z] to folded frames [B,F,H,W,c]."""

    def __init__(self, config: VAEConfig, **kw: Any) -> None:
        width = config.dim_mult[-1] * config.decoder_dim
        self.conv_in = CausalConv3d(config.z_dim, width, kernel_size=CUBE, bias_init=_first_bias, **kw)
        self.mid_block = MidBlock(width, **kw)
        self.up_blocks = nnx.List((_residual_up if config.is_residual else _plain_up)(config, **kw))
        width = config.dim_mult[0] * config.decoder_dim
        self.norm_out = RMSNorm(width, **kw)
        self.conv_out = CausalConv3d(width, config.pixel_channels, kernel_size=CUBE, **kw)

    def __call__(self, x: Frames, state: State | None) -> tuple[Frames, State]:
        first, mid, up, last = (None,) * 4 if state is None else state
        x, first = self.conv_in(x, first)
        x, mid = self.mid_block(x, mid)
        x, up = run(self.up_blocks, x, up)
        x, last = self.conv_out(jax.nn.silu(self.norm_out(x)), last)
        return x, (first, mid, up, last)


def _in_steps(layer: Callable[[Frames, State | None], tuple[Frames, State]], x: Frames, *, step: int | None) -> Frames:
    """``layer`` over the first frame and then ``step`` frames at a time (``None``: over all frames at once)."""
    if step is None or x.shape[1] <= 1 + step:
        return layer(x, None)[0]
    y, state = layer(x[:, :1], None)
    count = (x.shape[1] - 1) // step
    batch, cut = x.shape[0], 1 + count * step
    pieces = jnp.moveaxis(x[:, 1:cut].reshape(batch, count, step, *x.shape[2:]), 1, 0)
    state, ys = lax.scan(lambda state, piece: layer(piece, state)[::-1], state, pieces)
    ys = jnp.moveaxis(ys, 0, 1)
    parts = [y, ys.reshape(batch, -1, *ys.shape[3:])]
    if cut < x.shape[1]:
        parts.append(layer(x[:, cut:], state)[0])
    return jnp.concatenate(parts, axis=1)


class WanVAE(nnx.Module):
    """The autoencoder. Videos are [B,F,H,W,3] in -1..1, latents [B,T,h,w,z] with F = 4(T-1) + 1, H = 8h, W = 8w.

    (Four and eight are Wan2.1's ``temporal_factor`` and ``spatial_factor``; a configuration may have others.)

    Args:
        config: sizes.
        dtype: of computation and of results; norms and softmax are computed in float32 at least.
        param_dtype: of the parameters.
        rngs: the stream ``params`` draws the initial values: kernels by fan-in; convolutions over time begin as the
            identity, attention as nothing.
    """

    def __init__(self, config: VAEConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs) -> None:
        kw: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config, self.dtype = config, dtype
        self.encoder = Encoder(config, **kw)
        self.quant_conv = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, kernel_size=POINT, **kw)
        self.post_quant_conv = CausalConv3d(config.z_dim, config.z_dim, kernel_size=POINT, **kw)
        self.decoder = Decoder(config, **kw)

    def __repr__(self) -> str:
        return described(self, f"{self.config.z_dim} channels, {jnp.dtype(self.dtype)}")

    def encode(
        self, video: Float[Array, "B F H W 3"], *, frames_per_step: int | None = None
    ) -> Float[Array, "B T h w z"]:
        """The posterior's mean, in the autoencoder's units (not normalised). Arguments, errors: `encode_moments`."""
        return self.encode_moments(video, frames_per_step=frames_per_step).mean

    def encode_moments(self, video: Float[Array, "B F H W 3"], *, frames_per_step: int | None = None) -> Moments:
        """The posterior over latents; its log-variance is held within -30..20, as diffusers does.

        Args:
            video: in -1..1.
            frames_per_step: latent frames encoded at a time, to bound memory; ``None``: all at once. Same result.

        Raises:
            RehyatError: the number of frames is not 4k + 1, or a side is not a multiple of 8.
        """
        _, frames, height, width, _ = video.shape
        time, space = self.config.temporal_factor, self.config.spatial_factor
        if frames < 1 or (frames - 1) % time:
            raise RehyatError(f"a video of {frames} frames cannot be encoded: it takes {time}k + 1 frames")
        if height % space or width % space:
            raise RehyatError(f"a video of {width}x{height} cannot be encoded: both sides must be multiples of {space}")
        _check_step(frames_per_step)
        step = None if frames_per_step is None else frames_per_step * time
        features = _in_steps(self.encoder, fold_pixels(video, self.config.patch).astype(self.dtype), step=step)
        mean, logvar = jnp.split(self.quant_conv.valid(features), 2, axis=-1)
        return Moments(mean, jnp.clip(logvar, -30.0, 20.0))

    def decode(
        self, latents: Float[Array, "B T h w z"], *, frames_per_step: int | None = None, clip: bool = True
    ) -> Float[Array, "B F H W 3"]:
        """The video of latents in the autoencoder's own units, clipped to -1..1 as diffusers does.

        Args:
            latents: not normalised.
            frames_per_step: latent frames decoded at a time, to bound memory; ``None``: all at once. Same result.
            clip: ``False`` for training, where a clipped pixel would have no gradient.

        Raises:
            RehyatError: the latents do not have ``config.z_dim`` channels.
        """
        _check_step(frames_per_step)
        video = _in_steps(self._decode, latents, step=frames_per_step)
        return jnp.clip(video, -1.0, 1.0) if clip else video

    def decode_first(
        self, latents: Float[Array, "B T h w z"], *, clip: bool = True
    ) -> tuple[Float[Array, "B F H W 3"], State]:
        """The start of a stream: as `decode`, and the state for `decode_next`. One latent frame gives one frame."""
        video, state = self._decode(latents, None)
        return jnp.clip(video, -1.0, 1.0) if clip else video, state

    def decode_next(
        self, latents: Float[Array, "B T h w z"], state: State, *, clip: bool = True
    ) -> tuple[Float[Array, "B F H W 3"], State]:
        """A stream continued: four frames for each latent frame, and the next state, laid out as ``state``."""
        video, state = self._decode(latents, state)
        return jnp.clip(video, -1.0, 1.0) if clip else video, state

    def normalize(self, latents: Float[Array, "B T h w z"]) -> Float[Array, "B T h w z"]:
        """From the autoencoder's units to the diffusion model's: (latents - mean) / std by channel."""
        mean, std = self._statistics(latents)
        return ((latents.astype(mean.dtype) - mean) / std).astype(latents.dtype)

    def denormalize(self, latents: Float[Array, "B T h w z"]) -> Float[Array, "B T h w z"]:
        """From the diffusion model's units to the autoencoder's: latents * std + mean by channel."""
        mean, std = self._statistics(latents)
        return (latents.astype(mean.dtype) * std + mean).astype(latents.dtype)

    def _decode(self, latents: Frames, state: State | None) -> tuple[Frames, State]:
        if latents.shape[-1] != self.config.z_dim:
            raise RehyatError(f"latents have {latents.shape[-1]} channels, and this decoder takes {self.config.z_dim}")
        video, state = self.decoder(self.post_quant_conv.valid(latents.astype(self.dtype)), state)
        return unfold_pixels(video, self.config.patch), state

    def _statistics(self, latents: Array) -> tuple[Array, Array]:
        wide = at_least_float32(latents.dtype)
        shape = (1, 1, 1, 1, self.config.z_dim)
        mean, std = self.config.latents_mean, self.config.latents_std
        return jnp.asarray(mean, wide).reshape(shape), jnp.asarray(std, wide).reshape(shape)


def _check_step(frames_per_step: int | None) -> None:
    if frames_per_step is not None and frames_per_step < 1:
        raise RehyatError(f"frames_per_step must be at least 1, not {frames_per_step}")

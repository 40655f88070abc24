"""Wan2.1's causal video autoencoder (diffusers, ``models/autoencoders/autoencoder_kl_wan.py``, Wan2.1's variant).

Eight pixels a side and four frames become one latent pixel; the first frame becomes a latent frame of its own. Every
layer looks back in time only, so that each is a map from (frames, state) to (frames, state), and the whole is too: a
video goes through at once, parallel in time, or in pieces of any length with the state handed on, with the same result.

A state of ``None`` means the start. There the layers that change the frame rate let the very first frame pass as it is:

* halving: the first frame, then a convolution of stride two over all frames;
* doubling: the first frame, then two frames for each further one by a convolution that sees zeros in place of the first
  frame (the ``"Rep"`` rule of diffusers' and the official code).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, PyTree

from rehyat_jax.errors import RehyatError
from rehyat_jax.models.wan.config import VAEConfig
from rehyat_jax.models.wan.conv import CausalConv3d, Conv2d, RMSNorm, at_least_float32, identity_tap, repeat_pixels

#: Frames of pixels or of features, [B,F,H,W,C]; layers may change any of the sizes but the first.
Frames = Float[Array, "_ _ _ _ _"]
#: Nested tuples of the frames that layers still need to see; one layout for a given configuration and frame size.
State: TypeAlias = PyTree[Float[Array, "..."]]

_CUBE = (3, 3, 3)
_POINT = (1, 1, 1)
_TIME = (3, 1, 1)


class Moments(NamedTuple):
    """A diagonal Gaussian over latents, in the autoencoder's own units."""

    mean: Float[Array, "B T h w z"]
    logvar: Float[Array, "B T h w z"]


class ResidualBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1x1 convolution on the shortcut where the width changes."""

    def __init__(self, in_features: int, out_features: int, **kw: Any) -> None:
        self.norm1 = RMSNorm(in_features, **kw)
        self.conv1 = CausalConv3d(in_features, out_features, kernel_size=_CUBE, **kw)
        self.norm2 = RMSNorm(out_features, **kw)
        self.conv2 = CausalConv3d(out_features, out_features, kernel_size=_CUBE, **kw)
        widens = in_features != out_features
        self.conv_shortcut = CausalConv3d(in_features, out_features, kernel_size=_POINT, **kw) if widens else None

    def __call__(self, x: Frames, state: State | None) -> tuple[Frames, State]:
        past1, past2 = (None, None) if state is None else state
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut.valid(x)
        x, past1 = self.conv1(jax.nn.silu(self.norm1(x)), past1)
        x, past2 = self.conv2(jax.nn.silu(self.norm2(x)), past2)
        return shortcut + x, (past1, past2)


class AttentionBlock(nnx.Module):
    """Self-attention of one head among the pixels of each frame by itself."""

    def __init__(self, features: int, **kw: Any) -> None:
        self.norm = RMSNorm(features, **kw)
        self.to_qkv = Conv2d(features, 3 * features, kernel_size=1, **kw)
        # Starts as the identity, as the official code does.
        self.proj = Conv2d(features, features, kernel_size=1, kernel_init=nnx.initializers.zeros_init(), **kw)

    def __call__(self, x: Frames) -> Frames:
        qkv = self.to_qkv(self.norm(x))
        batch, frames, height, width, channels = x.shape
        query, key, value = jnp.split(qkv.reshape(batch, frames, height * width, 3 * channels), 3, axis=-1)
        wide = at_least_float32(x.dtype)
        logits = jnp.einsum("bfqc,bfkc->bfqk", query, key, preferred_element_type=wide) / math.sqrt(channels)
        weights = jax.nn.softmax(logits, axis=-1).astype(x.dtype)
        out = jnp.einsum("bfqk,bfkc->bfqc", weights, value)
        return x + self.proj(out.reshape(x.shape))


class MidBlock(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, features: int, **kw: Any) -> None:
        self.resnets = nnx.List([ResidualBlock(features, features, **kw) for _ in range(2)])
        self.attentions = nnx.List([AttentionBlock(features, **kw)])

    def __call__(self, x: Frames, state: State | None) -> tuple[Frames, State]:
        first, second = (None, None) if state is None else state
        x, first = self.resnets[0](x, first)
        x, second = self.resnets[1](self.attentions[0](x), second)
        return x, (first, second)


class Downsample(nnx.Module):
    """Half the size; with ``time``, also half the frames (2k+1 become k+1 at the start, 2k become k later)."""

    def __init__(self, features: int, *, time: bool, **kw: Any) -> None:
        # Padded below and to the right only.
        self.resample = Conv2d(features, features, kernel_size=3, stride=2, padding=(0, 1), **kw)
        init = identity_tap(copies=1, tap=1)
        self.time_conv = CausalConv3d(features, features, kernel_size=_TIME, kernel_init=init, **kw) if time else None

    def __call__(self, x: Frames, state: State | None) -> tuple[Frames, State]:
        x = self.resample(x)
        if self.time_conv is None:
            return x, ()
        seen = x if state is None else jnp.concatenate([state[0], x], axis=1)
        parts = [x[:, :1]] if state is None else []
        if seen.shape[1] > 1:
            parts.append(self.time_conv.valid(seen, stride=2))
        return jnp.concatenate(parts, axis=1), (x[:, -1:],)


class Upsample(nnx.Module):
    """Twice the size and half the channels; with ``time``, also twice the frames, the very first excepted."""

    def __init__(self, features: int, *, time: bool, **kw: Any) -> None:
        self.resample = Conv2d(features, features // 2, kernel_size=3, padding=(1, 1), **kw)
        init = identity_tap(copies=2, tap=2)
        self.time_conv = (
            CausalConv3d(features, 2 * features, kernel_size=_TIME, kernel_init=init, **kw) if time else None
        )

    def __call__(self, x: Frames, state: State | None) -> tuple[Frames, State]:
        if self.time_conv is None:
            past: State = ()
        elif state is not None:
            x, past = self._double(self.time_conv, x, state[0])
            past = (past,)
        elif x.shape[1] > 1:
            later, past = self._double(self.time_conv, x[:, 1:], None)
            x, past = jnp.concatenate([x[:, :1], later], axis=1), (past,)
        else:
            past = (jnp.zeros((x.shape[0], 2, *x.shape[2:]), x.dtype),)
        return self.resample(repeat_pixels(x)), past

    @staticmethod
    def _double(time_conv: CausalConv3d, x: Frames, past: Frames | None) -> tuple[Frames, Frames]:
        batch, frames, height, width, channels = x.shape
        y, past = time_conv(x, past)
        y = y.reshape(batch, frames, height, width, 2, channels).transpose(0, 1, 4, 2, 3, 5)
        return y.reshape(batch, 2 * frames, height, width, channels), past


def _run(layers: Sequence[Any], x: Frames, states: State | None) -> tuple[Frames, State]:
    """Layers one after the other, each with its own state."""
    given = [None] * len(layers) if states is None else states
    kept = []
    for layer, state in zip(layers, given, strict=True):
        x, state = layer(x, state)
        kept.append(state)
    return x, tuple(kept)


#: Without it, a patch of one plain colour would leave no trace of its brightness behind the first norm.
_first_bias = nnx.initializers.normal(0.1)


class Encoder(nnx.Module):
    """Frames [B,F,H,W,3] to features [B,T,h,w,2z]."""

    def __init__(self, config: VAEConfig, **kw: Any) -> None:
        width = config.base_dim
        self.conv_in = CausalConv3d(3, width, kernel_size=_CUBE, bias_init=_first_bias, **kw)
        layers: list[nnx.Module] = []
        for level, multiple in enumerate(config.dim_mult):
            for _ in range(config.num_res_blocks):
                layers.append(ResidualBlock(width, multiple * config.base_dim, **kw))
                width = multiple * config.base_dim
            if level < len(config.temperal_downsample):
                layers.append(Downsample(width, time=config.temperal_downsample[level], **kw))
        self.down_blocks = nnx.List(layers)
        self.mid_block = MidBlock(width, **kw)
        self.norm_out = RMSNorm(width, **kw)
        self.conv_out = CausalConv3d(width, 2 * config.z_dim, kernel_size=_CUBE, **kw)

    def __call__(self, x: Frames, state: State | None) -> tuple[Frames, State]:
        first, down, mid, last = (None,) * 4 if state is None else state
        x, first = self.conv_in(x, first)
        x, down = _run(self.down_blocks, x, down)
        x, mid = self.mid_block(x, mid)
        x, last = self.conv_out(jax.nn.silu(self.norm_out(x)), last)
        return x, (first, down, mid, last)


class UpBlock(nnx.Module):
    """Residual blocks, then an upsampling unless it is the last block."""

    def __init__(
        self, in_features: int, out_features: int, *, blocks: int, upsampler: Upsample | None, **kw: Any
    ) -> None:
        widths = [in_features] + [out_features] * blocks
        self.resnets = nnx.List([ResidualBlock(a, b, **kw) for a, b in itertools.pairwise(widths)])
        self.upsamplers = nnx.List([] if upsampler is None else [upsampler])

    def __call__(self, x: Frames, state: State | None) -> tuple[Frames, State]:
        resnets, upsamplers = (None, None) if state is None else state
        x, resnets = _run(self.resnets, x, resnets)
        x, upsamplers = _run(self.upsamplers, x, upsamplers)
        return x, (resnets, upsamplers)


class Decoder(nnx.Module):
    """Latents [B,T,h,w,z] to frames [B,F,H,W,3]."""

    def __init__(self, config: VAEConfig, **kw: Any) -> None:
        width = config.dim_mult[-1] * config.base_dim
        self.conv_in = CausalConv3d(config.z_dim, width, kernel_size=_CUBE, bias_init=_first_bias, **kw)
        self.mid_block = MidBlock(width, **kw)
        doubling = config.temperal_downsample[::-1]
        blocks = []
        for level, multiple in enumerate(config.dim_mult[::-1]):
            out = multiple * config.base_dim
            upsampler = Upsample(out, time=doubling[level], **kw) if level < len(doubling) else None
            blocks.append(UpBlock(width, out, blocks=config.num_res_blocks + 1, upsampler=upsampler, **kw))
            width = out // 2 if upsampler else out
        self.up_blocks = nnx.List(blocks)
        self.norm_out = RMSNorm(width, **kw)
        self.conv_out = CausalConv3d(width, 3, kernel_size=_CUBE, **kw)

    def __call__(self, x: Frames, state: State | None) -> tuple[Frames, State]:
        first, mid, up, last = (None,) * 4 if state is None else state
        x, first = self.conv_in(x, first)
        x, mid = self.mid_block(x, mid)
        x, up = _run(self.up_blocks, x, up)
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

    (Four and eight are Wan's ``temporal_factor`` and ``spatial_factor``; a configuration may have others.)

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
        self.quant_conv = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, kernel_size=_POINT, **kw)
        self.post_quant_conv = CausalConv3d(config.z_dim, config.z_dim, kernel_size=_POINT, **kw)
        self.decoder = Decoder(config, **kw)

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
        features = _in_steps(self.encoder, video.astype(self.dtype), step=step)
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

    def decode_first(self, latents: Float[Array, "B T h w z"]) -> tuple[Float[Array, "B F H W 3"], State]:
        """The start of a stream: as `decode`, and the state for `decode_next`. One latent frame gives one frame."""
        video, state = self._decode(latents, None)
        return jnp.clip(video, -1.0, 1.0), state

    def decode_next(self, latents: Float[Array, "B T h w z"], state: State) -> tuple[Float[Array, "B F H W 3"], State]:
        """A stream continued: four frames for each latent frame, and the next state, laid out as ``state``."""
        video, state = self._decode(latents, state)
        return jnp.clip(video, -1.0, 1.0), state

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
        return self.decoder(self.post_quant_conv.valid(latents.astype(self.dtype)), state)

    def _statistics(self, latents: Array) -> tuple[Array, Array]:
        wide = at_least_float32(latents.dtype)
        shape = (1, 1, 1, 1, self.config.z_dim)
        mean, std = self.config.latents_mean, self.config.latents_std
        return jnp.asarray(mean, wide).reshape(shape), jnp.asarray(std, wide).reshape(shape)


def _check_step(frames_per_step: int | None) -> None:
    if frames_per_step is not None and frames_per_step < 1:
        raise RehyatError(f"frames_per_step must be at least 1, not {frames_per_step}")

"""The layers of the causal video autoencoder: residual blocks, attention within a frame, changes of size.

Each is a map from (frames, state) to (frames, state); a state of ``None`` means the start of a video.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from rehyat_jax.models.wan.conv import CausalConv3d, Conv2d, RMSNorm, at_least_float32, identity_tap

#: Frames of pixels or of features, [B,F,H,W,C]; layers may change any of the sizes but the first.
Frames = Float[Array, "_ _ _ _ _"]
#: Nested tuples of the frames that layers still need to see; one layout for a given configuration and frame size.
State: TypeAlias = PyTree[Float[Array, "..."]]

CUBE = (3, 3, 3)
POINT = (1, 1, 1)
TIME = (3, 1, 1)


class ResidualBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1x1 convolution on the shortcut where the width changes."""

    def __init__(self, in_features: int, out_features: int, **kw: Any) -> None:
        self.norm1 = RMSNorm(in_features, **kw)
        self.conv1 = CausalConv3d(in_features, out_features, kernel_size=CUBE, **kw)
        self.norm2 = RMSNorm(out_features, **kw)
        self.conv2 = CausalConv3d(out_features, out_features, kernel_size=CUBE, **kw)
        widens = in_features != out_features
        self.conv_shortcut = CausalConv3d(in_features, out_features, kernel_size=POINT, **kw) if widens else None

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
        self.time_conv = CausalConv3d(features, features, kernel_size=TIME, kernel_init=init, **kw) if time else None

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
    """Twice the size, with other channels; with ``time``, also twice the frames, the very first excepted."""

    def __init__(self, features: int, out_features: int, *, time: bool, **kw: Any) -> None:
        self.resample = Conv2d(features, out_features, kernel_size=3, padding=(1, 1), **kw)
        init = identity_tap(copies=2, tap=2)
        self.time_conv = (
            CausalConv3d(features, 2 * features, kernel_size=TIME, kernel_init=init, **kw) if time else None
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
        return self.resample.of_repeated(x), past

    @staticmethod
    def _double(time_conv: CausalConv3d, x: Frames, past: Frames | None) -> tuple[Frames, Frames]:
        batch, frames, height, width, channels = x.shape
        y, past = time_conv(x, past)
        y = y.reshape(batch, frames, height, width, 2, channels).transpose(0, 1, 4, 2, 3, 5)
        return y.reshape(batch, 2 * frames, height, width, channels), past


def run(layers: Sequence[Any], x: Frames, states: State | None) -> tuple[Frames, State]:
    """Layers one after the other, each with its own state."""
    given = [None] * len(layers) if states is None else states
    kept = []
    for layer, state in zip(layers, given, strict=True):
        x, state = layer(x, state)
        kept.append(state)
    return x, tuple(kept)


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
        x, resnets = run(self.resnets, x, resnets)
        x, upsamplers = run(self.upsamplers, x, upsamplers)
        return x, (resnets, upsamplers)

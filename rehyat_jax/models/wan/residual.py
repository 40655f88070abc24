"""The levels of Wan2.2's autoencoder: residual blocks and a change of size, with a shortcut without parameters around.

Source: diffusers ``models/autoencoders/autoencoder_kl_wan.py`` (``WanResidualDownBlock``, ``WanResidualUpBlock``,
``AvgDown3D``, ``DupUp3D``); Wan-Video/Wan2.2 ``wan/modules/vae2_2.py``.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from rehyat_jax.models.wan.vae_layers import Downsample, Frames, ResidualBlock, State, Upsample, run


class DownGroup(nnx.Module):
    """Residual blocks, then a downsampling unless it is the last level; the shortcut is the mean of what a pixel of the
    result covers, over groups of channels.

    Args:
        blocks: how many.
        time: whether the frames are halved; None: nothing changes its size.
    """

    def __init__(self, in_features: int, out_features: int, *, blocks: int, time: bool | None, **kw: Any) -> None:
        widths = [in_features] + [out_features] * blocks
        self.resnets = nnx.List([ResidualBlock(a, b, **kw) for a, b in itertools.pairwise(widths)])
        self.downsampler = None if time is None else Downsample(out_features, time=time, **kw)
        self.features, self.time, self.space = out_features, 2 if time else 1, 1 if time is None else 2

    def __call__(self, x: Frames, state: State | None) -> tuple[Frames, State]:
        resnets, sampler = (None, None) if state is None else state
        # The very first frame is paired with zeros before it; whole pairs follow.
        padding = -x.shape[1] % self.time if state is None else 0
        padded = jnp.pad(x, ((0, 0), (padding, 0), *[(0, 0)] * 3))
        shortcut = averaged(padded, self.features, time=self.time, space=self.space)
        x, resnets = run(self.resnets, x, resnets)
        if self.downsampler is None:
            return x + shortcut, (resnets, ())
        x, sampler = self.downsampler(x, sampler)
        return x + shortcut, (resnets, sampler)


class UpGroup(nnx.Module):
    """Residual blocks, then an upsampling and a shortcut of repeated channels; the last level has neither.

    Args:
        blocks: how many.
        time: whether the frames are doubled; None: nothing changes its size.
    """

    def __init__(self, in_features: int, out_features: int, *, blocks: int, time: bool | None, **kw: Any) -> None:
        widths = [in_features] + [out_features] * blocks
        self.resnets = nnx.List([ResidualBlock(a, b, **kw) for a, b in itertools.pairwise(widths)])
        self.upsampler = None if time is None else Upsample(out_features, out_features, time=time, **kw)
        self.features, self.time = out_features, 2 if time else 1

    def __call__(self, x: Frames, state: State | None) -> tuple[Frames, State]:
        resnets, sampler = (None, None) if state is None else state
        given = x
        x, resnets = run(self.resnets, x, resnets)
        if self.upsampler is None:
            return x, (resnets, ())
        shortcut = repeated(given, self.features, time=self.time, space=2)
        if state is None:  # the very first frame is not doubled
            shortcut = shortcut[:, self.time - 1 :]
        x, sampler = self.upsampler(x, sampler)
        return x + shortcut, (resnets, sampler)


def averaged(x: Frames, features: int, *, time: int, space: int) -> Frames:
    """Time and space into channels (channel, frame, row, column), then the mean of each of ``features`` groups."""
    batch, frames, height, width, channels = x.shape
    x = x.reshape(batch, frames // time, time, height // space, space, width // space, space, channels)
    x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(*x.shape[:4], features, -1).mean(axis=-1)


def repeated(x: Frames, features: int, *, time: int, space: int) -> Frames:
    """The inverse's shape: each channel repeated until there are ``features`` for each frame, row and column."""
    batch, frames, height, width, channels = x.shape
    x = jnp.repeat(x, features * time * space**2 // channels, axis=-1)
    x = x.reshape(batch, frames, height, width, features, time, space, space).transpose(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(batch, frames * time, height * space, width * space, features)


def fold_pixels(x: Float[Array, "B F H W C"], patch: int) -> Float[Array, "B F h w D"]:
    """``patch`` x ``patch`` pixels into channels: colour, then column, then row."""
    batch, frames, height, width, channels = x.shape
    x = x.reshape(batch, frames, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 2, 4, 6, 5, 3).reshape(batch, frames, height // patch, width // patch, -1)


def unfold_pixels(x: Float[Array, "B F h w D"], patch: int) -> Float[Array, "B F H W C"]:
    """The inverse of `fold_pixels`."""
    batch, frames, height, width, channels = x.shape
    x = x.reshape(batch, frames, height, width, channels // patch**2, patch, patch)
    return x.transpose(0, 1, 2, 6, 3, 5, 4).reshape(batch, frames, height * patch, width * patch, -1)

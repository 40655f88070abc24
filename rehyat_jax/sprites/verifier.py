"""Which sprites are in a frame, and where: maximum likelihood, with nothing learnt.

The hypothesis "sprite s at corner p, over a flat ground g" explains a frame I better than "ground alone" by

    gain(s, p) = Σ |I - g|² - Σ |I - (S + (1 - α) g)|² = Σ 2 (I - g)·D - |D|²,    D = S - α g,

summed over the pixels under the sprite's box that nothing has claimed yet. The best (s, p) is taken, its pixels are
claimed, and so on, three times. Expanded in S, α and g the gain is a sum of nine correlations of the frame with fixed
kernels (the ground is a factor of each), so it is a product of spectra; a parabola through the neighbouring gains gives
the position between pixels.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from rehyat_jax.sprites.world import ATLAS, GROUND_COLOURS, SPRITE, pillar_columns

#: Detections looked for in each frame: two that may be right, and a third that never is.
DETECTIONS = 3
#: A detection explains at least this part of the sprite's own contrast Σ|D|² ...
MIN_SHARE = 0.2
#: ... and at least this much squared colour difference (a sprite's contrast is 13 to 720, half of the time above 150).
MIN_GAIN = 2.0


class Detections(NamedTuple):
    """What was seen, best first. Leading axes are those of the video."""

    #: Atlas number, or -1: nothing (more) found.
    objects: Int[Array, "*n 3"]
    #: Upper left corner (y, x), pixels.
    positions: Float[Array, "*n 3 2"]
    #: Squared colour difference explained, colours in 0..1.
    gains: Float[Array, "*n 3"]
    #: The ground: median colour, 0..1.
    grounds: Float[Array, "*n 3"]
    #: Mean squared colour difference from the ground over all pixels that no detection claims.
    residuals: Float[Array, "*n"]


@functools.partial(jax.jit, static_argnames=("pillar", "block"))
def detect(video: Shaped[Array, "B F H W 3"], *, pillar: bool = False, block: int = 64) -> Detections:
    """Find up to three sprites in every frame.

    Args:
        video: uint8, or float in -1..1; at least 24 by 24 pixels.
        pillar: leave out the columns that the occlusion scenes' pillar covers.
        block: frames that are worked on at once (about 4 MB each).
    """
    batch, num_frames = video.shape[:2]
    total = batch * num_frames
    block = min(block, total)
    frames = jnp.pad(video.reshape(total, *video.shape[2:]), ((0, -total % block), (0, 0), (0, 0), (0, 0)))
    frames = frames.reshape(-1, block, *video.shape[2:])
    found = jax.lax.map(functools.partial(_detect, pillar=pillar), frames)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:total].reshape(batch, num_frames, *a.shape[2:]), found)


def nearest_ground(colour: Float[Array, "*n 3"]) -> Int[Array, "*n"]:
    """Number of the named ground whose colour is nearest."""
    named = jnp.asarray(GROUND_COLOURS).reshape((1,) * (colour.ndim - 1) + (-1, 3))
    return jnp.argmin(jnp.sum((colour[..., None, :] - named) ** 2, axis=-1), axis=-1).astype(jnp.int32)


def _detect(frames: Shaped[Array, "n H W 3"], *, pillar: bool) -> Detections:
    height, width = frames.shape[1:3]
    floats = frames.astype(jnp.float32)
    image = floats / 255 if frames.dtype == jnp.uint8 else (floats + 1) / 2
    valid = ~pillar_columns(width) if pillar else np.ones(width, bool)
    ground = _median(image[:, :, np.flatnonzero(valid)].reshape(frames.shape[0], -1, 3))
    difference = image - ground[:, None, None, :]
    free = jnp.broadcast_to(jnp.asarray(valid)[None, None, :], frames.shape[:3])

    atlas = jnp.asarray(ATLAS)
    contrasts = jnp.sum((atlas[None, ..., :3] - atlas[None, ..., 3:] * ground[:, None, None, None, :]) ** 2, (2, 3, 4))
    found = []
    for _ in range(DETECTIONS):
        gains = _gains(difference, free, ground)
        sprite = jnp.argmax(jnp.max(gains, axis=(0, 1)), axis=1).astype(jnp.int32)
        # [n, Y, X]: the best sprite's gains at every corner.
        map_ = jnp.moveaxis(jnp.take_along_axis(gains, sprite[None, None, :, None], axis=3)[..., 0], 2, 0)
        y, x = jnp.unravel_index(jnp.argmax(map_.reshape(len(map_), -1), axis=1), map_.shape[1:])
        gain = jnp.max(map_, axis=(1, 2))
        contrast = jnp.take_along_axis(contrasts, sprite[:, None], axis=1)[:, 0]
        seen = (gain > MIN_GAIN) & (gain > MIN_SHARE * contrast)
        found.append((jnp.where(seen, sprite, -1), jax.vmap(_refine)(map_, y, x), gain))
        claim = jax.vmap(functools.partial(_claimed, height=height, width=width))(sprite, y, x)
        free = free & ~(seen[:, None, None] & claim)
    objects, positions, explained = (jnp.stack(part, axis=1) for part in zip(*found, strict=True))
    unclaimed = free.astype(jnp.float32)
    left = jnp.sum(difference**2 * unclaimed[..., None], axis=(1, 2, 3))
    return Detections(objects, positions, explained, ground, left / (3 * jnp.maximum(unclaimed.sum((1, 2)), 1)))


def _median(pixels: Float[Array, "n P 3"]) -> Float[Array, "n 3"]:
    """The median of values in 0..1 by bisection, to 2⁻²⁰: a sort takes a hundred times as long on a CPU."""

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        below = jnp.mean((pixels <= middle[:, None]).astype(jnp.float32), axis=1) >= 0.5
        return jnp.where(below, low, middle), jnp.where(below, middle, high)

    low = jnp.zeros_like(pixels[:, 0])
    return jax.lax.fori_loop(0, 20, halve, (low, jnp.ones_like(low)))[1]


def _gains(
    difference: Float[Array, "n H W 3"], free: Bool[Array, "n H W"], ground: Float[Array, "n 3"]
) -> Float[Array, "Y X n S"]:
    """gain(s, p) of every sprite at every whole-pixel corner.

    The spectra are multiplied in real arithmetic, and the inverse transform is two matrix products that compute the
    possible corners alone: three times as fast as complex products and FFTs on a CPU, and matrix units like it too.
    """
    height, width = free.shape[1:]
    kernels, inverse_y, inverse_x = _transforms(height, width)
    dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    mask = free.astype(jnp.float32)
    signals = jnp.concatenate([difference * mask[..., None], mask[..., None]], axis=-1)
    spectra = jnp.fft.rfft2(signals, axes=(1, 2))
    spectra = jnp.stack([spectra.real, spectra.imag])
    j, m = spectra[..., :3], spectra[..., 3:]
    g = ground[None, :, None, None, :]
    squared = jnp.sum(g**2, axis=-1, keepdims=True)
    # In the order of the kernels: 2 J·S - 2 (J·g) α - |S|² + 2 g·(α S) - |g|² α².
    parts = [2 * j, -2 * jnp.sum(g * j, axis=-1, keepdims=True), -m, 2 * g * m, -squared * m]
    inputs = jnp.concatenate(parts, axis=-1)
    inputs = jnp.concatenate([inputs[0], inputs[1]], axis=-1)
    product = dot("nhvk,hvkz->hvnz", inputs, jnp.asarray(kernels))

    rows = dot("yh,hvnz->yvnz", jnp.asarray(inverse_y), product).reshape(2, -1, *product.shape[1:3], 2, len(ATLAS))
    real = rows[0, ..., 0, :] - rows[1, ..., 1, :]
    imaginary = rows[1, ..., 0, :] + rows[0, ..., 1, :]
    return dot("xv,yvns->yxns", jnp.asarray(inverse_x), jnp.concatenate([real, imaginary], axis=1))


@functools.lru_cache
def _transforms(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The kernels' spectra as [h, v, 9 real + 9 imaginary in, 64 real + 64 imaginary out], and the inverse transforms
    of columns [cosines of Y corners, then sines; h] and rows [X corners; v cosines, then -sines]."""
    # S, α, |S|², α S, α²: everything that the gain correlates with. The conjugate makes a product of spectra a
    # correlation; it does not wrap, since a corner is at most size - 24.
    colour, alpha = ATLAS[..., :3], ATLAS[..., 3:]
    kernels = np.concatenate([colour, alpha, (colour**2).sum(-1, keepdims=True), alpha * colour, alpha**2], axis=-1)
    spectra = np.conj(np.fft.rfft2(kernels, s=(height, width), axes=(1, 2))).transpose(1, 2, 3, 0)
    real, imaginary = spectra.real, spectra.imag
    product = np.concatenate([np.concatenate([real, imaginary], -1), np.concatenate([-imaginary, real], -1)], axis=2)
    down = np.outer(np.arange(height - SPRITE + 1), np.arange(height)) * (2 * np.pi / height)
    across = np.outer(np.arange(width - SPRITE + 1), np.arange(width // 2 + 1)) * (2 * np.pi / width)
    # A real signal's spectrum is stored by half: all frequencies but zero and the highest count twice.
    twice = np.where((np.arange(width // 2 + 1) % ((width + 1) // 2)) == 0, 1, 2) / width
    inverse_y = np.concatenate([np.cos(down), np.sin(down)]) / height
    inverse_x = np.concatenate([np.cos(across) * twice, -np.sin(across) * twice], axis=1)
    return product.astype(np.float32), inverse_y.astype(np.float32), inverse_x.astype(np.float32)


@functools.lru_cache
def _claims() -> np.ndarray:
    """[64, 26, 26]: the pixels that a sprite claims, one more on each side than its outline: it may lie between
    pixels."""
    outline = np.pad(ATLAS[..., 3] > 0.05, ((0, 0), (2, 2), (2, 2)))
    grown = [outline[:, y : y + SPRITE + 2, x : x + SPRITE + 2] for y in range(3) for x in range(3)]
    return np.any(grown, axis=0)


def _refine(gains: Float[Array, "Y X"], y: Int[Array, ""], x: Int[Array, ""]) -> Float[Array, " 2"]:
    """The top of the parabolas through the best gain and its neighbours, at most half a pixel away; none at the
    frame's edge."""

    def along(line: Float[Array, " n"], at: Int[Array, ""]) -> Float[Array, ""]:
        inner = (at > 0) & (at < line.shape[0] - 1)
        before, here, after = line[jnp.maximum(at - 1, 0)], line[at], line[jnp.minimum(at + 1, line.shape[0] - 1)]
        bend = before - 2 * here + after
        shift = jnp.where(bend < 0, 0.5 * (before - after) / jnp.where(bend < 0, bend, 1), 0)
        return at.astype(jnp.float32) + jnp.where(inner, jnp.clip(shift, -0.5, 0.5), 0)

    return jnp.stack([along(gains[:, x], y), along(gains[y], x)])


def _claimed(
    sprite: Int[Array, ""], y: Int[Array, ""], x: Int[Array, ""], *, height: int, width: int
) -> Bool[Array, "H W"]:
    offsets = jnp.arange(SPRITE + 2) - 1
    rows = jnp.arange(height)[:, None] == (offsets + y)[None, :]
    columns = jnp.arange(width)[:, None] == (offsets + x)[None, :]
    claim = jnp.asarray(_claims())[sprite].astype(jnp.float32)
    return (rows.astype(jnp.float32) @ claim @ columns.astype(jnp.float32).T) > 0.5

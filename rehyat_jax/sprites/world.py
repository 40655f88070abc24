"""MovingSprites: one or two small pictures that move on a plain ground and bounce off the frame's edges.

Everything is closed form. Positions and velocities are whole numbers of 1/1024 pixel, and the bounce is a remainder
in int32, so the truth at frame 1,000,000 costs what frame 1 costs and is just as exact. Sampling and rendering run
inside jit.

Directions are numbered 0 to 7: right, down and right, down, down and left, left, up and left, up, up and right.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

#: Side of a sprite, pixels.
SPRITE = 24
#: Size of a frame, pixels; the occlusion scenes are wider.
HEIGHT, WIDTH, OCCLUSION_WIDTH = 64, 64, 96
FRAMES_PER_SECOND = 16
#: Positions and velocities are counted in this fraction of a pixel.
UNITS = 1024

DIRECTIONS = ("right", "down and right", "down", "down and left", "left", "up and left", "up", "up and right")
SPEEDS = {"slowly": 0.5, "quickly": 1.5}
GROUNDS = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "grey": (184, 184, 184),
    "blue": (40, 80, 190),
    "green": (30, 120, 60),
    "red": (150, 25, 35),
    "yellow": (250, 225, 110),
    "purple": (110, 50, 140),
}

#: The pillar of the occlusion scenes, in the middle of the frame: its width in pixels, its colour (a grey that is no
#: ground).
PILLAR = 36
PILLAR_COLOUR = (84, 84, 84)
#: Occlusion: the object first rests for this many frames, at most ``OCCLUSION_MARGIN`` pixels from the edge.
OCCLUSION_REST, OCCLUSION_MARGIN = 10, 3
#: Occlusion: a clip long enough to judge shows the object whole again for at least this many frames.
OCCLUSION_SEEN_AGAIN = 5


def _velocities() -> np.ndarray:
    """[direction, speed, (y, x)] in units a frame. A diagonal keeps the speed along its direction: each axis gets
    speed/√2, rounded to 1/1024 pixel (the speed is off by less than 0.2 %)."""
    angles = np.arange(8) * (np.pi / 4)
    unit = np.stack([np.sin(angles), np.cos(angles)], axis=-1)  # y points down, so angles run clockwise.
    speeds = np.array(list(SPEEDS.values()))
    return np.round(unit[:, None, :] * speeds[None, :, None] * UNITS).astype(np.int32)


VELOCITIES = _velocities()

_ATLAS = np.load(Path(__file__).with_name("atlas24.npz"))
#: Names of the 64 objects, in atlas order.
NAMES: tuple[str, ...] = tuple(str(name) for name in _ATLAS["names"])
#: Sprites [64, 24, 24, 4] in 0..1, colour premultiplied by alpha.
ATLAS: np.ndarray = _ATLAS["rgba"].astype(np.float32) / 255
GROUND_COLOURS: np.ndarray = np.array(list(GROUNDS.values()), np.float32) / 255
#: [object, direction]: the pairs held out from all training.
HELD_OUT: np.ndarray = (7 * np.arange(len(NAMES))[:, None] + 3 * np.arange(8)[None, :]) % 10 == 0


class Scenes(NamedTuple):
    """A batch of moving scenes. The second object is in front of the first; it is not drawn, and zero, where counts
    is 1."""

    counts: Int[Array, " B"]
    objects: Int[Array, "B 2"]
    directions: Int[Array, "B 2"]
    #: 0 slowly, 1 quickly.
    speeds: Int[Array, "B 2"]
    #: Upper left corner (y, x) at frame 0, in 1/1024 pixel.
    starts: Int[Array, "B 2 2"]
    grounds: Int[Array, " B"]


class Occlusions(NamedTuple):
    """A batch of scenes in which one object passes behind the pillar.

    It rests ``OCCLUSION_REST`` frames near its edge, moves towards the middle at 1 pixel a frame, waits ``waits``
    frames behind the pillar's centre, moves on at 1 pixel a frame, and rests for good where it mirrors its start. The
    way behind the pillar is 36 - 24 = 12 pixels long, so it is out of sight for 12 + ``waits`` frames (a start on the
    pixel grid: 13).
    """

    objects: Int[Array, " B"]
    #: 0 enters from the left, 1 from the right.
    sides: Int[Array, " B"]
    waits: Int[Array, " B"]
    #: Upper left corner's y, and its distance from the edge at which it enters, in 1/1024 pixel.
    starts: Int[Array, "B 2"]
    grounds: Int[Array, " B"]


def is_reserved(scenes: Scenes) -> Bool[Array, " B"]:
    """Whether the caption is kept for testing (split "unseen").

    For given objects and directions, exactly one choice of ground and speeds is kept: 1 caption in 32 of those with two
    objects, 1 in 16 of those with one. Which one follows from a hash, so no list is needed.
    """
    return _caption_code(scenes) == _reserved_code(scenes)


def sample_scenes(
    key: Key[Array, ""],
    batch: int,
    *,
    split: Literal["train", "heldout", "unseen"] = "train",
    height: int = HEIGHT,
    width: int = WIDTH,
    pairs: float = 0.5,
) -> Scenes:
    """Draw a batch of moving scenes, of which the share ``pairs``, at least a half, has two objects and the rest one.
    All but the key is static under jit.

    "train": no held-out pair and no reserved caption. "unseen": reserved captions, still without held-out pairs.
    "heldout": at least one of the objects, chosen at random, forms a held-out pair; the other is free (and so is the
    caption). Each start is uniform over the frame; two objects start in different quadrants.
    """
    keys = iter(jax.random.split(key, 12))
    held_out = jnp.asarray(HELD_OUT)
    first = jax.random.randint(next(keys), (batch,), 0, len(NAMES))
    count = jax.random.randint(next(keys), (batch,), 1, 3)
    kept = jax.random.bernoulli(jax.random.fold_in(key, 0), 2 * (1 - pairs), (batch,))
    count = jnp.where(kept, count, 2)
    if split == "heldout":
        first = _categorical(next(keys), jnp.broadcast_to(held_out.any(axis=1), (batch, len(NAMES))))
    second = (first + jax.random.randint(next(keys), (batch,), 1, len(NAMES))) % len(NAMES)
    objects = jnp.stack([first, second], axis=-1)
    if split == "heldout":
        free = jax.random.randint(next(keys), (batch,), 0, 8)
        directions = jnp.stack([_categorical(next(keys), held_out[first]), free], axis=-1)
        # The held-out object came first so far; in half of the scenes with two objects it becomes the one in front.
        swap = (count == 2) & jax.random.bernoulli(next(keys), shape=(batch,))
        objects = jnp.where(swap[:, None], objects[:, ::-1], objects)
        directions = jnp.where(swap[:, None], directions[:, ::-1], directions)
    else:
        directions = _categorical(next(keys), ~held_out[objects])
    speeds = jax.random.randint(next(keys), (batch, 2), 0, 2)
    grounds = jax.random.randint(next(keys), (batch,), 0, len(GROUNDS))

    # Start: uniform inside a quadrant of the free area, quadrants distinct.
    quadrant = jax.random.randint(next(keys), (batch,), 0, 4)
    other = (quadrant + jax.random.randint(next(keys), (batch,), 1, 4)) % 4
    quadrants = jnp.stack([quadrant, other], axis=-1)
    half = jnp.array([height - SPRITE, width - SPRITE]) * (UNITS // 2)
    corner = jnp.stack([quadrants // 2, quadrants % 2], axis=-1) * half[None, None, :]
    starts = corner + jax.random.randint(next(keys), (batch, 2, 2), 0, half[None, None, :] + 1)

    scenes = Scenes(count, objects, directions, speeds, starts, grounds)
    scenes = _blank(scenes)
    # Exactly one code is reserved per choice of objects and directions, so one step to the side always leaves it.
    if split == "train":
        code = _caption_code(scenes)
        scenes = _with_code(scenes, jnp.where(is_reserved(scenes), (code + 1) % _codes(scenes), code))
    elif split == "unseen":
        scenes = _with_code(scenes, _reserved_code(scenes))
    return scenes


def sample_occlusions(key: Key[Array, ""], batch: int, *, waits: tuple[int, int] = (0, 48)) -> Occlusions:
    """Draw a batch of occlusion scenes, ``waits`` uniform between both bounds (included). Held-out pairs do not
    occur: an object whose movement to the right (left) is held out never enters from the left (right)."""
    keys = jax.random.split(key, 5)
    objects = jax.random.randint(keys[0], (batch,), 0, len(NAMES))
    sides = _categorical(keys[1], ~jnp.asarray(HELD_OUT[:, [0, 4]])[objects])
    limits = jnp.array([HEIGHT - SPRITE, OCCLUSION_MARGIN]) * UNITS
    starts = jax.random.randint(keys[2], (batch, 2), 0, limits[None, :] + 1)
    grounds = jax.random.randint(keys[3], (batch,), 0, len(GROUNDS))
    return Occlusions(objects, sides, jax.random.randint(keys[4], (batch,), waits[0], waits[1] + 1), starts, grounds)


def occlusion_frames(wait: int) -> int:
    """Frames (4k + 1) of a clip that shows the object whole again for at least 5 frames: 81 for wait 0, 129 for 48."""
    clear_again = OCCLUSION_REST + (OCCLUSION_WIDTH + PILLAR) // 2 + wait
    return -(-(clear_again + OCCLUSION_SEEN_AGAIN - 1) // 4) * 4 + 1


def fold(path: Int[Array, "*n"], span: Int[Array, "*n"]) -> Int[Array, "*n"]:
    """Elastic bounce between 0 and ``span``: the triangle wave of period 2·span. Any integer unit."""
    rest = path % (2 * span)
    return jnp.minimum(rest, 2 * span - rest)


def positions(
    scenes: Scenes | Occlusions,
    *,
    num_frames: int,
    height: int = HEIGHT,
    width: int | None = None,
    first_frame: int | Int[Array, " ..."] = 0,
) -> Float[Array, "B F N 2"]:
    """Upper left corners (y, x) in pixels, from ``first_frame`` (one number, or one for each scene) on. N, the number
    of objects, is 2, drawn or not, and 1 for occlusions."""
    batch = scenes.grounds.shape[0]
    frame = jnp.reshape(jnp.asarray(first_frame, jnp.int32), (-1, 1)) + jnp.arange(num_frames, dtype=jnp.int32)[None, :]
    frame = jnp.broadcast_to(frame, (batch, num_frames))
    width = _width(scenes, width)
    if isinstance(scenes, Occlusions):
        edge, middle = scenes.starts[:, 1, None], (width - SPRITE) * UNITS // 2
        moved = (frame - OCCLUSION_REST) * UNITS
        inward = jnp.clip(edge + moved, edge, middle)
        # A start off the pixel grid reaches the centre between two frames; the wait is counted from that instant.
        outward = jnp.clip(moved - (middle - edge) - scenes.waits[:, None] * UNITS, 0, middle - edge)
        x = inward + outward
        x = jnp.where(scenes.sides[:, None] == 0, x, 2 * middle - x)
        y = jnp.broadcast_to(scenes.starts[:, 0, None], x.shape)
        return jnp.stack([y, x], axis=-1)[:, :, None].astype(jnp.float32) / UNITS
    velocity = jnp.asarray(VELOCITIES)[scenes.directions, scenes.speeds][:, None]
    span = jnp.array([height - SPRITE, width - SPRITE], jnp.int32) * UNITS
    # velocity · frame may exceed int32, but after 2·span frames a whole number of periods has passed in any velocity.
    frame = frame[:, :, None, None] % (2 * span)[None, None, None, :]
    span = jnp.broadcast_to(span, (batch, num_frames, 2, 2))
    return fold(scenes.starts[:, None] + velocity * frame, span).astype(jnp.float32) / UNITS


def seen_again(scenes: Occlusions, *, num_frames: int) -> Bool[Array, "B F"]:
    """The frames in which some of the object shows on the other side of the pillar."""
    x = positions(scenes, num_frames=num_frames)[:, :, 0, 1]
    out = jnp.where(scenes.sides[:, None] == 0, x + SPRITE, OCCLUSION_WIDTH - x)
    return out > (OCCLUSION_WIDTH + PILLAR) / 2


def hidden(scenes: Occlusions, *, num_frames: int) -> Bool[Array, "B F"]:
    """The frames in which nothing of the object shows."""
    x = positions(scenes, num_frames=num_frames)[:, :, 0, 1]
    return (x >= (OCCLUSION_WIDTH - PILLAR) / 2) & (x + SPRITE <= (OCCLUSION_WIDTH + PILLAR) / 2)


def render(
    scenes: Scenes | Occlusions,
    *,
    num_frames: int,
    height: int = HEIGHT,
    width: int | None = None,
    first_frame: int | Int[Array, " ..."] = 0,
) -> Float[Array, "B F H W 3"]:
    """The clip, -1..1. The width is 64 by default, and 96 for occlusions; sizes and ``num_frames`` are static under
    jit.

    A sprite S is placed between pixels as R S Cᵀ, with the bilinear weights R and C of its two coordinates; colour is
    premultiplied, so the layer goes over the ground as layer + (1 - alpha) · ground.
    """
    width = _width(scenes, width)
    corner = positions(scenes, num_frames=num_frames, height=height, width=width, first_frame=first_frame)
    rows = _bilinear(corner[..., 0], height)
    columns = _bilinear(corner[..., 1], width)
    if isinstance(scenes, Occlusions):
        sprites = jnp.asarray(ATLAS)[scenes.objects][:, None]
    else:
        drawn = _drawn(scenes).astype(jnp.float32)
        sprites = jnp.asarray(ATLAS)[scenes.objects] * drawn[:, :, None, None, None]
    ground = jnp.asarray(GROUND_COLOURS)[scenes.grounds]
    batch = ground.shape[0]
    video = jnp.broadcast_to(ground[:, None, None, None, :], (batch, num_frames, height, width, 3))
    # Full float32 on every backend: the default of a GPU would round the truth to ten bits.
    einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    for n in range(sprites.shape[1]):
        # Rows of all frames in one product a scene, then columns frame by frame, colour last but one (faster than
        # last).
        layer = einsum("bfhi,bijc->bfhjc", rows[:, :, n], sprites[:, n])
        layer = einsum("bfwj,bfhjc->bfhcw", columns[:, :, n], layer)
        video = jnp.moveaxis(layer[..., :3, :], -2, -1) + (1 - layer[..., 3, :, None]) * video
    if isinstance(scenes, Occlusions):
        pillar = jnp.asarray(pillar_columns(width))[None, None, None, :, None]
        video = jnp.where(pillar, jnp.array(PILLAR_COLOUR, jnp.float32) / 255, video)
    return video * 2 - 1


def pillar_columns(width: int = OCCLUSION_WIDTH) -> np.ndarray:
    """[width] bool: the columns that the pillar covers."""
    return np.abs(np.arange(width) + 0.5 - width / 2) < PILLAR / 2


def _width(scenes: Scenes | Occlusions, width: int | None) -> int:
    return width or (OCCLUSION_WIDTH if isinstance(scenes, Occlusions) else WIDTH)


def _bilinear(corner: Float[Array, "*n"], size: int) -> Float[Array, "*n size 24"]:
    """Weights [..., pixel, sprite row] that place a sprite's 24 rows at a real-valued corner."""
    offset = jnp.arange(size)[:, None] - jnp.arange(SPRITE)[None, :]
    shape = (1,) * corner.ndim + offset.shape
    return jnp.maximum(0, 1 - jnp.abs(offset.astype(jnp.float32).reshape(shape) - corner[..., None, None]))


def _categorical(key: Key[Array, ""], allowed: Bool[Array, "*n k"]) -> Int[Array, "*n"]:
    """A uniform choice among the allowed entries of the last axis."""
    return jax.random.categorical(key, jnp.where(allowed, 0.0, -jnp.inf)).astype(jnp.int32)


def _drawn(scenes: Scenes) -> Bool[Array, "B 2"]:
    return jnp.arange(2)[None, :] < scenes.counts[:, None]


def _blank(scenes: Scenes) -> Scenes:
    """Zero for whatever is not drawn, so that equal scenes are equal arrays."""
    drawn = _drawn(scenes)
    zeroed = {name: jnp.where(drawn, getattr(scenes, name), 0) for name in ("objects", "directions", "speeds")}
    return scenes._replace(starts=jnp.where(drawn[:, :, None], scenes.starts, 0), **zeroed)


def _caption_code(scenes: Scenes) -> Int[Array, " B"]:
    """Ground and speeds as one number: 0..15 with one object, 0..31 with two."""
    return scenes.grounds + 8 * scenes.speeds[:, 0] + 16 * scenes.speeds[:, 1]


def _codes(scenes: Scenes) -> Int[Array, " B"]:
    return 16 * scenes.counts


def _with_code(scenes: Scenes, code: Int[Array, " B"]) -> Scenes:
    return scenes._replace(grounds=code % 8, speeds=jnp.stack([code // 8 % 2, code // 16], axis=-1))


def _reserved_code(scenes: Scenes) -> Int[Array, " B"]:
    """The one code kept for testing, a hash of objects and directions (MurmurHash3's finaliser)."""
    pair = (scenes.objects * 8 + scenes.directions).astype(jnp.uint32)
    mixed = pair[:, 0] + 512 * pair[:, 1] + 262144 * scenes.counts.astype(jnp.uint32)
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(factor)
    mixed = mixed ^ (mixed >> 16)
    return (mixed % _codes(scenes).astype(jnp.uint32)).astype(jnp.int32)

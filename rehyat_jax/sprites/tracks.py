"""How objects moved: the folded path start + velocity · t, reflected between 0 and span, fitted to what was seen.

The two axes of a bounce are independent, so every fit is a search over (start, velocity) of one axis, coarse to fine,
by a loss that outliers cannot pull: the mean over the frames seen of min(|seen - path|, 3 pixels). Nothing here knows
what a caption asked for, except where a function is told.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

#: Frames of a fit.
WINDOW = 16
#: With fewer frames seen, a window has no fit.
MIN_SEEN = 6
_OUTLIER = 3.0


class Fit(NamedTuple):
    """A fitted path for each track; axes y, x."""

    starts: Float[Array, "*n 2"]
    velocities: Float[Array, "*n 2"]
    #: Frames enough?
    known: Bool[Array, "*n"]


@jax.jit
def fit_free(seen_at: Float[Array, "*n W 2"], seen: Bool[Array, "*n W"], span: Float[Array, " 2"]) -> Fit:
    """Start and velocity (up to 2 pixels a frame on each axis) of each track, frame 0 being the window's first."""

    def axis(observed: Float[Array, " W"], seen: Bool[Array, " W"], span: Float[Array, ""]) -> tuple[Array, Array]:
        start, velocity = _best(
            observed, seen, span, jnp.linspace(0, 1, 41) * span, jnp.linspace(-2, 2, 65, dtype=jnp.float32)
        )
        fine = jnp.linspace(-1, 1, 9)
        for width in (1.0, 1 / 4, 1 / 16):  # Each round searches one step of the last on either side.
            starts, velocities = start + fine * width * span / 40, velocity + fine * width / 16
            start, velocity = _best(observed, seen, span, jnp.clip(starts, 0, span), velocities)
        return start, velocity

    start, velocity = _over_tracks(axis, seen_at, seen, span)
    return Fit(start, velocity, jnp.sum(seen, axis=-1) >= MIN_SEEN)


@jax.jit
def fit_start(
    seen_at: Float[Array, "*n W 2"], seen: Bool[Array, "*n W"], velocity: Float[Array, "*n 2"], span: Float[Array, " 2"]
) -> Float[Array, "*n 2"]:
    """The start alone, to 1/32 pixel in a span of 40, the velocity being given."""

    def axis(observed: Array, seen: Array, span: Array, velocity: Array) -> tuple[Array, Array]:
        return _best(observed, seen, span, jnp.linspace(0, 1, 1281) * span, velocity[None])

    return _over_tracks(axis, seen_at, seen, span, velocity)[0]


@jax.jit
def direction_losses(
    seen_at: Float[Array, "*n W 2"], seen: Bool[Array, "*n W"], span: Float[Array, " 2"]
) -> Float[Array, "*n 9"]:
    """For each of the eight directions, the loss in pixels (of both axes together) of the best path that starts that
    way at any speed from 0.25 to 2.5 pixels a frame; and, last, the loss of standing still."""
    speeds = jnp.linspace(0.25, 2.5, 37)
    cosines = jnp.array([-1, -np.sqrt(0.5), 0, np.sqrt(0.5), 1], jnp.float32)

    def axis(observed: Array, seen: Array, span: Array) -> tuple[Array, Array]:
        velocities = (cosines[:, None] * speeds[None, :]).reshape(-1)
        losses = _losses(observed, seen, span, jnp.linspace(0, 1, 81) * span, velocities)
        return jnp.min(losses, axis=0).reshape(5, -1), jnp.zeros(())

    y, x = jnp.moveaxis(_over_tracks(axis, seen_at, seen, span)[0], -3, 0)  # each [..., cosine, speed]
    diagonal = np.round(np.sin(np.arange(8) * np.pi / 4), 3)  # Which cosine each direction has, on y and on x.
    down = np.searchsorted([-0.9, -0.1, 0.1, 0.9], diagonal)
    right = np.roll(down, -2)
    moving = jnp.min(y[..., down, :] + x[..., right, :], axis=-1)
    return jnp.concatenate([moving, (y[..., 2, :1] + x[..., 2, :1])], axis=-1)


def path(starts: np.ndarray, velocities: np.ndarray, frames: np.ndarray, span: np.ndarray) -> np.ndarray:
    """start + velocity · frame, folded, in float64. Shapes broadcast; the last axis is y, x."""
    rest = np.mod(starts + velocities * np.asarray(frames, np.float64)[..., None], 2 * span)
    return np.minimum(rest, 2 * span - rest)


def _losses(
    observed: Float[Array, " W"],
    seen: Bool[Array, " W"],
    span: Float[Array, ""],
    starts: Float[Array, " P"],
    velocities: Float[Array, " V"],
) -> Float[Array, "P V"]:
    time = jnp.arange(observed.shape[0], dtype=jnp.float32)
    rest = (starts[:, None, None] + velocities[None, :, None] * time[None, None, :]) % (2 * span)
    off = jnp.minimum(jnp.abs(jnp.minimum(rest, 2 * span - rest) - observed[None, None, :]), _OUTLIER)
    weight = seen.astype(jnp.float32)
    return jnp.sum(off * weight[None, None, :], axis=-1) / jnp.maximum(jnp.sum(weight), 1)


def _best(observed: Array, seen: Array, span: Array, starts: Array, velocities: Array) -> tuple[Array, Array]:
    losses = _losses(observed, seen, span, starts, velocities)
    p, v = jnp.unravel_index(jnp.argmin(losses), losses.shape)
    return starts[p], velocities[v]


def _over_tracks(axis, seen_at: Array, seen: Array, span: Array, *more: Array) -> tuple[Array, Array]:
    """Apply a fit of one axis to both axes of all tracks, some at a time."""
    lead, window = seen.shape[:-1], seen.shape[-1]
    both = jax.vmap(axis, in_axes=(1, None, 0) + (0,) * len(more))
    tracks = (seen_at.reshape(-1, window, 2), seen.reshape(-1, window))
    extra = tuple(m.reshape(-1, 2) for m in more)
    found = jax.lax.map(lambda t: both(t[0], t[1], span, *t[2:]), tracks + extra, batch_size=64)
    return jax.tree.map(lambda a: a.reshape(*lead, *a.shape[1:]), found)

"""The verifier's figures of each clip, inside jit: what `rehyat_jax.sprites.report` says of many, to train by.

As there an object is recalled in a frame when it is among the best detections, as many as the caption has objects; but
in every frame, not in clear ones alone, and the speed is looked at in whole windows of 16 frames.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from rehyat_jax.sprites import tracks
from rehyat_jax.sprites.verifier import detect, nearest_ground
from rehyat_jax.sprites.world import OCCLUSION_SEEN_AGAIN, SPRITE, UNITS, VELOCITIES, Occlusions, Scenes


class Figures(NamedTuple):
    """Of each clip, 0 to 1."""

    #: Of the caption's objects and the frames: recalled. With a pillar of the last frames, by which it has come out.
    recall: Float[Array, " B"]
    #: Of the frames: with more detections than objects.
    extra: Float[Array, " B"]
    #: Of the frames: with the caption's ground.
    ground: Float[Array, " B"]
    #: Of the objects and windows in which one was seen often enough: its speed within a tenth of the caption's. 1 where
    #: none was, and for occlusions, whose objects rest and wait.
    speed: Float[Array, " B"]


def figures(video: Shaped[Array, "B F H W 3"], scenes: Scenes | Occlusions) -> Figures:
    """
    Args:
        video: float in -1..1, or uint8.
        scenes: what the captions say; start positions, waits and sides are not looked at.
    """
    hidden = isinstance(scenes, Occlusions)
    found = detect(video, pillar=hidden)
    wanted = scenes.objects[:, None] if isinstance(scenes, Occlusions) else scenes.objects  # [B, N]
    counts = jnp.ones(len(wanted), jnp.int32) if isinstance(scenes, Occlusions) else scenes.counts
    drawn = jnp.arange(wanted.shape[1], dtype=jnp.int32)[None] < counts[:, None]
    match = found.objects[:, :, None, :] == wanted[:, None, :, None]  # [B, F, N, 3]
    among = jnp.arange(match.shape[-1], dtype=jnp.int32)[None] < counts[:, None]
    hits = (match & among[:, None, None, :]).any(-1) & drawn[:, None]
    if hidden:
        hits = hits[:, -OCCLUSION_SEEN_AGAIN:]
    recall = jnp.sum(hits, axis=(1, 2)) / (counts * hits.shape[1])
    extra = jnp.mean(((found.objects >= 0).sum(-1) > counts[:, None]).astype(jnp.float32), axis=1)
    ground = jnp.mean((nearest_ground(found.grounds) == scenes.grounds[:, None]).astype(jnp.float32), axis=1)
    speed = jnp.ones_like(ground) if isinstance(scenes, Occlusions) else _speed(found.positions, match, scenes, video)
    return Figures(recall.astype(jnp.float32), extra, ground, speed)


def _speed(positions: Array, match: Array, scenes: Scenes, video: Array) -> Float[Array, " B"]:
    window = min(tracks.WINDOW, video.shape[1])
    whole = video.shape[1] // window * window
    place = jnp.argmax(match, axis=-1)[..., None, None]
    seen_at = jnp.take_along_axis(positions[:, :, None], place, axis=3)[..., 0, :]  # [B, F, N, 2]

    def windows(x: Array) -> Array:
        """[B, N, windows, frames of one, …]"""
        return jnp.moveaxis(x[:, :whole].reshape(x.shape[0], -1, window, *x.shape[2:]), 3, 1)

    drawn = (jnp.arange(2, dtype=jnp.int32)[None] < scenes.counts[:, None])[:, None]
    seen = windows(match.any(-1) & drawn)
    span = jnp.asarray([side - SPRITE for side in video.shape[2:4]], jnp.float32)
    fit = tracks.fit_free(windows(seen_at), seen, span)
    asked = jnp.asarray(VELOCITIES / UNITS, jnp.float32)[scenes.directions, scenes.speeds]
    ratio = jnp.linalg.norm(fit.velocities, axis=-1) / jnp.linalg.norm(asked, axis=-1)[..., None]
    right = (jnp.abs(ratio - 1) <= 0.1) & fit.known
    known = jnp.sum(fit.known, axis=(1, 2))
    return jnp.where(known > 0, jnp.sum(right, axis=(1, 2)) / jnp.maximum(known, 1), 1.0).astype(jnp.float32)

"""Does what comes out from behind the pillar equal what went in? Judged from the verifier's detections alone.

The caption names no object and no side, so neither is assumed: the entry side is where the object was seen first; its
name before is the vote, weighted by gain, of the frames on that side up to the first sight on the other; its name
after, that of the other side. Frames in which more than a quarter of the box is behind the pillar do not vote.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from rehyat_jax.sprites.verifier import Detections, detect, nearest_ground
from rehyat_jax.sprites.world import (
    NAMES,
    OCCLUSION_REST,
    OCCLUSION_WIDTH,
    PILLAR,
    SPRITE,
    UNITS,
    Occlusions,
    render,
)

#: Frames that must vote on a side for a name to count.
MIN_VOTES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class OcclusionReport:
    """Shares of clips, 0..1."""

    clips: int
    #: An object was seen before the pillar; of those: one came out on the other side; the same one came out.
    entered: float
    emerged: float
    recall: float
    #: The scene's own object came out (of all clips): the same as recall only where clips continue true ones.
    recall_of_scene: float
    #: Frames between the last vote before and the first after, mean over the clips where one came out (a true clip:
    #: 48 + wait).
    hidden: float
    grounds: float


def report_occlusions(
    video: Shaped[Array, "B F H W 3"] | Shaped[np.ndarray, "B F H W 3"], scenes: Occlusions
) -> OcclusionReport:
    """Judge occlusion clips (uint8, or float in -1..1) that are long enough for their wait: see
    ``world.occlusion_frames``."""
    return judged(detect(jnp.asarray(video), pillar=True), scenes, width=video.shape[3])


def judged(found: Detections, scenes: Occlusions, *, width: int) -> OcclusionReport:
    """The report from what was detected (with ``pillar``) in frames ``width`` pixels wide."""
    best, gain, x = (np.asarray(a) for a in (found.objects[..., 0], found.gains[..., 0], found.positions[..., 0, 1]))
    left_edge, right_edge = (width - PILLAR) / 2, (width + PILLAR) / 2
    left, right = x + 0.75 * SPRITE <= left_edge, x + 0.25 * SPRITE >= right_edge
    votes = (best >= 0) & (left | right)

    before, after, hidden = [], [], []
    for b in range(len(best)):
        frames = np.flatnonzero(votes[b])
        side = right[b, frames[:1]].any()
        other = frames[right[b, frames] != side]
        first_again = other[0] if other.size else len(best[b])
        entry = frames[frames < first_again]
        before.append(_vote(best[b, entry], gain[b, entry]))
        after.append(_vote(best[b, other], gain[b, other]))
        if other.size:
            hidden.append(first_again - entry[-1] - 1)
    first, last = np.array(before), np.array(after)
    entered = first >= 0
    ground_right = np.asarray(nearest_ground(found.grounds)) == np.asarray(scenes.grounds)[:, None]
    return OcclusionReport(
        clips=len(best),
        entered=float(entered.mean()),
        emerged=float((last[entered] >= 0).mean()) if entered.any() else math.nan,
        recall=float((last[entered] == first[entered]).mean()) if entered.any() else math.nan,
        recall_of_scene=float((last == np.asarray(scenes.objects)).mean()),
        hidden=float(np.mean(hidden)) if hidden else math.nan,
        grounds=float(ground_right.mean()),
    )


def swapped_occlusions(scenes: Occlusions, *, num_frames: int) -> Float[Array, "B F H W 3"]:
    """A control: from the middle of its wait on, the object is another one. All comes out, nothing is recalled."""
    others = scenes._replace(objects=(scenes.objects + 31) % len(NAMES))
    way = (OCCLUSION_WIDTH - SPRITE) / 2 - scenes.starts[:, 1].astype(jnp.float32) / UNITS
    middle = OCCLUSION_REST + way + scenes.waits.astype(jnp.float32) / 2
    late = jnp.arange(num_frames, dtype=jnp.float32)[None, :] >= middle[:, None]
    return jnp.where(
        late[:, :, None, None, None], render(others, num_frames=num_frames), render(scenes, num_frames=num_frames)
    )


def _vote(names: np.ndarray, weights: np.ndarray) -> int:
    """The name with the greatest total gain, or -1 if too few frames vote."""
    if len(names) < MIN_VOTES:
        return -1
    return int(np.bincount(names, weights=weights, minlength=len(NAMES)).argmax())

"""The measures of a batch of clips, from the verifier's detections alone.

A caption fixes objects, directions, speeds and ground, but not where objects start; so paths are fitted to what was
seen, and only then compared with the caption.

Recall: an object is recalled in a frame when it is one of the ``count`` best detections there.

Clear: the two objects' boxes overlap by at most a quarter, judged by the paths fitted in that window of 16 frames.
Where an object was not seen often enough for a fit, the nearest window that has one is continued (an earlier one if
any). An object never seen leaves its frames clear, so that what is lost counts as lost.

Direction: right when a path that starts that way explains the first 16 frames, to a quarter of a pixel, as well as any
direction and as standing still do (a bounce within the first frame hides the way an object came). Not judged where the
objects overlap for so much of these frames that nothing could be fitted.

Speed: that of a free fit in each window, over the caption's.

Trajectory error: the start fitted on the first 16 frames, the velocity the caption's; distance from there to what was
seen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped
from rich.table import Table

from rehyat_jax.sprites import tracks
from rehyat_jax.sprites.verifier import Detections, detect, nearest_ground
from rehyat_jax.sprites.world import SPRITE, UNITS, VELOCITIES, Scenes, render

#: Overlap of the two boxes, as a part of one, up to which a frame is clear.
CLEAR_OVERLAP = 0.25
#: Pixels by which the caption's direction may explain a path worse than the best direction.
DIRECTION_SLACK = 0.25
#: Share of its clear frames in which an object must be recalled for the caption to count as met.
RECALLED = 0.8
#: Between the two speeds of captions (0.5, 1.5), on the scale of ratios.
_BETWEEN_SPEEDS = math.sqrt(0.5 * 1.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Shares are 0..1; a figure that the clips cannot give (no chunk boundary, nothing tracked) is NaN."""

    clips: int
    frames: int
    #: Captioned objects recalled in clear frames; share of frames that are clear; recall in all frames.
    recall: float
    clear: float
    recall_anywhere: float
    #: Recall in clear frames by chunk, and the frame at which it first falls below half of the first chunk's (inf:
    #: never).
    recall_by_chunk: tuple[float, ...]
    half_life: float
    #: Objects whose first direction is the caption's.
    directions: float
    #: Measured over captioned speed: mean over objects of the median over windows; share within 10 %; mean by window.
    speed: float
    speed_within_10: float
    speed_by_window: tuple[float, ...]
    #: Frames with the caption's ground; colour distance (RGB in 0..1) of the last window's ground from the first's.
    grounds: float
    ground_drift: float
    #: Clips with everything right: ground, objects (recalled in 4 of 5 clear frames), directions, speed words.
    captions: float
    #: Pixels: mean, and by window.
    trajectory_error: float
    trajectory_error_by_window: tuple[float, ...]
    #: Frames with fewer (clear frames only) and with more detections than objects; with three; what no detection
    #: explains.
    missing: float
    extra: float
    third: float
    residual: float
    #: Change from frame to frame across a chunk boundary over that between latent frames inside a chunk.
    seam: float


def report(
    video: Shaped[Array, "B F H W 3"] | Shaped[np.ndarray, "B F H W 3"], scenes: Scenes, *, chunk: int = 12
) -> Report:
    """Judge clips against their captions.

    Args:
        video: uint8, or float in -1..1.
        scenes: what the captions say; start positions are not looked at.
        chunk: frames of a chunk, 4 per latent frame. A causal VAE's first latent frame is one video frame, so chunk c
            holds the frames f with (f + 3) // chunk = c.
    """
    found = detect(jnp.asarray(video))
    frames, span = video.shape[1], np.array(video.shape[2:4]) - SPRITE
    drawn = np.arange(2)[None, :] < np.asarray(scenes.counts)[:, None]  # [B, 2]
    seen, seen_at = _tracks(found, scenes)
    windows, known, fit_starts, fit_velocities = _window_fits(seen, seen_at, span)
    clear = _clear(known, fit_starts, fit_velocities, drawn, frames, span)  # [B, F]

    # Identity.
    best = np.asarray(found.objects)  # [B, F, 3]
    among = np.arange(3)[None, None, :] < np.asarray(scenes.counts)[:, None, None]
    hits = ((best[:, :, None, :] == np.asarray(scenes.objects)[:, None, :, None]) & among[:, :, None, :]).any(-1)
    judged = drawn[:, None, :] & np.ones_like(hits)
    in_clear = judged & clear[:, :, None]
    chunk_of = (np.arange(frames) + 3) // chunk
    by_chunk = [_mean(hits[:, chunk_of == c], in_clear[:, chunk_of == c]) for c in range(chunk_of[-1] + 1)]

    # Motion.
    first = min(tracks.WINDOW, frames)
    directions = np.asarray(scenes.directions)
    losses = np.asarray(tracks.direction_losses(*_device(seen_at[:, :, :first], seen[:, :, :first]), _f32(span)))
    of_caption = np.take_along_axis(losses, directions[..., None], axis=-1)[..., 0]
    tracked = known[:, :, 0]
    direction_judged = drawn & (tracked | (clear[:, :first].sum(1) >= tracks.MIN_SEEN)[:, None])
    direction_right = tracked & (of_caption <= losses.min(-1) + DIRECTION_SLACK)
    asked = VELOCITIES[directions, np.asarray(scenes.speeds)] / UNITS  # [B, 2, (y, x)]
    asked_speed = np.linalg.norm(asked, axis=-1)
    ratio = np.linalg.norm(fit_velocities, axis=-1) / asked_speed[..., None]  # [B, 2, windows]
    ratio = np.where(known & drawn[:, :, None], ratio, np.nan)
    ratios = _nan_median(ratio)  # [B, 2]
    measured = ratios * asked_speed
    speed_right = np.where(asked_speed > _BETWEEN_SPEEDS, measured > _BETWEEN_SPEEDS, measured <= _BETWEEN_SPEEDS)
    speed_right &= measured > 0.25
    starts = tracks.fit_start(*_device(seen_at[:, :, :first], seen[:, :, :first]), _f32(asked), _f32(span))
    expected = tracks.path(np.asarray(starts)[:, :, None], asked[:, :, None], np.arange(frames), span)
    off = np.linalg.norm(expected - seen_at, axis=-1)  # [B, 2, F]
    counted = seen & (tracked & drawn)[:, :, None]

    # Ground and count.
    ground = np.asarray(found.grounds)
    ground_right = np.asarray(nearest_ground(found.grounds)) == np.asarray(scenes.grounds)[:, None]
    drift = np.linalg.norm(ground[:, windows[-1]].mean(1) - ground[:, windows[0]].mean(1), axis=-1)
    number, count = (best >= 0).sum(-1), np.asarray(scenes.counts)[:, None]

    recalled = np.where(in_clear.any(1), (hits & in_clear).sum(1) >= RECALLED * in_clear.sum(1), True)
    speed_right |= np.isnan(measured) & ~direction_judged
    objects_right = (recalled & (direction_right | ~direction_judged) & speed_right) | ~drawn
    return Report(
        clips=len(best),
        frames=frames,
        recall=_mean(hits, in_clear),
        clear=float(clear.mean()),
        recall_anywhere=_mean(hits, judged),
        recall_by_chunk=tuple(by_chunk),
        half_life=_half_life(by_chunk, chunk),
        directions=_mean(direction_right, direction_judged),
        speed=_mean(ratios, np.isfinite(ratios)),
        speed_within_10=_mean(np.abs(ratios - 1) <= 0.1, drawn),
        speed_by_window=tuple(_mean(ratio[..., w], np.isfinite(ratio[..., w])) for w in range(len(windows))),
        grounds=float(ground_right.mean()),
        ground_drift=float(drift.mean()),
        captions=float((objects_right.all(1) & (ground_right.mean(1) > 0.5)).mean()),
        trajectory_error=_mean(off, counted),
        trajectory_error_by_window=tuple(_mean(off[:, :, w], counted[:, :, w]) for w in windows),
        missing=_mean(number < count, clear),
        extra=float((number > count).mean()),
        third=float((number == 3).mean()),
        residual=float(np.asarray(found.residuals).mean()),
        seam=seam_ratio(video, chunk=chunk),
    )


def seam_ratio(video: Shaped[Array, "B F H W 3"] | Shaped[np.ndarray, "B F H W 3"], *, chunk: int) -> float:
    """Mean change across the boundaries of chunks over that across the boundaries of latent frames inside chunks (NaN
    without either): like with like, for decoders change differently inside a latent frame's four frames."""
    change = np.mean([np.abs(np.diff(np.asarray(clip, np.float32), axis=0)).mean((1, 2, 3)) for clip in video], axis=0)
    frame = np.arange(len(change))
    at_latent, at_chunk = frame % 4 == 0, (frame + 4) % chunk == 0
    return _ratio(change[at_latent & at_chunk], change[at_latent & ~at_chunk])


def frozen(video: Shaped[np.ndarray, "B F H W 3"]) -> Shaped[np.ndarray, "B F H W 3"]:
    """A control: the first frame for the whole clip. Identity is perfect, motion nil."""
    return np.repeat(video[:, :1], video.shape[1], axis=1)


def swapped(scenes: Scenes, *, num_frames: int) -> Float[Array, "B F H W 3"]:
    """A control: from mid-clip on, every object is another one on the same path. Motion is perfect, identity lost."""
    apart = (scenes.objects[:, 1] - scenes.objects[:, 0]) % 64
    step = jnp.where((apart == 31) | (apart == 33), 30, 31)  # Never from one of the scene's objects to the other.
    others = scenes._replace(objects=(scenes.objects + step[:, None]) % 64)
    late = (jnp.arange(num_frames) >= num_frames // 2)[None, :, None, None, None]
    return jnp.where(late, render(others, num_frames=num_frames), render(scenes, num_frames=num_frames))


def table(reports: Mapping[str, Report], *, title: str = "MovingSprites") -> Table:
    """A printable table, a column for each report: clips, their ceiling, their controls."""
    result = Table(title=title)
    result.add_column("measure")
    for name in reports:
        result.add_column(name, justify="right")
    for field in dataclasses.fields(Report):
        result.add_row(field.name.replace("_", " "), *(_text(getattr(r, field.name)) for r in reports.values()))
    return result


def _tracks(found: Detections, scenes: Scenes) -> tuple[np.ndarray, np.ndarray]:
    """Where each captioned object was seen, by name: [B, 2, F] bool and [B, 2, F, 2] pixels."""
    objects, wanted = np.asarray(found.objects), np.asarray(scenes.objects)
    drawn = np.arange(2)[None, :] < np.asarray(scenes.counts)[:, None]
    match = (objects[:, None] == wanted[:, :, None, None]) & drawn[:, :, None, None]  # [B, 2, F, 3]
    at = np.take_along_axis(np.asarray(found.positions)[:, None], match.argmax(-1)[..., None, None], axis=3)
    return match.any(-1), np.where(match.any(-1)[..., None], at[..., 0, :], 0).astype(np.float64)


def _window_fits(
    seen: np.ndarray, seen_at: np.ndarray, span: np.ndarray
) -> tuple[list[slice], np.ndarray, np.ndarray, np.ndarray]:
    """Windows (the last one reaches back to be whole), known [B, 2, w], starts at frame 0 and velocities [B, 2, w,
    2]."""
    frames = seen.shape[2]
    window = min(tracks.WINDOW, frames)
    firsts = [*range(0, frames - window + 1, window)]
    if firsts[-1] + window < frames:
        firsts.append(frames - window)
    windows = [slice(f, f + window) for f in firsts]
    known, starts, velocities = [], [], []
    for w in windows:
        fit = tracks.fit_free(*_device(seen_at[:, :, w], seen[:, :, w]), _f32(span))
        known.append(np.asarray(fit.known))
        velocities.append(np.asarray(fit.velocities, np.float64))
        starts.append(np.asarray(fit.starts, np.float64) - velocities[-1] * w.start)
    return windows, np.stack(known, 2), np.stack(starts, 2), np.stack(velocities, 2)


def _clear(
    known: np.ndarray, starts: np.ndarray, velocities: np.ndarray, drawn: np.ndarray, frames: int, span: np.ndarray
) -> np.ndarray:
    """[B, F]: whether the boxes overlap by at most a quarter."""
    of_window = np.minimum(np.arange(frames) // tracks.WINDOW, known.shape[2] - 1)
    number = np.arange(known.shape[2])
    # [w, w']: first the window itself, then the nearest earlier ones, then the nearest later ones.
    later = number[None, :] - number[:, None]
    rank = np.where(later <= 0, -later, len(number) + later)
    chosen = np.where(known[:, :, None], rank[None, None], 1_000_000).argmin(-1)[:, :, of_window][
        ..., None
    ]  # [B, 2, F, 1]
    at = tracks.path(
        np.take_along_axis(starts, chosen, axis=2),
        np.take_along_axis(velocities, chosen, axis=2),
        np.arange(frames),
        span,
    )
    overlap = np.prod(np.clip(SPRITE - np.abs(at[:, 0] - at[:, 1]), 0, None), axis=-1) / SPRITE**2
    overlap[~(drawn & known.any(-1)).all(1)] = 0
    return overlap <= CLEAR_OVERLAP


def _half_life(recall: list[float], chunk: int) -> float:
    below = [c for c, value in enumerate(recall) if value < recall[0] / 2]
    return float(below[0] * chunk) if below else math.inf


def _mean(values: np.ndarray, where: np.ndarray) -> float:
    return float(np.mean(values[where])) if where.any() else math.nan


def _nan_median(values: np.ndarray) -> np.ndarray:
    """Median over the last axis of what is not NaN; NaN where nothing is (numpy's own warns there)."""
    some = np.isfinite(values).sum(-1, keepdims=True) > 0
    return np.where(some, np.nanmedian(np.where(some, values, 0), axis=-1, keepdims=True), np.nan)[..., 0]


def _ratio(above: np.ndarray, below: np.ndarray) -> float:
    return float(above.mean() / below.mean()) if above.size and below.size and below.mean() > 0 else math.nan


def _device(seen_at: np.ndarray, seen: np.ndarray) -> tuple[Array, Array]:
    return _f32(seen_at), jnp.asarray(seen)


def _f32(values: np.ndarray) -> Array:
    return jnp.asarray(values, jnp.float32)


def _text(value: int | float | tuple[float, ...]) -> str:
    if isinstance(value, tuple):
        shown = value if len(value) <= 8 else [value[round(i * (len(value) - 1) / 7)] for i in range(8)]
        return " ".join(f"{v:.2f}" for v in shown)
    return str(value) if isinstance(value, int) else f"{value:.4g}"

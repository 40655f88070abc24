"""Batches of MovingSprites clips, as a function of (seed, index) alone: nothing to store, exact to resume."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from rehyat_jax.errors import ConfigError
from rehyat_jax.sprites import world

_WIDTHS = {"plain": world.WIDTH, "occlusion": world.OCCLUSION_WIDTH}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnyBucket:
    """Clips of one shape. ``share`` is the part of the rounds that draw from it; ``batch`` is an optimiser step's."""

    frames: int
    batch: int
    share: float = 1.0
    #: Drawn from only in this part of the run, as shares of its steps: short clips first, long ones later.
    during: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("batch", 1), ("share", 0)):
            if not least <= getattr(self, name) < math.inf:
                raise ConfigError(f"a bucket's {name} must be {least} or more, not {getattr(self, name)}")
        if not 0 <= self.during[0] < self.during[1] <= 1:
            raise ConfigError(f"a bucket's during must be two shares of the run in order, not {self.during}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bucket(AnyBucket):
    """Clips of MovingSprites, drawn again for each round."""

    kind: Literal["plain", "occlusion"]
    #: Occlusion: hidden-wait frames are drawn from 0 to this.
    longest_wait: int = 0
    #: Occlusion: "given": latent frames in which nothing of the object shows are seen and not learned. A clip's wait is
    #: told nobody, so who learns from long ones learns to wait; so one learns to remember alone.
    hidden: Literal["learned", "given"] = "learned"
    #: Plain: the share of clips with two objects, a half or more; the rest has one.
    pairs: float = 0.5
    #: Of each clip only so many neighbouring columns, from a place drawn for it; none: all of them.
    columns: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.longest_wait < 0:
            raise ConfigError(f"a bucket's longest_wait must be 0 or more, not {self.longest_wait}")
        if self.hidden == "given" and self.kind != "occlusion":
            raise ConfigError("in a bucket of plain clips nothing is hidden: leave hidden out")
        if not 0.5 <= self.pairs <= 1:
            raise ConfigError(f"a bucket's pairs must be 0.5 to 1, not {self.pairs}")
        if self.columns is not None and not 1 <= self.columns <= _WIDTHS[self.kind]:
            raise ConfigError(f"a bucket's columns must be 1 to {_WIDTHS[self.kind]}, not {self.columns}")

    @property
    def width(self) -> int:
        """Of its clips, in pixels."""
        return self.columns or _WIDTHS[self.kind]

    def sample(self, key: Key[Array, ""], count: int) -> Any:
        """``count`` training scenes, inside jit; occlusions' waits are drawn evenly from 0 to ``longest_wait``."""
        if self.kind == "plain":
            return world.sample_scenes(key, count, split="train", pairs=self.pairs)
        return world.sample_occlusions(key, count, waits=(0, self.longest_wait))

    def render(self, scenes: Any, *, first_frame: int | Int[Array, " B"] = 0) -> Float[Array, "B F H W 3"]:
        """The clips in whole, ``columns`` aside."""
        return world.render(scenes, num_frames=self.frames, first_frame=first_frame)

    def learned(self, scenes: Any, *, temporal_factor: int) -> Float[Array, "B T"] | None:
        """What each latent frame of the scenes counts in a loss, 1 or 0; None: all alike.

        Args:
            temporal_factor: frames in each latent frame but the first, which is one.
        """
        if self.hidden == "learned":
            return None
        shown = ~world.hidden(scenes, num_frames=self.frames)
        first, others = shown[:, :1], shown[:, 1:]
        others = jnp.any(others.reshape(others.shape[0], -1, temporal_factor), axis=2)
        return jnp.concatenate([first, others], axis=1).astype(jnp.float32)

    def draw(self, key: Key[Array, ""], *, latest_start: int = 0) -> Float[Array, "B F H W 3"]:
        """A batch of clips, each begun at a frame from 0 to ``latest_start`` and cut to ``columns``; inside jit."""
        scene_key, start_key, column_key = jax.random.split(key, 3)
        start = jax.random.randint(start_key, (self.batch,), 0, latest_start + 1)
        video = self.render(self.sample(scene_key, self.batch), first_frame=start)
        if self.width == video.shape[3]:
            return video
        left = jax.random.randint(column_key, (self.batch,), 0, video.shape[3] - self.width + 1)
        return jax.vmap(lambda clip, x: jax.lax.dynamic_slice_in_dim(clip, x, self.width, axis=2))(video, left)


def check_rounds(buckets: Sequence[AnyBucket], *, steps: int, steps_per_round: int) -> None:
    """
    Raises:
        ConfigError: there is nothing to do, or a time with nothing to draw from.
    """
    for name, value in (("steps", steps), ("steps_per_round", steps_per_round)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")
    for progress in {0.0, *(bucket.during[1] for bucket in buckets)} - {1.0}:
        if not sum(_shares(buckets, progress)) > 0:
            raise ConfigError(
                f"at least one bucket must have a share above 0 ({progress:.0%} through the run none has)"
            )


def _shares(buckets: Sequence[AnyBucket], progress: float) -> list[float]:
    return [b.share if b.during[0] <= progress < b.during[1] else 0.0 for b in buckets]


#: The fractional part of the golden section: multiples of it, modulo 1, fill 0…1 evenly, however many there are.
_GOLDEN = (math.sqrt(5) - 1) / 2


def choose(buckets: Sequence[AnyBucket], seed: int, index: int, *, progress: float = 0.0) -> int:
    """Which bucket round ``index`` draws from, ``progress`` (0 to 1, 1 aside) through the run.

    Rounds go over the shares by the golden section, from a place that the seed draws: any run of them has each bucket
    by its share to about one round. Drawn at random, a short run may hardly meet a bucket: of 18 rounds, 2 where 5.4
    were asked for were seen, and a student that had forgotten how fast things move.
    """
    ends = np.cumsum(_shares(buckets, progress))
    place = (np.random.default_rng(seed).random() + index * _GOLDEN) % 1.0
    return int(np.searchsorted(ends, place * ends[-1], side="right"))


def round_key(seed: int, index: int) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.key(seed), index)

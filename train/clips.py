"""Batches of MovingSprites clips, as a function of (seed, index) alone: nothing to store, exact to resume."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

from rehyat_jax.errors import ConfigError
from rehyat_jax.sprites import world


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bucket:
    """Clips of one shape. ``share`` is the part of all rounds that draw from it; ``batch`` is an optimiser step's."""

    kind: Literal["plain", "occlusion"]
    frames: int
    batch: int
    share: float = 1.0
    #: Occlusion: hidden-wait frames are drawn from 0 to this.
    longest_wait: int = 0

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("batch", 1), ("share", 0), ("longest_wait", 0)):
            if not least <= getattr(self, name) < math.inf:
                raise ConfigError(f"a bucket's {name} must be {least} or more, not {getattr(self, name)}")

    def sample(self, key: Key[Array, ""], count: int) -> Any:
        """``count`` training scenes, inside jit; occlusions' waits are drawn evenly from 0 to ``longest_wait``."""
        if self.kind == "plain":
            return world.sample_scenes(key, count, split="train")
        return world.sample_occlusions(key, count, waits=(0, self.longest_wait))

    def render(self, scenes: Any, *, first_frame: int | Int[Array, " B"] = 0) -> Float[Array, "B F H W 3"]:
        return world.render(scenes, num_frames=self.frames, first_frame=first_frame)


def check_rounds(buckets: tuple[Bucket, ...], *, steps: int, steps_per_round: int) -> None:
    """
    Raises:
        ConfigError: there is nothing to do, or nothing to draw from.
    """
    for name, value in (("steps", steps), ("steps_per_round", steps_per_round)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")
    if not sum(bucket.share for bucket in buckets) > 0:
        raise ConfigError("at least one bucket must have a share above 0")


def choose(buckets: tuple[Bucket, ...], seed: int, index: int) -> int:
    """Which bucket round ``index`` draws from."""
    share = np.array([b.share for b in buckets])
    return int(np.random.default_rng((seed, index)).choice(len(buckets), p=share / share.sum()))


def round_key(seed: int, index: int) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.key(seed), index)

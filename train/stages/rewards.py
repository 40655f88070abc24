"""What own videos are worth: a number a clip, by which it counts in the loss (Reward Forcing, arXiv 2512.04678)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from rehyat_jax.errors import ConfigError
from rehyat_jax.sprites.reward import figures

#: A clip counts no less and no more than this.
LEAST, MOST = 0.2, 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward:
    """A callable (frames, prompts) → [B]. One of your own is a dataclass on this, in a configuration's file."""

    #: exp(reward / β) is what a clip counts, before it is made a share of the mean.
    beta: float = 0.5
    #: Whether it looks at latents: then ``frames`` are these, and nothing is decoded.
    of_latents: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ConfigError(f"a reward's beta must be above 0, not {self.beta}")

    def __call__(self, frames: Float[Array, "B F H W C"], prompts: Any) -> Float[Array, " B"]:
        """The larger the better; inside jit, without gradient.

        Args:
            frames: of the whole window, −1 to 1; or its normalised latents.
            prompts: of MovingSprites the scenes, else the captions' embeddings.
        """
        raise NotImplementedError

    def weights(self, rewards: Float[Array, " B"], *, forks: int = 1) -> Float[Array, " B"]:
        """exp(r / β) over its mean, from 0.2 to 5; of ``forks`` neighbours of one past over these alone."""
        groups = rewards.reshape(-1, forks if forks > 1 else len(rewards))
        worth = jnp.exp((groups - jnp.max(groups, axis=1, keepdims=True)) / self.beta)
        return jnp.clip(worth / jnp.mean(worth, axis=1, keepdims=True), LEAST, MOST).reshape(-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpritesReward(Reward):
    """The verifier's figures: objects recalled, their speed and the ground as the caption says, nothing else there."""

    def __call__(self, frames: Float[Array, "B F H W C"], prompts: Any) -> Float[Array, " B"]:
        found = figures(frames, prompts)
        return (found.recall + found.speed + found.ground) / 3 - found.extra


@dataclasses.dataclass(frozen=True, kw_only=True)
class MotionReward(Reward):
    """How much moves: the root mean square of the change from latent frame to latent frame."""

    of_latents: ClassVar[bool] = True

    def __call__(self, frames: Float[Array, "B F H W C"], prompts: Any) -> Float[Array, " B"]:
        return jnp.sqrt(jnp.mean(jnp.square(frames[:, 1:] - frames[:, :-1]), axis=(1, 2, 3, 4)))

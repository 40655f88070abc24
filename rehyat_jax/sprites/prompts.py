"""The prompts that models are measured with: training sees none of them (but all captions of pillars are alike)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rehyat_jax.sprites.world import Occlusions, Scenes, sample_occlusions, sample_scenes


def unseen_scenes(count: int, *, seed: int) -> Scenes:
    """The first half with a held-out (object, direction) pair, the rest with a reserved caption."""
    keys = jax.random.split(jax.random.key(seed), 2)
    halves = (
        sample_scenes(keys[0], count // 2, split="heldout"),
        sample_scenes(keys[1], count - count // 2, split="unseen"),
    )
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *halves)


def occlusion_scenes(count: int, *, wait: int, seed: int) -> Occlusions:
    """With this many hidden-wait frames each."""
    return sample_occlusions(jax.random.key(seed + wait), count, waits=(wait, wait))

"""The prompts that models are measured with: training sees none of them (but all captions of pillars are alike)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rehyat_jax.sprites.world import Occlusions, Scenes, sample_occlusions, sample_scenes

_scenes = jax.jit(sample_scenes, static_argnames=("batch", "split"))
_occlusions = jax.jit(sample_occlusions, static_argnames=("batch", "waits"))


def unseen_scenes(count: int, *, seed: int) -> Scenes:
    """The first half with a held-out (object, direction) pair, the rest with a reserved caption."""
    keys = jax.random.split(jax.random.key(seed), 2)
    halves = (
        _scenes(keys[0], batch=count // 2, split="heldout"),
        _scenes(keys[1], batch=count - count // 2, split="unseen"),
    )
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *halves)


def occlusion_scenes(count: int, *, wait: int, seed: int) -> Occlusions:
    """With this many hidden-wait frames each."""
    return _occlusions(jax.random.key(seed + wait), batch=count, waits=(wait, wait))

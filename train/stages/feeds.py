"""Where a stage's clips come from: a bucket of prepared clips, or of clips that are rendered as they are needed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import PyTree

from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.runtime.devices import Devices
from rehyat_jax.text.tokenizer import Tokenizer
from train.data.clips import Bucket
from train.data.pools import Captions, Feed, SpriteFeed, padded_captions
from train.data.prepared import Prepared, PreparedClips, PreparedFeed
from train.engine.stage import Models

#: Added to a run's seed for the clips that it is validated on.
HELD_OUT = 1 << 20


@runtime_checkable
class HasClips(Protocol):
    """A stage that learns from buckets of clips."""

    #: Its settings: ``seed``, ``dtype`` and ``caption_tokens``.
    training: Any

    @property
    def prepared(self) -> Mapping[Path, Prepared]: ...
    @property
    def devices(self) -> Devices: ...
    @property
    def vae(self) -> WanVAE: ...
    @property
    def tokenizer(self) -> Tokenizer: ...

    def read(self, models: Models, tokens: Captions) -> PyTree: ...


def feed_of(
    stage: HasClips, clips: Bucket | PreparedClips, *, count: int, place: Callable[[int], int], held_out: bool = False
) -> Feed:
    """``count`` clips of a bucket for each of its rounds.

    Args:
        place: of a round of the run among those that draw from the bucket.
        held_out: clips that training does not see.
    """
    training = stage.training
    if isinstance(clips, PreparedClips):
        return PreparedFeed(
            stage.prepared[clips.folder],
            count=count,
            seed=training.seed,
            dtype=jnp.dtype(training.dtype),
            place=place,
            held_out=held_out,
            rows=stage.devices.rows(),
        )
    return SpriteFeed(
        clips,
        count=count,
        seed=training.seed + (HELD_OUT if held_out else 0),
        vae=stage.vae,
        tokens=functools.partial(padded_captions, stage.tokenizer, length=training.caption_tokens),
        read=stage.read,
    )

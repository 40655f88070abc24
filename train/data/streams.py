"""A causal teacher's own streams as inputs of a distillation: noisy chunks beside the finished ones before them.

A public few-step model makes a video a block of frames at a time, each block from noise through its few levels, with
the finished blocks in sight. What it is asked there is what its attention is learned from: each round it makes whole
videos from prompts alone, by the sampler that makes videos, and of each block one step's input is looked at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from rehyat_jax.models.wan.forced import beside
from rehyat_jax.runtime.devices import Devices
from rehyat_jax.sampling import SamplingSteps
from rehyat_jax.sampling.noise import ChunkNoise
from rehyat_jax.sampling.rollout import Sampler, init_state, precompute_text_kv
from rehyat_jax.sampling.text import Padded
from rehyat_jax.text.prompt_encoder import TEXT_LENGTH
from train.data.rollouts import Roller
from train.data.sources import Embed
from train.data.trajectories import Given, Points


class Streams(NamedTuple):
    """Videos that are made: of which noise, and of which prompts."""

    keys: Key[Array, " B"]
    text: Float[Array, "B L D"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamSampling:
    """How a causal teacher makes its videos: a `train.data.trajectories.Trajectories`.

    Args:
        steps, first_steps: of a chunk, and of a video's first one where that has others.
        chunk: latent frames of one.
    """

    sampler: Sampler
    steps: SamplingSteps
    first_steps: SamplingSteps | None
    chunk: int

    @property
    def num_steps(self) -> int:
        return len(self.steps.timestep)

    def begin(
        self,
        key: Key[Array, ""],
        numbers: Int[Array, " R"],
        text: Float[Array, "R L D"],
        *,
        shape: tuple[int, ...],
        given: Given = Given(),  # noqa: B008 (of text alone)
    ) -> Streams:
        return Streams(jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers), text)

    def points_at(
        self,
        carried: Streams,
        place: Int[Array, ""],
        negative: Float[Array, "1 L D"],
        teacher: Any,
        *,
        shape: tuple[int, ...],
    ) -> Points:
        exits = jnp.full(len(carried.keys), (place.astype(jnp.float32) + 0.5) / self.num_steps)
        return self.made(carried, exits, teacher, shape=shape)

    def after(self, carried: Streams, place: Int[Array, ""], velocity: Float[Array, "R T h w z"]) -> Streams:
        return carried  # the same videos again, and of them the next step

    def made(self, streams: Streams, exits: Float[Array, " B"], teacher: Any, *, shape: tuple[int, ...]) -> Points:
        """Whole videos, and rows in turn: a video's chunks as a step began with them, and finished.

        Args:
            exits: 0 to below 1: which of its steps, of each video.
        """
        count, (frames, height, width, channels) = len(streams.keys), shape
        roller = Roller(
            sampler=self.sampler,
            steps=self.steps,
            first_steps=self.first_steps,
            shape=(self.chunk, height, width, channels),
            chunks=frames // self.chunk,
        )
        states = init_state(teacher, self.sampler, num_steps=1, batch=count, height=height, width=width)
        text_kv = precompute_text_kv(teacher, Padded(streams.text[None], TEXT_LENGTH))
        window = jnp.zeros((), jnp.int32)
        made = roller.roll(teacher, states, streams.keys, text_kv, exits=exits, window=window, truth=None)
        level = float(self.sampler.context_noise)
        noise = ChunkNoise(streams.keys, 0).context((frames, height, width, channels))
        seen = (1 - level) * made.latents + level * noise
        return Points(
            beside(made.noisy, seen),
            beside(made.times, jnp.full(made.times.shape, 1000 * level, made.times.dtype)),
            beside(streams.text, streams.text),
        )


class OwnStreams:
    """A source at work: new videos each round. A `train.data.sources.Inputs`."""

    def __init__(
        self,
        batch: int,
        *,
        sampling: StreamSampling,
        texts: Callable[[int], str],
        embed: Embed,
        shape: tuple[int, ...],
        key: Key[Array, ""],
    ) -> None:
        self._batch, self._sampling, self._shape, self._key = batch, sampling, shape, key
        self._texts, self._embed = texts, embed
        self.frozen: PyTree = {"key": key}

    def begin(self, devices: Devices) -> PyTree:
        return None

    def host_batch(self, index: int) -> tuple[Array, Array]:
        numbers = index * self._batch + np.arange(self._batch)
        return jnp.asarray(index, jnp.int32), self._embed([self._texts(int(number)) for number in numbers])

    def host_batch_shapes(self) -> PyTree:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.host_batch(0))

    def points(self, carried: PyTree, host_batch: PyTree, frozen: PyTree, teacher: Any) -> tuple[PyTree, Points]:
        index, text = host_batch
        rows = jnp.arange(self._batch, dtype=jnp.int32)
        key, exit_key = jax.random.split(jax.random.fold_in(frozen["key"], index))
        # Every step as often as any other.
        order = jax.random.permutation(exit_key, rows).astype(jnp.float32)
        exits = (order + jax.random.uniform(exit_key, rows.shape)) / self._batch
        streams = self._sampling.begin(key, rows, text, shape=self._shape)
        return None, self._sampling.made(streams, exits, teacher, shape=self._shape)

    def after(self, carried: PyTree, host_batch: PyTree, frozen: PyTree, velocity: Array) -> PyTree:
        return None

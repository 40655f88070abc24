"""A student's own videos as training data: rows of streams, each round a window of some chunks further.

The chunks are made by the sampler that makes videos (`rehyat_jax.sampling.rollout`), to the last step, and committed as
it commits them. Of each chunk one step's input is kept, the exit: from there training makes the step once more, now
with a gradient.

A batch's rows are of one age: they begin together, go on from round to round with what they carry, and begin again with
other captions when they have reached a length that was drawn for them. Several groups of rows take turns, so that a run
always has young ones and old ones. Which group a round has, and at which window of it, follows from the round's number.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from rehyat_jax.errors import ConfigError
from rehyat_jax.sampling import SamplingSteps
from rehyat_jax.sampling.condition import Condition
from rehyat_jax.sampling.noise import ChunkNoise
from rehyat_jax.sampling.rollout import Recorded, Sampler, commit_chunk, recorded_chunk
from rehyat_jax.sampling.text import Padded
from train.data.clips import Bucket
from train.data.prepared import PreparedClips


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Own videos of one shape. ``clips`` has their captions and true beginnings; its ``frames`` are a window's, its
    ``batch`` the rows of a round."""

    clips: Bucket | PreparedClips
    #: Chunks of the true clip that a row begins with: later ones are the student's own.
    given: int = 0
    #: A row ends after a number of windows that is drawn from 1 to this.
    windows: int = 1
    #: Groups of rows that take turns; what they carry is in memory for each.
    groups: int = 1
    #: Of the rows that go on with a window, those that get another caption with it.
    switches: float = 0.0
    #: So many rows go on from one past, with noise of their own: what a reward says of them is compared among them
    #: alone. The first of them is the past of the next window.
    forks: int = 1

    def __post_init__(self) -> None:
        for name, least in (("given", 0), ("windows", 1), ("groups", 1), ("forks", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} of rollouts must be at least {least}, not {getattr(self, name)}")
        if self.clips.batch % self.forks:
            raise ConfigError(f"{self.clips.batch} rows cannot be forks of {self.forks}")
        if not 0 <= self.switches <= 1:
            raise ConfigError(f"switches of rollouts must be from 0 to 1, not {self.switches}")
        if self.windows == 1 and (self.groups > 1 or self.switches):
            raise ConfigError("rows of one window carry nothing: leave groups and switches out, or give more windows")

    def chunks(self, frames: int, *, chunk: int) -> int:
        """Of a window of so many latent frames.

        Raises:
            ConfigError: they are no whole chunks, or all of them are given.
        """
        chunks, rest = divmod(frames, chunk)
        if rest:
            raise ConfigError(
                f"a window of {self.clips.frames} frames is {frames} latent ones, and no whole number of chunks of "
                f"{chunk}"
            )
        if chunks <= self.given:
            raise ConfigError(f"{self.given} given chunks leave none of the {chunks} of a window to be made")
        return chunks


class Turn(NamedTuple):
    """A round of some rollouts."""

    group: int
    #: Of the rows at hand: 0, they begin.
    window: int


def turn(rollouts: Rollouts, seed: int, number: int) -> Turn:
    """What the round of this number is, of those that draw from these rollouts."""
    late, group = divmod(number, rollouts.groups)
    lengths, row = np.random.default_rng((seed, group)), 0
    while True:
        # At first cut short, so that the groups do not begin together ever after.
        length = 1 + (group if row == 0 else int(lengths.integers(rollouts.windows))) % rollouts.windows
        if late < length:
            return Turn(group, late)
        late, row = late - length, row + 1


class Rolled(NamedTuple):
    """A window of own videos; [B, T] and what has it as leading axes are of its latent frames."""

    latents: Float[Array, "B T h w z"]
    #: The exit: what the step began with, the time that the model was told, and its noise level.
    noisy: Float[Array, "B T h w z"]
    times: Float[Array, "B T"]
    sigma: Float[Array, "B T"]
    #: After the window.
    states: PyTree


@dataclasses.dataclass(frozen=True)
class Roller:
    """How a window is made: what its program is compiled for."""

    sampler: Sampler
    steps: SamplingSteps
    #: Of a video's first chunk, where that has others.
    first_steps: SamplingSteps | None
    #: Frames, height, width and channels of a chunk's latents.
    shape: tuple[int, int, int, int]
    chunks: int
    given: int = 0

    def roll(
        self,
        model: Any,
        states: PyTree,
        keys: Key[Array, " B"],
        text_kv: Padded,
        *,
        exits: Float[Array, " B"],
        window: Int[Array, ""],
        truth: Float[Array, "B T h w z"] | None,
        condition: Condition | None = None,
    ) -> Rolled:
        """The next window of every row; inside jit.

        Args:
            states: `rehyat_jax.sampling.rollout.init_state`', or what the window before left.
            keys: of the rows' noise, the same for all windows of a row.
            exits: 0 to below 1: which of its steps each row is to leave at.
            window: of the rows, counted from 0.
            truth: a clip of a window's length whose first chunks are given.
            condition: of the rows' whole videos, as far as it changes.
        """
        frames = self.shape[0]

        def under(first_frame: Array) -> Condition | None:
            return None if condition is None else condition.chunk(first_frame, frames)

        def made(states: PyTree, first_frame: Array, steps: SamplingSteps) -> tuple[PyTree, tuple[Array, ...]]:
            noise, count = ChunkNoise(keys, first_frame), len(steps.timestep)
            chunk: Recorded = recorded_chunk(
                model,
                states,
                noise,
                text_kv,
                shape=self.shape,
                first_frame=first_frame,
                steps=steps,
                sampler=self.sampler,
                condition=under(first_frame),
            )
            place = jnp.clip(jnp.floor(exits * count).astype(jnp.int32), 0, count - 1)
            noisy = jnp.take_along_axis(chunk.inputs, place[None, :, None, None, None, None], axis=0)[0]
            sigma = jnp.asarray(steps.coefficients.sigma, jnp.float32)
            levels = jnp.asarray(steps.timestep, jnp.float32)[place], sigma[place]
            return chunk.states, (chunk.latents, noisy, *levels)

        def given(states: PyTree, first_frame: Array) -> tuple[PyTree, tuple[Array, ...]]:
            assert truth is not None
            latents = jax.lax.dynamic_slice_in_dim(truth, first_frame, frames, axis=1)
            states = commit_chunk(
                model,
                states,
                latents,
                ChunkNoise(keys, first_frame),
                text_kv,
                first_frame=first_frame,
                steps=self.steps,
                context_noise=self.sampler.context_noise,
                condition=under(first_frame),
            )
            none = jnp.zeros(latents.shape[0], jnp.float32)
            return states, (latents, latents, none, none)

        def one(states: PyTree, number: Array) -> tuple[PyTree, tuple[Array, ...]]:
            ways = [lambda s: made(s, number * frames, self.steps)]
            way = jnp.zeros((), jnp.int32)
            if self.given:
                ways.append(lambda s: given(s, number * frames))
                way = (number < self.given).astype(jnp.int32)
            elif self.first_steps is not None:
                first_steps = self.first_steps
                ways.append(lambda s: made(s, number * frames, first_steps))
                way = (number == 0).astype(jnp.int32)
            return ways[0](states) if len(ways) == 1 else jax.lax.switch(way, ways, states)

        numbers = window * self.chunks + jnp.arange(self.chunks, dtype=jnp.int32)
        states, (latents, noisy, times, sigma) = jax.lax.scan(one, states, numbers)

        def joined(x: Array) -> Array:
            return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])

        times, sigma = (jnp.repeat(x.T, frames, axis=1) for x in (times, sigma))
        return Rolled(joined(latents), joined(noisy), times, sigma, states)


def rows_first(states: PyTree, like: PyTree, *, rows: int, axis: int) -> PyTree:
    """Stream states with rows as the first axis of every leaf, as what is carried has them.

    Args:
        like: the states of the model itself (`init_state`'s), by which a leaf that is no row's own is known: it has a
            leading axis of layers alone, and every row gets it.
        axis: of rows in ``states``.
    """

    def of(x: Array, one: Any) -> Array:
        return jnp.moveaxis(x, axis, 0) if one.ndim > 1 else jnp.broadcast_to(x[None], (rows, *x.shape))

    return jax.tree.map(of, states, like)


def rows_back(states: PyTree, like: PyTree, *, axis: int) -> PyTree:
    """`rows_first`'s inverse."""
    return jax.tree.map(lambda x, one: jnp.moveaxis(x, 0, axis) if one.ndim > 1 else x[0], states, like)


def first_forks(rows: PyTree, *, forks: int) -> PyTree:
    """The first of each so many rows, as often."""

    def of(x: Array) -> Array:
        first = x.reshape(-1, forks, *x.shape[1:])[:, :1]
        return jnp.broadcast_to(first, (x.shape[0] // forks, forks, *x.shape[1:])).reshape(x.shape)

    return rows if forks == 1 else jax.tree.map(of, rows)

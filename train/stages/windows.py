"""Windows of a student's own videos as batches: what the scores see of them, and what of that is learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree, UInt32

from rehyat_jax.runtime.devices import Devices
from rehyat_jax.runtime.mesh import constrain_sharding
from rehyat_jax.sampling import rollout
from rehyat_jax.sampling.condition import Condition
from rehyat_jax.sampling.noise import RANDOM, ChunkNoise
from rehyat_jax.sampling.text import Padded
from rehyat_jax.text.prompt_encoder import TEXT_LENGTH
from train.data.clips import round_key
from train.data.pools import Feed
from train.data.rollouts import Roller, Rollouts, first_forks, rows_back, rows_first, turn
from train.engine.stage import Data, Models
from train.stages.aims import noised, spread
from train.stages.from_image import FromImage
from train.stages.rewards import Reward


class OwnBatch(NamedTuple):
    """Windows of own videos; every array's first axis is their rows, so that a batch can be cut."""

    #: The exit of each chunk, see `train.data.rollouts.Rolled`; what was committed, and at which level.
    noisy: Float[Array, "B T h w z"]
    times: Float[Array, "B T"]
    sigma: Float[Array, "B T"]
    past: Float[Array, "B T h w z"]
    past_times: Float[Array, "B T"]
    #: Before the window, and its first latent frame.
    state: PyTree
    first_frame: Int[Array, " B"]
    text: PyTree
    #: The empty prompt, a row a clip.
    empty: PyTree
    #: The finished window as a video of its own, see `Windows`.
    video: Float[Array, "B T h w z"]
    #: What each latent frame counts in the student's loss; 0: it was given.
    weights: Float[Array, "B T"]
    #: Where there is one.
    rewards: Float[Array, " B"] | None
    #: Noise levels of the critic and of the scores, and keys of their noise.
    levels: Float[Array, "B 2"]
    keys: Key[Array, "B 2"]
    #: Of models that take images: what the student was shown beside the window, and what the scores are.
    condition: Condition | None = None
    scored: Condition | None = None


class Carried(NamedTuple):
    """What rows carry from window to window; every leaf is [B, groups, …]."""

    #: Of the feed's host batch: caption and true clip.
    clips: PyTree
    #: Of a row's noise.
    keys: UInt32[Array, "B G words"]
    states: PyTree
    #: The last chunk.
    latents: Float[Array, "B G T h w z"]


@runtime_checkable
class Setting(Protocol):
    """What windows are drawn by: `train.stages.forcing.ForcingTraining`."""

    @property
    def seed(self) -> int: ...
    @property
    def shift(self) -> float: ...
    @property
    def remember(self) -> float: ...
    @property
    def reward(self) -> Reward | None: ...


class Windows(Data):
    """Rollouts at work.

    The scores know videos from their beginning alone. A later window begins with its own first frame for them: the last
    of its first latent frame's, decoded and encoded anew as a video's first is, which stands in that one's place and
    is not learned. A model that takes an image has the true clip's first frame for it, and the scores of a later window
    that window's own.
    """

    def __init__(
        self,
        setting: Setting,
        rollouts: Rollouts,
        feed: Feed,
        *,
        roller: Roller,
        student: Any,
        place: Callable,
        images: FromImage | None = None,
    ) -> None:
        """
        Args:
            images: of a student that takes them.
            student: a module of shapes, for the states'.
            place: of a round of the run among those that draw from here.
        """
        self.setting, self.rollouts, self.feed, self.frozen = setting, rollouts, feed, feed.frozen
        self.roller, self._place, self._images = roller, place, images
        _, height, width, _ = roller.shape
        rows = rollouts.clips.batch
        #: Of the model itself, by shapes.
        self.like = jax.eval_shape(lambda: student.init_state(rows, height, width))

    def host(self, index: int) -> PyTree:
        now = turn(self.rollouts, self.setting.seed, self._place(index))
        numbers = np.asarray([now.group, now.window], np.int32)
        return self.feed.host_batch(index), jax.random.split(round_key(self.setting.seed, index))[1], numbers

    def host_shapes(self) -> PyTree:
        return (
            self.feed.host_batch_shapes(),
            jax.eval_shape(lambda: round_key(0, 0)),
            jax.ShapeDtypeStruct((2,), jnp.int32),
        )

    def begin(self, devices: Devices) -> PyTree:
        if self.rollouts.windows == 1:
            return None
        groups, rows = self.rollouts.groups, self.rollouts.clips.batch
        states = jax.eval_shape(lambda: self._by_rows(self._no_states()))
        shapes: Any = Carried(
            self.feed.host_batch_shapes(),
            jax.ShapeDtypeStruct((rows, *self._words()), jnp.uint32),  # type: ignore[arg-type]
            states,
            jax.ShapeDtypeStruct((rows, *self.roller.shape), jnp.float32),  # type: ignore[arg-type]
        )

        def empty() -> Carried:
            return jax.tree.map(lambda x: jnp.zeros((x.shape[0], groups, *x.shape[1:]), x.dtype), shapes)

        return devices.made_batch(empty)

    def draw(
        self, models: Models, carried: PyTree, host: PyTree, frozen: PyTree
    ) -> tuple[PyTree, Callable[[Array], OwnBatch]]:
        clips, key, numbers = host
        group, window = numbers[0], numbers[1]
        rows_key, exit_key, switch_key, level_key, noise_key = jax.random.split(key, 5)
        rows = self.rollouts.clips.batch
        keys = jax.random.bits(rows_key, (rows, *self._words()), jnp.uint32)
        before = self._no_states()
        last = jnp.zeros((rows, *self.roller.shape), jnp.float32)
        begins = window == 0
        if carried is not None:
            mine: Carried = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, group, 1, keepdims=False), carried)
            switched = begins | jax.random.bernoulli(switch_key, self.rollouts.switches, (rows,))
            clips = jax.tree.map(lambda new, old: jnp.where(_wide(switched, new), new, old), clips, mine.clips)
            keys = jnp.where(begins, keys, mine.keys)
            states = self._from_rows(mine.states)
            before = jax.tree.map(lambda new, old: jnp.where(begins, new, old), before, states)
            last = mine.latents
        forks = self.rollouts.forks
        clips = jax.tree.map(_by_batch, first_forks(clips, forks=forks))
        pool, empty = self.feed.pool(clips, frozen, models), self.feed.null_embedding(frozen, models)
        student, frames, condition = models["student"], self.roller.shape[0] * self.roller.chunks, None
        if self._images is not None:
            length = frames * self.rollouts.windows
            condition = self._images.of_stream(models, pool.latents, frames=length)
        noise_keys = jax.random.wrap_key_data(keys, impl=RANDOM)
        made = self.roller.roll(
            student,
            before,
            noise_keys,
            rollout.precompute_text_kv(
                student, Padded(pool.text[None], TEXT_LENGTH), None if condition is None else condition.image
            ),
            exits=spread(exit_key, rows, 1)[:, 0],
            window=window,
            truth=pool.latents if self.rollouts.given else None,
            condition=condition,
        )
        if carried is not None:
            chunk = self.roller.shape[0]
            past = self._by_rows(made.states), made.latents[:, -chunk:]
            new = Carried(clips, keys, *first_forks(past, forks=forks))
            carried = jax.tree.map(
                lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one, group, 1), carried, new
            )
        first_frame = window * frames
        frame = first_frame + jnp.arange(frames, dtype=jnp.int32)
        learned = jnp.where(begins, frame >= self.rollouts.given * self.roller.shape[0], frame > first_frame)
        video = made.latents
        if carried is not None:
            video = jax.lax.cond(begins, lambda: video, lambda: self._as_begun(models["vae"], last, video))
        condition = scored = None if condition is None else condition.chunk(first_frame, frames)
        if carried is not None and (images := self._images) is not None:
            scored = jax.lax.cond(begins, lambda: condition, lambda: images.condition(models, video))
        weights, rewards = jnp.broadcast_to(learned.astype(jnp.float32)[None], video.shape[:2]), None
        if self.setting.reward is not None:
            rewards = self._rewards(self.setting.reward, models, video, self.feed.prompts(clips))
            weights = weights * self.setting.reward.weights(rewards, forks=forks)[:, None]
        level = self.setting.remember
        context = ChunkNoise(noise_keys, first_frame).context((frames, *self.roller.shape[1:]))
        sigma = jnp.full(video.shape[:2], level, jnp.float32)
        one = jax.tree.map(lambda s: s[0, 0], before)

        def batch(number: Array) -> OwnBatch:
            level_keys = jax.random.split(jax.random.fold_in(level_key, number), 2)
            even = jnp.concatenate([spread(k, rows, 1) for k in level_keys], axis=1)
            levels = self.setting.shift * even / (1 + (self.setting.shift - 1) * even)
            return jax.tree.map(
                _by_batch,
                OwnBatch(
                    noisy=made.noisy,
                    times=made.times,
                    sigma=made.sigma,
                    past=noised(made.latents, context, sigma) if level else made.latents,
                    past_times=1000 * sigma,
                    state=rows_first(one, self.like, rows=rows, axis=1),
                    first_frame=jnp.broadcast_to(first_frame, (rows,)),
                    text=pool.text,
                    empty=jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:])), empty),
                    video=video,
                    weights=weights,
                    rewards=rewards,
                    levels=jnp.clip(levels, 0.02, 0.98),
                    keys=jax.random.split(jax.random.fold_in(noise_key, number), (rows, 2)),
                    condition=condition,
                    scored=scored,
                ),
            )

        return carried, batch

    @staticmethod
    def _words() -> tuple[int, ...]:
        """The shape of a key's data."""
        return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=RANDOM))).shape

    def _no_states(self) -> PyTree:
        """As `rehyat_jax.sampling.rollout.init_state` makes them, of one state and one evaluation."""
        return jax.tree.map(lambda x: jnp.zeros((1, 1, *x.shape), x.dtype), self.like)

    def _by_rows(self, states: PyTree) -> PyTree:
        return rows_first(states, self.like, rows=self.rollouts.clips.batch, axis=3)

    def _from_rows(self, states: PyTree) -> PyTree:
        return rows_back(states, self.like, axis=3)

    def _as_begun(self, vae: Any, last: Float[Array, "B C h w z"], latents: Float[Array, "B T h w z"]) -> Array:
        seen = jnp.concatenate([last, latents[:, :1]], axis=1)
        frame = vae.decode(vae.denormalize(seen))[:, -1:]
        first = vae.normalize(vae.encode(frame).astype(jnp.float32))
        return jnp.concatenate([first, latents[:, 1:]], axis=1)

    def _rewards(
        self, reward: Reward, models: Models, video: Float[Array, "B T h w z"], prompts: PyTree
    ) -> Float[Array, " B"]:
        if not reward.of_latents:
            vae = models["vae"]
            video = vae.decode(vae.denormalize(video), frames_per_step=self.roller.shape[0]).astype(jnp.float32)
        return reward(video, prompts)


def _by_batch(x: Array) -> Array:
    return constrain_sharding(x, "batch", *[None] * (x.ndim - 1))


def _wide(rows: Array, like: Array) -> Array:
    return rows.reshape(-1, *[1] * (like.ndim - 1))

"""Flow matching on MovingSprites: what pretraining and finetuning share.

A round encodes a pool of fresh clips with the frozen VAE and makes several optimiser steps on it, all in one jitted
call: each clip serves ``reuse`` times with other noise, which pays for its encoding. A step is ``loss(params, frozen,
batch)`` and its gradient, without anything else in hand.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float, Key, PyTree

from rehyat_jax.errors import CheckpointError, ConfigError
from rehyat_jax.mixers.config import Conversion
from rehyat_jax.models.umt5.encoder import UMT5Encoder
from rehyat_jax.models.wan.config import VAEConfig, WanConfig
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.runtime.mesh import laid_out
from rehyat_jax.runtime.record import Phases
from rehyat_jax.text.prompt_encoder import TEXT_LENGTH
from rehyat_jax.text.tokenizer import Tokenizer
from train.data.clips import AnyBucket, Bucket, check_rounds, choose, round_key
from train.data.pools import ENCODE_CLIPS, Captions, Feed, Pool, Read, SpriteFeed
from train.data.prepared import Prepared, PreparedClips, PreparedFeed
from train.engine.gradients import Batch, Loss, cut, gradients_of
from train.engine.loop import compile_all, run
from train.engine.optimizer import OptimizerConfig, Shares, TrainState
from train.parallel.devices import Devices, Processes, first_process
from train.parallel.sharding import MeshConfig, check_mesh

#: Added to a run's seed for the clips that it is validated on.
_HELD_OUT = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validation:
    """What is measured, and shown, now and then during a run; always with the averaged weights."""

    #: Steps from one time to the next; 0: never.
    every: int = 0
    #: Clips of each bucket that training does not see, for the loss; the same with the same noise each time. Of
    #: prepared clips whole videos are held out, spread by a hash of their content.
    clips: int = 32
    #: Each a video, by the model's own defaults and the same noise each time: ``videos/`` beside the checkpoints.
    prompts: tuple[str, ...] = ()

    @property
    def held_out(self) -> int:
        """Clips of each bucket that training does not see; of prepared ones whole videos, and so a few more."""
        return self.clips if self.every else 0

    def __post_init__(self) -> None:
        if self.every < 0 or self.clips < 1:
            raise ConfigError("validation needs every to be at least 0, and clips at least 1")


#: Makes the videos of a validation in a folder, from averaged parameters.
Show = Callable[[PyTree, Path], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowTraining:
    """The settings of either stage, and its rounds."""

    out: Path
    buckets: tyro.conf.AvoidSubcommands[tuple[Bucket | PreparedClips, ...]]
    steps: int
    #: Optimiser steps a round, and how often each clip of its pool serves.
    steps_per_round: int = 16
    reuse: int = 4
    #: Parts that a step's batch is cut into, one after the other: less memory, the same gradient, summed in float32.
    accumulate: int = 1
    #: Keep each block's input alone for the backward pass, and compute the block anew there: less memory, more work.
    remat: bool = False
    #: Every block in the program in place of a loop over blocks: faster for a small model, longer to compile.
    unroll: bool = False
    optimizer: OptimizerConfig = OptimizerConfig()
    #: So many steps in a row without finite gradients end the run; fewer are skipped.
    most_skipped: int = 20
    validation: Validation = Validation()
    #: Flow shift of training: the share of high noise.
    shift: float = 3.0
    #: Share of clips trained with the empty prompt, for guidance.
    caption_dropout: float = 0.1
    #: Tokens a caption may have; longer ones would be cut.
    caption_tokens: int = 48
    #: Of the computation; weights and optimiser are in float32.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    seed: int = 0
    #: Between two checkpoints; 0 saves after every round.
    checkpoint_seconds: float = 60.0
    #: Devices along each axis; by default one device is used.
    mesh: MeshConfig = MeshConfig(fsdp=1)
    processes: Processes = Processes()

    def __post_init__(self) -> None:
        check_rounds(self.buckets, steps=self.steps, steps_per_round=self.steps_per_round)
        if self.reuse < 1 or not 1 <= self.caption_tokens <= TEXT_LENGTH:
            raise ConfigError(f"reuse must be at least 1, and caption_tokens 1 to {TEXT_LENGTH}")
        if not (0 <= self.caption_dropout <= 1 and 0 < self.shift < float("inf")):
            raise ConfigError("caption_dropout must be 0 to 1, and shift above 0")
        for name in ("accumulate", "most_skipped"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for bucket in self.buckets:
            if bucket.batch % self.accumulate:
                raise ConfigError(f"a batch of {bucket.batch} clips cannot be cut into accumulate = {self.accumulate}")
            clips = self.pool(bucket)
            encoded = min(ENCODE_CLIPS, clips or 1) if isinstance(bucket, Bucket) else 1
            if clips * self.reuse != bucket.batch * self.steps_per_round or clips % encoded:
                raise ConfigError(
                    f"batch {bucket.batch} x {self.steps_per_round} steps a round / reuse {self.reuse} must be a "
                    f"multiple of {encoded} clips"
                )

    @property
    def train_folder(self) -> Path:
        """Checkpoints and metrics."""
        raise NotImplementedError

    @property
    def forward(self) -> dict[str, Any]:
        """How the model that learns is called."""
        return {"text_tokens": TEXT_LENGTH, "remat": self.remat, "unroll": self.unroll}

    def pool(self, bucket: AnyBucket) -> int:
        """Clips that a round draws."""
        return bucket.batch * self.steps_per_round // self.reuse

    def check_fits(self, vae: VAEConfig, model: WanConfig, *, where: Path) -> None:
        """
        Raises:
            CheckpointError, ConfigError: the VAE, which is at ``where``, is not the model's or the clips'.
        """
        if not vae.z_dim == model.in_channels == model.out_channels:
            raise CheckpointError(
                f"{where} makes latents of {vae.z_dim} channels, and the transformer has "
                f"{model.in_channels} in and {model.out_channels} out"
            )
        for bucket in self.buckets:
            if (bucket.frames - 1) % vae.temporal_factor:
                raise ConfigError(f"{bucket.frames} frames are not {vae.temporal_factor}k + 1")

    def devices(
        self,
        vae: VAEConfig,
        model: WanConfig,
        hybrid: Conversion | None,
        *,
        among: Sequence[jax.Device] | None = None,
    ) -> Devices:
        """What the run is on: the mesh's devices, or of those ``among`` which it is planned.

        Raises:
            ConfigError: the mesh does not divide the devices, the model or the clips.
        """
        frames = [(bucket.frames - 1) // vae.temporal_factor + 1 for bucket in self.buckets]
        clips = [bucket.batch // self.accumulate for bucket in self.buckets]
        chunk = model.patch_size[0] * (1 if hybrid is None else hybrid.chunk_frames)
        devices = Devices.of(self.mesh, chunks=max(min(frames) // chunk, 1), batch=math.gcd(*clips), among=among)
        if devices.mesh is not None:
            for bucket, length, batch in zip(self.buckets, frames, clips, strict=True):
                check_mesh(devices.shape, model, hybrid=hybrid, batch=batch, latent_frames=length)
                if self.pool(bucket) % (pieces := devices.batch_pieces):
                    raise ConfigError(f"{self.pool(bucket)} clips a round do not divide by data x fsdp = {pieces}")
        return devices

    def captions(self, tokenizer: Tokenizer, texts: Sequence[str]) -> Captions:
        """Every text in ``caption_tokens`` tokens."""
        tokens = tokenizer.encode(texts, max_length=self.caption_tokens)
        return Captions(*(jnp.asarray(_padded(x, self.caption_tokens)) for x in tokens))

    def batch(self, pool: Pool, empty: PyTree, key: Key[Array, ""], *, dropout: float | None = None) -> Batch:
        """These clips with noise, some without their caption: ``empty``'s only row stands for it."""
        drop_key, time_key, noise_key = jax.random.split(key, 3)
        size = pool.latents.shape[0]
        dropped = jax.random.bernoulli(drop_key, self.caption_dropout if dropout is None else dropout, (size,))

        def mixed(rows: Array, nothing: Array) -> Array:
            return jnp.where(dropped.reshape(-1, *[1] * (rows.ndim - 1)), nothing, rows)

        # Stratified over the batch: every level of noise in every step.
        even = (jnp.arange(size, dtype=jnp.float32) + jax.random.uniform(time_key, (size,))) / size
        sigma = self.shift * even / (1 + (self.shift - 1) * even)
        sigma, weights = self.levels(sigma, jax.random.fold_in(time_key, 1), frames=pool.latents.shape[1])
        noise = jax.random.normal(noise_key, pool.latents.shape)
        wide = sigma.reshape(size, -1, 1, 1, 1)
        return Batch(
            noisy=(1 - wide) * pool.latents + wide * noise,
            timesteps=sigma * 1000,
            text=jax.tree.map(mixed, pool.text, empty),
            velocity=noise - pool.latents,
            weights=weights,
        )

    def levels(
        self, sigma: Float[Array, " B"], key: Key[Array, ""], *, frames: int
    ) -> tuple[Float[Array, "B *T"], Float[Array, "B T"] | None]:
        """Noise levels of clips of so many latent frames, and what each frame counts in the loss; from a level for each
        clip, all of which are to be met as often as they are there."""
        return sigma, None

    def train(
        self,
        params: PyTree,
        loss: Loss,
        *,
        vae: WanVAE,
        tokenizer: Tokenizer,
        phases: Phases,
        read: Read = lambda _, tokens: tokens,
        frozen: PyTree = None,
        shares: Shares = MappingProxyType({}),
        show: Show | None = None,
        flops: Callable[[tuple[int, int, int]], int] | None = None,
        prepared: Mapping[Path, Prepared] = MappingProxyType({}),
        devices: Devices | None = None,
    ) -> TrainState:
        """All steps, from the newest checkpoint on where there is one.

        Args:
            read: applied to a round's captions, and to the empty one, once a round.
            frozen: parameters for ``read`` and ``loss`` that do not learn.
            shares: of the learning rate, by variable type.
            show: makes the videos of a validation.
            flops: floating-point operations of a step on one clip of so many latent frames, rows and columns.
            prepared: the opened folders of buckets of `PreparedClips`.
            devices: on which all of it happens; none: the first.

        Raises:
            RehyatError, CheckpointError, Stopped: see `train.engine.loop.run`.
        """
        devices, turns = devices or Devices(None), self._turns()
        params, frozen = devices.parameters(params), devices.parameters(frozen)

        def feed(number: int, *, count: int | None = None) -> Feed:
            """Of a bucket: what it trains on or, with a count, so many clips that are held out."""
            bucket = self.buckets[number]
            if isinstance(bucket, PreparedClips):
                return PreparedFeed(
                    prepared[bucket.folder],
                    count=count or self.pool(bucket),
                    seed=self.seed,
                    dtype=jnp.dtype(self.dtype),
                    place=functools.partial(bisect.bisect_left, turns[number]),
                    held_out=bool(count),
                    rows=devices.rows(),
                )
            return SpriteFeed(
                bucket,
                count=count or self.pool(bucket),
                seed=self.seed + (_HELD_OUT if count else 0),
                vae=vae,
                tokens=functools.partial(self.captions, tokenizer),
                read=read,
            )

        feeds = [feed(number) for number in range(len(self.buckets))]

        def program(index: int) -> jax.stages.Lowered:
            return self.lower(self.buckets[index], feeds[index], loss, state, frozen, shares=shares, devices=devices)

        with phases.measure("compile"):
            state = devices.made(self.optimizer.init, params)
            for each in feeds:
                each.frozen = devices.everywhere(each.frozen)
            programs = compile_all([functools.partial(program, index) for index in range(len(feeds))])

        def advance(state: TrainState, step: int) -> tuple[TrainState, dict[str, Array]]:
            index = step // self.steps_per_round
            bucket = choose(self.buckets, self.seed, index, progress=step / self.steps)
            turn, key = feeds[bucket].turn(index), jax.random.split(round_key(self.seed, index))[1]
            turn = devices.batch(turn, feeds[bucket].turn_shapes())
            key, rate = devices.everywhere((key, jnp.float32(self.optimizer.rate(step, self.steps))))
            return programs[bucket](state, feeds[bucket].frozen, frozen, turn, key, rate)

        def clip_flops(feed: Feed) -> int:
            shape = jax.eval_shape(feed.pool, feed.turn_shapes(), feed.frozen, frozen).latents.shape
            return flops(shape[1:4]) if flops else 0

        work = [clip_flops(feed) * self.steps_per_round for feed in feeds]

        def round_flops(step: int) -> int:
            bucket = choose(self.buckets, self.seed, step // self.steps_per_round, progress=step / self.steps)
            return work[bucket] * self.buckets[bucket].batch

        measures = [
            self._measurer(bucket, functools.partial(feed, number), loss, frozen, devices=devices)
            for number, bucket in enumerate(self.buckets)
            if self.validation.every
        ]

        def validate(state: TrainState, step: int) -> dict[str, float]:
            losses = [measure(state.ema) for measure in measures]
            averaged = devices.on_host(state.ema) if show else None
            if show and first_process():
                show(averaged, self.train_folder / "videos" / f"step-{step:06d}")
            names = [f"validation/{index}-{bucket.frames}-frames" for index, bucket in enumerate(self.buckets)]
            return dict(zip(names, losses, strict=True)) | {"validation/loss": float(np.mean(losses))}

        with phases.measure("train"):
            return run(
                state,
                advance,
                steps=self.steps,
                steps_per_advance=self.steps_per_round,
                folder=self.train_folder,
                checkpoint_seconds=self.checkpoint_seconds,
                most_skipped=self.most_skipped,
                validate=validate if self.validation.every else None,
                validate_steps=self.validation.every,
                flops=round_flops if flops else None,
                devices=devices.count,
            )

    def lower(
        self,
        bucket: AnyBucket,
        feed: Feed,
        loss: Loss,
        state: TrainState,
        frozen: PyTree,
        *,
        shares: Shares,
        devices: Devices,
    ) -> jax.stages.Lowered:
        """The program of a round, of shapes as well as of arrays: from the state, what does not learn of the feed and
        of the stage, a turn, a key and the learning rate, to the state after it and the metrics of its steps.
        """
        count, as_it_is = self.pool(bucket), self.steps_per_round == self.reuse == 1

        def advance(
            state: TrainState, feed_frozen: PyTree, frozen: PyTree, turn: PyTree, key: Array, rate: Array
        ) -> tuple[TrainState, dict[str, Array]]:
            pool, nothing = feed.pool(turn, feed_frozen, frozen), feed.nothing(feed_frozen, frozen)
            order_key, key = jax.random.split(key)
            order = jax.vmap(lambda k: jax.random.permutation(k, count))(jax.random.split(order_key, self.reuse))

            def of_batch(x: Array) -> Array:
                return laid_out(x, "batch", *[None] * (x.ndim - 1))

            def step(state: TrainState, x: tuple[Array, Array]) -> tuple[TrainState, dict[str, Array]]:
                # A pool that is one batch stays where it is: to shuffle it would send every clip to every device.
                clips = pool if as_it_is else jax.tree.map(lambda a: a[x[0]], pool)
                batch = self.batch(jax.tree.map(of_batch, clips), nothing, x[1])
                gradients, metrics = gradients_of(loss, state.params, frozen, batch, parts=self.accumulate)
                return self.optimizer.apply(state, gradients, rate, shares=shares), metrics

            order = order.reshape(self.steps_per_round, bucket.batch)
            return jax.lax.scan(step, state, (order, jax.random.split(key, self.steps_per_round)))

        cut, turn = devices.parameter_shardings(state), feed.turn_shapes()
        return devices.lower(
            advance,
            devices.described(state, cut),
            devices.described(feed.frozen, devices.whole),
            devices.described(frozen, devices.parameter_shardings(frozen)),
            devices.described(turn, devices.batch_shardings(turn)),
            *devices.described((round_key(0, 0), jnp.float32(0)), devices.whole),
            donate=(0,),
            out=(cut, devices.whole),
        )

    def _turns(self) -> list[list[int]]:
        """For each bucket, the rounds that draw from it."""
        turns: list[list[int]] = [[] for _ in self.buckets]
        for index, step in enumerate(range(0, self.steps, self.steps_per_round)):
            turns[choose(self.buckets, self.seed, index, progress=step / self.steps)].append(index)
        return turns

    def _measurer(
        self, bucket: AnyBucket, make_feed: Callable[..., Feed], loss: Loss, frozen: PyTree, *, devices: Devices
    ) -> Callable[[PyTree], float]:
        """From parameters: the loss on clips that are held out, a part of a step's batch at a time."""
        part = bucket.batch // self.accumulate
        parts = -(-self.validation.clips // part)
        feed = make_feed(count=part * parts)

        def measure(params: PyTree, feed_frozen: PyTree, frozen: PyTree, turn: PyTree) -> Array:
            pool, nothing = feed.pool(turn, feed_frozen, frozen), feed.nothing(feed_frozen, frozen)
            batch = self.batch(pool, nothing, round_key(0, 0), dropout=0.0)
            return jnp.mean(jax.lax.map(lambda part: loss(params, frozen, part)[1]["loss"], cut(batch, parts)))

        turn, feed_frozen = devices.batch(feed.turn(0), feed.turn_shapes()), devices.everywhere(feed.frozen)

        program: jax.stages.Compiled | None = None

        def measured(params: PyTree) -> float:
            nonlocal program
            arrays = params, feed_frozen, frozen, turn
            program = program or devices.lower(measure, *arrays, out=devices.whole).compile()
            return float(program(*arrays))

        return measured


def embed(encoder: UMT5Encoder, tokens: Captions) -> Float[Array, "B L D"]:
    """Prompt embeddings as `rehyat_jax.text.tokenizer.embed_prompts` makes them for sampling, but not padded."""
    text = encoder(tokens.ids, tokens.mask)
    return jnp.where(tokens.mask[..., None] > 0, text, jnp.zeros((), text.dtype))


def flow_loss(
    velocity: Float[Array, "B T h w z"], target: Float[Array, "B T h w z"], weights: Float[Array, "B T"] | None = None
) -> Float[Array, ""]:
    """Mean squared error, in float32; of the frames that count."""
    squared = jnp.square(velocity.astype(jnp.float32) - target.astype(jnp.float32))
    if weights is None:
        return jnp.mean(squared)
    return jnp.sum(jnp.mean(squared, axis=(2, 3, 4)) * weights) / jnp.maximum(jnp.sum(weights), 1)


def _padded(x: np.ndarray, length: int) -> np.ndarray:
    return np.pad(x, ((0, 0), (0, length - x.shape[1])))

"""Flow matching on clips: what pretraining and finetuning share.

A round encodes a pool of fresh clips with the frozen VAE and makes several optimiser steps on it, all in one jitted
call: each clip serves ``reuse`` times with other noise, which pays for its encoding.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float, Key, PyTree

from rehyat_jax.errors import CheckpointError, ConfigError
from rehyat_jax.mixers.config import Conversion
from rehyat_jax.models.umt5.encoder import UMT5Encoder
from rehyat_jax.models.wan.config import VAEConfig, WanConfig
from rehyat_jax.models.wan.remat import Keeps
from rehyat_jax.models.wan.sharding import check_mesh
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.runtime.devices import Devices, first_process
from rehyat_jax.runtime.mesh import constrain_sharding
from rehyat_jax.text.prompt_encoder import TEXT_LENGTH
from rehyat_jax.text.tokenizer import Tokenizer
from train.data.clips import AnyBucket, Bucket, check_rounds, choose, round_key
from train.data.pools import ENCODE_CLIPS, Captions, Feed, Pool
from train.data.prepared import Prepared, PreparedClips
from train.engine.folder import RunFolder
from train.engine.gradients import Mean, means_of
from train.engine.optimizer import OptimizerConfig
from train.engine.run import RunConfig
from train.engine.stage import Data, Measure, Models, Stage, Update
from train.stages.feeds import feed_of


class Batch(NamedTuple):
    """Clips of a step, each at a noise level of its own, or its latent frames at theirs."""

    noisy: Float[Array, "B T h w z"]
    #: 1000 times the noise level.
    timesteps: Float[Array, "B *T"]
    text: PyTree
    #: What is to be learned: noise − video.
    velocity: Float[Array, "B T h w z"]
    #: What each latent frame counts in the loss, 0 or 1; none: all the same.
    weights: Float[Array, "B T"] | None = None


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


#: Makes the videos of a validation in a folder, from the averaged student.
Show = Callable[[Any, Path], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowTraining(RunConfig):
    """The settings of either stage, and its rounds."""

    buckets: tyro.conf.AvoidSubcommands[tuple[Bucket | PreparedClips, ...]]
    #: Optimiser steps a round, and how often each clip of its pool serves.
    steps_per_round: int = 16
    reuse: int = 4
    #: Parts that a step's batch is cut into, one after the other: less memory, the same gradient, summed in float32.
    accumulate: int = 1
    #: Compute each block again in the backward pass: less memory, more work.
    remat: bool = False
    #: With ``remat``, what of a block is kept beside its input, and not computed again: nothing; attention's output;
    #: that, the results of products with weights and φ's features. `rehyat plan` says what fits.
    remat_keeps: Keeps = "nothing"
    #: Every block in the program in place of a loop over blocks: faster for a small model, longer to compile.
    unroll: bool = False
    optimizer: OptimizerConfig = OptimizerConfig()
    validation: Validation = Validation()
    #: Flow shift of training: the share of high noise.
    shift: float = 3.0
    #: Noise levels that are trained, from and to; of one of two experts its own.
    levels_of: tuple[float, float] = (0.0, 1.0)
    #: Share of clips trained with the empty prompt, for guidance.
    caption_dropout: float = 0.1
    #: Tokens a caption may have; longer ones would be cut.
    caption_tokens: int = 48
    #: Of the computation; weights and optimiser are in float32.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        check_rounds(self.buckets, steps=self.steps, steps_per_round=self.steps_per_round)
        super().__post_init__()
        if self.reuse < 1 or not 1 <= self.caption_tokens <= TEXT_LENGTH:
            raise ConfigError(f"reuse must be at least 1, and caption_tokens 1 to {TEXT_LENGTH}")
        if not (0 <= self.caption_dropout <= 1 and 0 < self.shift < float("inf")):
            raise ConfigError("caption_dropout must be 0 to 1, and shift above 0")
        if not 0 <= self.levels_of[0] < self.levels_of[1] <= 1:
            raise ConfigError(
                f"levels_of must be two noise levels from 0 to 1, the lower one first, not {self.levels_of}"
            )
        if self.accumulate < 1:
            raise ConfigError(f"accumulate must be at least 1, not {self.accumulate}")
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
    def forward(self) -> dict[str, Any]:
        """How the model that learns is called."""
        return {"text_tokens": TEXT_LENGTH, "remat": self.rematerialised, "unroll": self.unroll}

    @property
    def rematerialised(self) -> Keeps | None:
        """As models take it."""
        return self.remat_keeps if self.remat else None

    def pool(self, bucket: AnyBucket) -> int:
        """Clips that a round draws."""
        return bucket.batch * self.steps_per_round // self.reuse

    def check_fits(self, vae: VAEConfig, model: WanConfig, *, where: Path, images: bool = False) -> None:
        """
        Args:
            images: whether a mask and an image's latents go in beside the noise.

        Raises:
            CheckpointError, ConfigError: the VAE, which is at ``where``, is not the model's or the clips'.
        """
        if not images and not vae.z_dim == model.in_channels == model.out_channels:
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

    def batch(self, pool: Pool, empty: PyTree, key: Key[Array, ""], *, dropout: float | None = None) -> Batch:
        """These clips with noise, some without their caption: ``empty``'s only row stands for it."""
        drop_key, time_key, noise_key = jax.random.split(key, 3)
        size = pool.latents.shape[0]
        dropped = jax.random.bernoulli(drop_key, self.caption_dropout if dropout is None else dropout, (size,))

        def mixed(rows: Array, empty: Array) -> Array:
            return jnp.where(dropped.reshape(-1, *[1] * (rows.ndim - 1)), empty, rows)

        # Stratified over the batch: every level of noise in every step.
        even = (jnp.arange(size, dtype=jnp.float32) + jax.random.uniform(time_key, (size,))) / size
        # Before the shift, where levels are even.
        low, high = (level / (self.shift - (self.shift - 1) * level) for level in self.levels_of)
        even = low + (high - low) * even
        sigma = self.shift * even / (1 + (self.shift - 1) * even)
        sigma, weights = self.levels(sigma, jax.random.fold_in(time_key, 1), frames=pool.latents.shape[1])
        if pool.learned is not None:
            weights = pool.learned if weights is None else weights * pool.learned
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

    def which(self, index: int) -> int:
        """The bucket that round ``index`` draws from."""
        return choose(self.buckets, self.seed, index, progress=index * self.steps_per_round / self.steps)


class Clips(Data):
    """A bucket's pool of clips for each round, and batches of it with noise."""

    def __init__(self, training: FlowTraining, bucket: AnyBucket, feed: Feed) -> None:
        self.training, self.bucket, self.feed, self.frozen = training, bucket, feed, feed.frozen

    def host(self, index: int) -> PyTree:
        return self.feed.host_batch(index), jax.random.split(round_key(self.training.seed, index))[1]

    def host_shapes(self) -> PyTree:
        return self.feed.host_batch_shapes(), jax.eval_shape(lambda: round_key(0, 0))

    def draw(
        self, models: Models, carried: PyTree, host: PyTree, frozen: PyTree
    ) -> tuple[PyTree, Callable[[Array], Any]]:
        training, (host_batch, key) = self.training, host
        pool, empty = self.feed.pool(host_batch, frozen, models), self.feed.null_embedding(frozen, models)
        order_key, key = jax.random.split(key)
        count, steps = training.pool(self.bucket), training.steps_per_round
        order = jax.vmap(lambda k: jax.random.permutation(k, count))(jax.random.split(order_key, training.reuse))
        order, keys = order.reshape(steps, self.bucket.batch), jax.random.split(key, steps)

        def rows_sharded(x: Array) -> Array:
            return constrain_sharding(x, "batch", *[None] * (x.ndim - 1))

        def batch(step: Array) -> Any:
            # A pool that is one batch stays where it is: to shuffle it would send every clip to every device.
            as_it_is = steps == training.reuse == 1
            clips = pool if as_it_is else jax.tree.map(lambda a: a[order[step]], pool)
            return training.batch(jax.tree.map(rows_sharded, clips), empty, keys[step])

        return None, batch


class FlowStage(Stage):
    """One student learns by flow matching on buckets of clips."""

    def __init__(self, training: FlowTraining) -> None:
        self.training = training
        self.steps_per_round = training.steps_per_round
        self.validate_every = training.validation.every
        self.updates = (Update(role="student", loss=self.loss, parts=training.accumulate),)

    # What a stage of this kind says.

    @property
    def vae(self) -> WanVAE:
        """By which clips are encoded."""
        raise NotImplementedError

    @property
    def tokenizer(self) -> Tokenizer:
        raise NotImplementedError

    @property
    def prepared(self) -> Mapping[Path, Prepared]:
        """The opened folders of buckets of `PreparedClips`."""
        return {}

    def loss(self, models: Models, batch: Batch) -> Mapping[str, Mean]:
        raise NotImplementedError

    def read(self, models: Models, tokens: Captions) -> PyTree:
        """Captions, and the empty one, as a batch has them; once a round."""
        return tokens

    @property
    def show(self) -> Show | None:
        """Makes the videos of a validation."""
        return None

    # What follows from that.

    def data(self) -> list[Clips]:
        training = self.training
        return [Clips(training, bucket, self.feed(number)) for number, bucket in enumerate(training.buckets)]

    def which(self, index: int) -> int:
        return self.training.which(index)

    def title(self, data: int) -> str:
        bucket = self.training.buckets[data]
        return f"{bucket.batch} clips of {bucket.frames} frames"

    def clips(self, data: int) -> int:
        return self.training.buckets[data].batch * self.steps_per_round

    def epoch(self, step: int) -> float | None:
        buckets = [(n, b) for n, b in enumerate(self.training.buckets) if isinstance(b, PreparedClips)]
        if not buckets:
            return None
        rounds = step // self.steps_per_round
        drawn = sum(bisect.bisect_left(self._rounds[n], rounds) * self.training.pool(b) for n, b in buckets)
        folders = {bucket.folder for _, bucket in buckets}
        return drawn / sum(self.prepared[folder].training_clips for folder in folders)

    def feed(self, number: int, *, held_out: int = 0) -> Feed:
        """What a bucket trains on or, with a count, so many clips that are held out."""
        bucket = self.training.buckets[number]
        count, place = (
            held_out or self.training.pool(bucket),
            functools.partial(bisect.bisect_left, self._rounds[number]),
        )
        return feed_of(self, bucket, count=count, place=place, held_out=bool(held_out))

    @functools.cached_property
    def _rounds(self) -> list[list[int]]:
        """For each bucket, the rounds that draw from it."""
        rounds: list[list[int]] = [[] for _ in self.training.buckets]
        for index in range(-(-self.training.steps // self.steps_per_round)):
            rounds[self.which(index)].append(index)
        return rounds

    def measures(self) -> list[Measure]:
        return [self._measure(number) for number in range(len(self.training.buckets))] if self.validate_every else []

    def _measure(self, number: int) -> Measure:
        """The loss on clips that are held out, a part of a step's batch at a time."""
        training, bucket = self.training, self.training.buckets[number]
        part = bucket.batch // training.accumulate
        parts = -(-training.validation.clips // part)
        feed = self.feed(number, held_out=part * parts)

        def measure(models: Models, frozen: PyTree, host: PyTree) -> Array:
            pool, empty = feed.pool(host, frozen, models), feed.null_embedding(frozen, models)
            batch = training.batch(pool, empty, round_key(0, 0), dropout=0.0)
            return means_of(functools.partial(self.loss, models), batch, parts=parts)["loss"]

        return Measure(
            function=measure, frozen=feed.frozen, host=feed.host_batch(0), host_shapes=feed.host_batch_shapes()
        )

    def report(
        self, results: Sequence[PyTree], averages: Callable[[], Mapping[str, Any]], *, step: int, folder: RunFolder
    ) -> dict[str, float]:
        if self.show is not None:
            student = averages()["student"]
            if first_process():
                self.show(student, folder.videos(step))
        losses = [float(loss) for loss in results]
        names = [f"validation/{i}-{bucket.frames}-frames" for i, bucket in enumerate(self.training.buckets)]
        return dict(zip(names, losses, strict=True)) | {"validation/loss": float(np.mean(losses))}


def embed(encoder: UMT5Encoder, tokens: Captions) -> Float[Array, "B L D"]:
    """Prompt embeddings as `rehyat_jax.text.tokenizer.embed_prompts` makes them for sampling, but not padded."""
    text = encoder(tokens.ids, tokens.mask)
    return jnp.where(tokens.mask[..., None] > 0, text, jnp.zeros((), text.dtype))


def flow_loss(
    velocity: Float[Array, "B T h w z"],
    target: Float[Array, "B T h w z"],
    weights: Float[Array, "B T"] | None = None,
    *,
    weight: float = 1.0,
) -> Mean:
    """Mean squared error, in float32 (or wider), over the frames that count; ``weight``: of the mean in a loss."""
    wide = np.promote_types(velocity.dtype, jnp.float32)
    squared = jnp.square(velocity.astype(wide) - target.astype(wide))
    return Mean.of(jnp.mean(squared, axis=(2, 3, 4)), weights, weight=weight)

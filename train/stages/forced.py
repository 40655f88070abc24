"""Train a student through its own state: each chunk of a clip is made from noise, given the clip's chunks before it.

So a stream works: it commits finished chunks, and makes the next from what they left in the state. The state is part of
what learns: gradients go through it, from a chunk's loss to what earlier chunks wrote. This is teacher forcing.

The file defines ``config``, a `train.stages.forced.ForcedTraining`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from rehyat_jax.errors import ConfigError
from rehyat_jax.models.wan.forced import forced
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.text.prompt_encoder import TEXT_LENGTH
from train.data.pools import Pool
from train.engine.arithmetic import forward_flops
from train.engine.gradients import Mean
from train.engine.stage import Models
from train.parallel.devices import Devices
from train.stages.aims import Aim, aim_mean, noised, spread
from train.stages.finetune import FinetuneStage, FinetuneTraining


@dataclasses.dataclass(frozen=True, kw_only=True)
class Past:
    """The chunks before: the clip's own, some of them with a little noise, whose level the model is told."""

    #: Of chunks; the others are as they are.
    share: float = 0.5
    #: The highest noise level.
    noise: float = 0.1

    def __post_init__(self) -> None:
        if not (0 <= self.share <= 1 and 0 <= self.noise < 1):
            raise ConfigError("a past needs a share from 0 to 1, and noise from 0 to below 1")


class ForcedBatch(NamedTuple):
    """Clips of a step, every chunk at a noise level of its own, and the past that each is given."""

    noisy: Float[Array, "B T h w z"]
    sigma: Float[Array, "B T"]
    past: Float[Array, "B T h w z"]
    past_sigma: Float[Array, "B T"]
    #: Noise − video.
    velocity: Float[Array, "B T h w z"]
    text: PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForcedTraining(FinetuneTraining):
    """One run. ``out`` becomes a student's folder in the diffusers layout, whole or not there."""

    past: Past = Past()
    #: Gradients stop at the state after every so many chunks; 0: nowhere, 1: at each, as where a cache is detached.
    stop: int = 0
    remember: Literal["steps"] | float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hybrid is None:
            raise ConfigError("a forced past is of chunks: say by hybrid what the student's are")
        if self.history.share or self.teacher is not None:
            raise ConfigError("history and a softmax teacher are for clips without a forced past: leave them out")
        if self.unroll:
            raise ConfigError("a forced past goes chunk by chunk, in a loop: leave unroll out")
        if self.remember == "steps":
            raise ConfigError('a student of finished chunks commits these: remember is a level, not "steps"')
        if self.stop < 0:
            raise ConfigError(f"stop must be 0 or more, not {self.stop}")

    def stage(self) -> ForcedStage:
        return ForcedStage(self)

    def planned(self, *_: Any, **__: Any) -> NoReturn:
        """
        Raises:
            ConfigError: always; a stream's programs are not sharded.
        """
        raise ConfigError("there is no plan of training with a forced past: it runs on one device")

    def devices(self, *args: Any, **options: Any) -> Devices:
        """
        Raises:
            ConfigError: as `FlowTraining.devices`, or there is a mesh.
        """
        devices = super().devices(*args, **options)
        if devices.mesh is not None:
            raise ConfigError("training with a forced past runs on one device: leave the mesh as it is")
        return devices

    def batch(  # type: ignore[override]
        self, pool: Pool, empty: PyTree, key: Key[Array, ""], *, dropout: float | None = None
    ) -> ForcedBatch:
        """These clips, every chunk at a level of its own, some without their caption."""
        size, frames = pool.latents.shape[:2]
        drop_key, level_key, noise_key, share_key, past_key, context_key = jax.random.split(key, 6)
        chunk = self.hybrid.chunk_frames if self.hybrid is not None else frames
        shape = size, -(-frames // chunk)

        def each_frame(x: Float[Array, "B C"]) -> Float[Array, "B T"]:
            return jnp.repeat(x, chunk, axis=1)[:, :frames]

        even = spread(level_key, *shape)
        sigma = each_frame(self.shift * even / (1 + (self.shift - 1) * even))
        dropped = jax.random.bernoulli(drop_key, self.caption_dropout if dropout is None else dropout, (size,))

        def mixed(rows: Array, empty: Array) -> Array:
            return jnp.where(dropped.reshape(-1, *[1] * (rows.ndim - 1)), empty, rows)

        some = jax.random.bernoulli(share_key, self.past.share, shape)
        context = each_frame(jnp.where(some, self.past.noise * jax.random.uniform(past_key, shape), 0.0))
        noise = jax.random.normal(noise_key, pool.latents.shape)
        return ForcedBatch(
            noisy=noised(pool.latents, noise, sigma),
            sigma=sigma,
            past=noised(pool.latents, jax.random.normal(context_key, pool.latents.shape), context),
            past_sigma=context,
            velocity=noise - pool.latents,
            text=jax.tree.map(mixed, pool.text, empty),
        )

    def velocity(self, model: WanTransformer, batch: ForcedBatch) -> Float[Array, "B T h w z"]:
        """A model's, given the batch's past."""
        rows, _, height, width, _ = batch.noisy.shape
        return forced(
            model,
            batch.noisy,
            1000 * batch.sigma,
            model.read_text(batch.text, TEXT_LENGTH),
            model.init_stream(rows, height, width),
            past=batch.past,
            past_times=1000 * batch.past_sigma,
            text_tokens=TEXT_LENGTH,
            stop=self.stop,
            remat=self.remat,
        ).velocity


class ForcedStage(FinetuneStage):
    """A student learns to go on from the true past."""

    training: ForcedTraining

    def loss(self, models: Models, batch: ForcedBatch) -> dict[str, Mean]:  # type: ignore[override]
        aim = Aim(batch.velocity, jnp.ones_like(batch.sigma))
        return {"loss": aim_mean(self.training.velocity(models["student"], batch), aim)}

    def flops(self, data: int) -> float:
        """A pass is of the noisy frames and of the past's; with its gradient it is three."""
        training, student = self.training, self.student
        clip = 6 * forward_flops(student.config, student.hybrid, shape=self.latent_shape(data))
        return float(clip * training.buckets[data].batch * training.steps_per_round)

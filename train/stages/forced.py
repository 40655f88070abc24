"""Train a student through its own state: each chunk of a clip is made from noise, given the clip's chunks before it.

So a stream works: it commits finished chunks, and makes the next from what they left in the state. The state is part of
what learns: gradients go through it, from a chunk's loss to what earlier chunks wrote. The aim is the clip's own flow
(teacher forcing), or consistency with a student that samples in many guided steps (Song et al., arXiv 2303.01469):
after that a few steps without guidance do.

The file defines ``config``, a `train.stages.forced.ForcedTraining`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from rehyat_jax.errors import ConfigError
from rehyat_jax.models.checkpoints import load_transformer
from rehyat_jax.models.wan.forced import forced
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.runtime.devices import Devices, loading
from rehyat_jax.sampling.condition import Condition
from rehyat_jax.text.prompt_encoder import TEXT_LENGTH
from train.data.pools import Pool
from train.engine.arithmetic import forward_flops
from train.engine.gradients import Mean
from train.engine.stage import Models, Network
from train.stages.aims import Aim, aim_mean, consistency_aim, consistency_grid, noised, spread, spread_levels, wide
from train.stages.finetune import FinetuneStage, FinetuneTraining, PlannedFinetune
from train.stages.from_image import FromImage, shown
from train.stages.sizes import whole_model
from train.stages.students import computing


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
    #: The level below, where the aim has one.
    lower: Float[Array, "B T"] | None
    past: Float[Array, "B T h w z"]
    past_sigma: Float[Array, "B T"]
    #: Noise − video.
    velocity: Float[Array, "B T h w z"]
    text: PyTree
    #: The empty prompt, a row a clip, where the guide has guidance.
    empty: PyTree
    #: What each latent frame counts; None: all alike.
    learned: Float[Array, "B T"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForcedTraining(FinetuneTraining):
    """One run. ``out`` becomes a student's folder in the diffusers layout, whole or not there."""

    aim: Literal["flow", "consistency"] = "consistency"
    past: Past = Past()
    #: Gradients stop at the state after every so many chunks; 0: nowhere, 1: at each, as where a cache is detached.
    stop: int = 0
    #: Consistency: the student whose sampling is distilled; none: the source's own, as it was.
    guide: Path | None = None
    #: Consistency: of the guide's sampling; 1: none.
    guidance_scale: float = 4.0
    #: Consistency: noise levels, even before they are shifted.
    grid_levels: int = 48
    #: Consistency: what the student is sampled with unless a user says otherwise, and its streams' first chunks.
    num_inference_steps: int = 4
    first_chunk_steps: int | None = 4
    remember: Literal["steps"] | float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hybrid is None:
            raise ConfigError("a forced past is of chunks: say by hybrid what the student's are")
        if self.history.share or self.teacher is not None:
            raise ConfigError("history and a softmax teacher are for clips without a forced past: leave them out")
        if self.expert is not None:
            raise ConfigError("a forced past is of a model of one transformer: an expert is finetuned on clips")
        if self.unroll:
            raise ConfigError("a forced past goes chunk by chunk, in a loop: leave unroll out")
        if self.remember == "steps":
            raise ConfigError('a student of finished chunks commits these: remember is a level, not "steps"')
        for name, least in (("stop", 0), ("grid_levels", 1), ("num_inference_steps", 1), ("guidance_scale", 1)):
            if not least <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be {least} or more, not {getattr(self, name)}")

    def stage(self) -> ForcedStage:
        return ForcedStage(self)

    def planned(
        self, among: Sequence[Any], *, size: tuple[int, int], frames: int | None = None, batch: int | None = None
    ) -> PlannedForced:
        # XLA cannot divide the kernels of a stream among devices.
        by: Literal["scan", "pallas"] = "pallas" if len(among) == 1 else "scan"
        return PlannedForced(self._planned(by, frames=frames, batch=batch), among, size=size)

    def devices(self, *args: Any, **options: Any) -> Devices:
        """
        Raises:
            ConfigError: as `FlowTraining.devices`, or the mesh cuts time.
        """
        return whole_streams(super().devices(*args, **options))

    @property
    def defaults(self) -> dict[str, Any]:
        few = few_step_defaults(self.num_inference_steps, self.first_chunk_steps)
        return super().defaults | (few if self.aim == "consistency" else {})

    def batch(  # type: ignore[override]
        self, pool: Pool, empty: PyTree, key: Key[Array, ""], *, dropout: float | None = None
    ) -> ForcedBatch:
        """These clips, every chunk at a level of its own; with the flow's aim some without their caption."""
        size, frames = pool.latents.shape[:2]
        drop_key, level_key, noise_key, share_key, past_key, context_key = jax.random.split(key, 6)
        chunk = self.hybrid.chunk_frames if self.hybrid is not None else frames
        shape = size, -(-frames // chunk)

        def each_frame(x: Float[Array, "B C"]) -> Float[Array, "B T"]:
            return jnp.repeat(x, chunk, axis=1)[:, :frames]

        text, lower, prompts = pool.text, None, None
        rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *x.shape[1:])), empty)
        if self.aim == "consistency":
            grid = consistency_grid(self.grid_levels, self.shift)
            number = spread_levels(level_key, *shape, levels=self.grid_levels)
            sigma, lower = each_frame(grid[number]), each_frame(grid[number - 1])
            prompts = rows if self.guidance_scale > 1 else None
        else:
            even = spread(level_key, *shape)
            sigma = each_frame(self.shift * even / (1 + (self.shift - 1) * even))
            share = self.caption_dropout if dropout is None else dropout
            dropped = jax.random.bernoulli(drop_key, share, (size,))
            text = jax.tree.map(lambda t, e: jnp.where(dropped.reshape(-1, *[1] * (t.ndim - 1)), e, t), text, rows)
        some = jax.random.bernoulli(share_key, self.past.share, shape)
        context = each_frame(jnp.where(some, self.past.noise * jax.random.uniform(past_key, shape), 0.0))
        noise = jax.random.normal(noise_key, pool.latents.shape)
        return ForcedBatch(
            noisy=noised(pool.latents, noise, sigma),
            sigma=sigma,
            lower=lower,
            past=noised(pool.latents, jax.random.normal(context_key, pool.latents.shape), context),
            past_sigma=context,
            velocity=noise - pool.latents,
            text=text,
            empty=prompts,
            learned=pool.learned,
        )

    def velocity(
        self,
        model: WanTransformer,
        batch: ForcedBatch,
        noisy: Array,
        sigma: Array,
        text: Array,
        *,
        condition: Condition | None = None,
        stop: int = 0,
    ) -> Float[Array, "B T h w z"]:
        """A model's, given the batch's past."""
        rows, _, height, width, _ = noisy.shape
        past, image = shown(condition, batch.past)
        return forced(
            model,
            shown(condition, noisy)[0],
            1000 * sigma,
            model.precompute_text_kv(text, TEXT_LENGTH, **image),
            model.init_state(rows, height, width),
            past=past,
            past_times=1000 * batch.past_sigma,
            text_tokens=TEXT_LENGTH,
            stop=stop,
            remat=self.rematerialised,
        ).velocity

    def aim_of(self, models: Models, batch: ForcedBatch, *, condition: Condition | None = None) -> Aim:
        """What the student's velocity is drawn to; ``condition`` is of models that take images."""
        counts = jnp.ones_like(batch.sigma) if batch.learned is None else batch.learned
        if batch.lower is None:
            return Aim(batch.velocity, counts)
        guide, averaged = models["guide"], models.average("student")
        how: Any = {"condition": condition}
        teacher = self.velocity(guide, batch, batch.noisy, batch.sigma, batch.text, **how).astype(jnp.float32)
        if batch.empty is not None:
            without = self.velocity(guide, batch, batch.noisy, batch.sigma, batch.empty, **how).astype(jnp.float32)
            teacher = without + self.guidance_scale * (teacher - without)
        below = batch.noisy - wide(batch.sigma - batch.lower) * teacher
        following = self.velocity(averaged, batch, below, batch.lower, batch.text, **how)
        aim = consistency_aim(teacher, following, batch.sigma, batch.lower)
        return aim._replace(weights=aim.weights * counts)


class ForcedStage(FinetuneStage):
    """A student learns to go on from the true past, with a guide beside it where the aim asks for one."""

    training: ForcedTraining

    @functools.cached_property
    def images(self) -> FromImage | None:
        """
        Raises:
            ConfigError: the model makes videos between two images.
        """
        images = super().images
        if images is not None and images.between:
            raise ConfigError(f"{self.source} makes videos between two images: it has no streams to learn for")
        return images

    @property
    def networks(self) -> dict[str, Network]:
        found = super().networks
        if self.training.aim == "consistency":
            found["guide"] = Network(make=self._guide)
        return found

    def _guide(self) -> WanTransformer:
        training = self.training
        with loading(training.mesh):
            guide = training.student(self.source)
            if training.guide is not None:
                guide = load_transformer(whole_model(training.guide))
        student = self.student
        if (guide.config, guide.hybrid) != (student.config, student.hybrid):
            raise ConfigError(f"{training.guide} is no guide of {self.source}: they differ in sizes or in their blocks")
        return computing(guide, self.dtype)

    def loss(self, models: Models, batch: ForcedBatch) -> dict[str, Mean]:  # type: ignore[override]
        training, condition = self.training, None
        if self.images is not None:
            condition = self.images.condition(models, batch.noisy - wide(batch.sigma) * batch.velocity)
        aim = jax.tree.map(jax.lax.stop_gradient, training.aim_of(models, batch, condition=condition))
        student, how = models["student"], dict[str, Any](condition=condition, stop=training.stop)
        velocity = training.velocity(student, batch, batch.noisy, batch.sigma, batch.text, **how)
        return {"loss": aim_mean(velocity, aim)}

    def flops(self, data: int) -> float:
        """A pass is of the noisy frames and of the past's; with its gradient it is three."""
        training, student = self.training, self.student
        passes = 3 if training.aim == "flow" else 3 + 1 + (2 if training.guidance_scale > 1 else 1)
        clip = 2 * passes * forward_flops(student.config, student.hybrid, shape=self.latent_shape(data))
        return float(clip * training.buckets[data].batch * training.steps_per_round)


class PlannedForced(PlannedFinetune, ForcedStage):
    """The same programs, from shapes."""

    training: ForcedTraining

    def _guide(self) -> WanTransformer:
        return self._transformer(self.training.hybrid)


def whole_streams(devices: Devices) -> Devices:
    """The same devices.

    Raises:
        ConfigError: the mesh cuts time.
    """
    if devices.shape.get("context", 1) > 1:
        raise ConfigError("a stream's time cannot be cut over devices: leave the mesh's context at 1")
    return devices


def few_step_defaults(steps: int, first: int | None) -> dict[str, Any]:
    """What a few-step student is sampled with unless a user says otherwise: so many ``steps`` a chunk, ``first`` in the
    first one, no guidance, fresh noise between steps; offered are halves of the steps, down to one."""
    few = {"num_inference_steps": steps, "guidance_scale": 1.0, "solver": "Renoise"}
    more = {} if first is None else {"first_chunk_steps": first}
    return few | more | {"offered_steps": sorted({max(1, steps >> halved) for halved in range(steps.bit_length())})}

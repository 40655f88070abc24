"""Train a few-step student on its own videos: their distribution is drawn to a softmax teacher's.

The student makes videos as it makes them for a user, chunk after chunk from its state. A teacher says where they should
be, a critic where they are, and the difference of the two scores moves the student: distribution matching (Yin et al.,
arXiv 2311.18828) on own rollouts (Self-Forcing, arXiv 2506.08009), here through the state as well. The critic learns in
every step what the student makes, the student in each so many.

The file defines ``config``, a `train.stages.forcing.ForcingTraining`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from jaxtyping import Array, Float

from rehyat_jax.adapters.training import LoraConfig
from rehyat_jax.errors import ConfigError
from rehyat_jax.mixers.config import BlockMixers, HybridConfig
from rehyat_jax.models.folder import find_model
from rehyat_jax.models.memory import weights_bytes
from rehyat_jax.models.networks import open_component
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.forced import forced
from rehyat_jax.models.wan.remat import Keeps
from rehyat_jax.models.wan.sharding import check_mesh
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.runtime.devices import Devices
from rehyat_jax.runtime.memory import Need
from rehyat_jax.sampling import FlowSchedule, Guidance, Renoise, guided_velocity, sampling_steps
from rehyat_jax.sampling.rollout import Sampler, check_context_noise
from rehyat_jax.sprites import world
from rehyat_jax.text.prompt_encoder import TEXT_LENGTH
from train.data.clips import AnyBucket, Bucket, check_rounds
from train.data.prepared import Prepared, PreparedClips
from train.data.rollouts import Roller, Rollouts, rows_back
from train.engine.gradients import Mean
from train.engine.memory import adapted_learner_bytes, backward_bytes
from train.engine.optimizer import OptimizerConfig
from train.engine.run import RunConfig
from train.engine.stage import Models, Stage
from train.stages.aims import Aim, aim_mean, guess, noised
from train.stages.flow import Validation
from train.stages.forced import few_step_defaults, whole_streams
from train.stages.from_image import shown
from train.stages.planned import latent_shape
from train.stages.rewards import Reward
from train.stages.scores import score_difference, scores_aim
from train.stages.sizes import whole_model
from train.stages.windows import OwnBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForcingTraining(RunConfig):
    """One run. ``out`` becomes a student's folder in the diffusers layout, whole or not there.

    A step is one of the critic's.
    """

    #: The student before: a folder in the diffusers layout, or a bundled model's name.
    source: Path
    #: The softmax model of the real score; of any size, on the same VAE and text encoder.
    teacher: Path
    #: Whose copy the critic begins as; none: the teacher's.
    critic: Path | None = None
    #: Adapters that the student learns in place of its weights, beside what its mixers have of their own.
    lora: LoraConfig = LoraConfig()
    #: Adapters that the critic is, on the frozen weights that it would begin as a copy of: no second set of weights in
    #: float32, and no optimiser's state of them.
    critic_lora: LoraConfig = LoraConfig()
    #: The student's sizes, and the teacher's where they are others, which `rehyat plan` needs before there are folders.
    model: tyro.conf.AvoidSubcommands[WanConfig | None] = None
    teacher_model: tyro.conf.AvoidSubcommands[WanConfig | None] = None
    #: The student's blocks, which a plan needs; none: as they are.
    hybrid: tyro.conf.AvoidSubcommands[HybridConfig | BlockMixers | None] = None
    buckets: tyro.conf.AvoidSubcommands[tuple[Rollouts, ...]]
    #: Steps of the critic on the videos of one rollout; the student learns on the last of them.
    steps_per_round: int = 5
    #: The student learns in each so many steps: whole rounds.
    every: int = 5
    #: How the student samples: in training, and unless a user says otherwise.
    num_inference_steps: int = 4
    first_chunk_steps: int | None = None
    remember: float = 0.0
    #: Of the teacher.
    guidance_scale: float = 4.0
    #: Of the noise levels at which both scores are asked.
    shift: float = 5.0
    #: Gradients stop at the state after every so many chunks; 0: nowhere, 1: at each, as where a cache is detached.
    stop: int = 0
    #: What a video counts; none: all the same.
    reward: tyro.conf.AvoidSubcommands[Reward | None] = None
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=1e-4, schedule="constant", warmup_steps=10, beta1=0.0, beta2=0.999, ema_decay=0.99
    )
    critic_optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=2e-5, schedule="constant", warmup_steps=0, beta1=0.0, beta2=0.999, ema_decay=0.0
    )
    #: Parts that a batch is cut into, one after the other: less memory, the same gradient, summed in float32.
    accumulate: int = 1
    #: Compute each block again in the backward pass, and what of it is kept: as in finetuning.
    remat: bool = True
    remat_keeps: Keeps = "nothing"
    #: The reward of rollouts under captions that training does not see, by the averaged student, and videos.
    validation: Validation = Validation()
    #: Tokens a caption may have; longer ones would be cut.
    caption_tokens: int = 48
    #: Of the computation, and of the teacher's weights; student and critic and their optimisers are in float32.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rounds(self.clips, steps=self.steps, steps_per_round=self.steps_per_round)
        for name, least in (
            *(("every", 1), ("num_inference_steps", 1), ("stop", 0), ("accumulate", 1), ("guidance_scale", 1)),
        ):
            if not least <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be {least} or more, not {getattr(self, name)}")
        if self.every % self.steps_per_round:
            raise ConfigError(f"every ({self.every}) must be a multiple of steps_per_round ({self.steps_per_round})")
        if not (0 < self.shift < math.inf and 1 <= self.caption_tokens <= TEXT_LENGTH):
            raise ConfigError(f"shift must be above 0, and caption_tokens 1 to {TEXT_LENGTH}")
        if check_context_noise(self.remember) == "steps":
            raise ConfigError('a student of finished chunks commits these: remember is a level, not "steps"')
        if self.validation.every and not (self.validation.prompts or self.reward):
            raise ConfigError("validation needs prompts to make videos of, or a reward to measure")
        for rollouts in self.buckets:
            if rollouts.clips.batch % self.accumulate:
                raise ConfigError(
                    f"{rollouts.clips.batch} rows cannot be cut into accumulate = {self.accumulate} parts"
                )

    @property
    def clips(self) -> tuple[AnyBucket, ...]:
        return tuple(rollouts.clips for rollouts in self.buckets)

    @property
    def defaults(self) -> dict[str, Any]:
        """What the result is sampled with unless a user says otherwise."""
        return few_step_defaults(self.num_inference_steps, self.first_chunk_steps) | {"remember": self.remember}

    @property
    def decodes(self) -> bool:
        """Whether its rounds need the VAE."""
        looks = self.reward is not None and not self.reward.of_latents
        return looks or any(rollouts.windows > 1 for rollouts in self.buckets)

    @property
    def rematerialised(self) -> Keeps | None:
        """As models take it."""
        return self.remat_keeps if self.remat else None

    def stage(self) -> Stage:
        from train.stages.forcing_stage import ForcingStage  # which is made of this

        return ForcingStage(self)

    def planned(
        self, among: Sequence[Any], *, size: tuple[int, int], frames: int | None = None, batch: int | None = None
    ) -> Stage:
        """The stage by shapes alone; see `FinetuneTraining.planned`.

        Raises:
            ConfigError: the configuration does not say what the models are, or the mesh does not divide.
        """
        from train.stages.forcing_stage import PlannedForcing

        changes: dict[str, Any] = {name: x for name, x in (("frames", frames), ("batch", batch)) if x is not None}
        buckets = tuple(
            dataclasses.replace(rollouts, clips=dataclasses.replace(rollouts.clips, **changes))
            for rollouts in self.buckets
        )
        # XLA cannot divide the kernels of a stream among devices.
        hybrid = (self.hybrid or HybridConfig()).implemented("pallas" if len(among) == 1 else "scan")
        return PlannedForcing(dataclasses.replace(self, buckets=buckets, hybrid=hybrid), among, size=size)

    def roller(self, rollouts: Rollouts, schedule: FlowSchedule, *, shape: tuple[int, ...], chunk: int) -> Roller:
        """
        Args:
            shape: frames, height, width and channels of a window's latents.
            chunk: latent frames of the student's chunks.

        Raises:
            ConfigError: the schedule has no such steps; a window is no whole number of chunks.
        """
        more = self.first_chunk_steps is not None and self.first_chunk_steps > self.num_inference_steps
        return Roller(
            sampler=Sampler(solver=Renoise(), guidance=Guidance(scale=1.0), context_noise=self.remember),
            steps=sampling_steps(schedule, Renoise(), num_steps=self.num_inference_steps),
            first_steps=sampling_steps(schedule, Renoise(), num_steps=self.first_chunk_steps or 1) if more else None,
            shape=(chunk, shape[1], shape[2], shape[3]),
            chunks=rollouts.chunks(shape[0], chunk=chunk),
            given=rollouts.given,
        )

    def devices(
        self, student: WanTransformer, frames: Sequence[int], *, among: Sequence[jax.Device] | None = None
    ) -> Devices:
        """What the run is on: the mesh's devices, or of those ``among`` which it is planned.

        Args:
            frames: latent ones of each bucket's window.

        Raises:
            ConfigError: the mesh does not divide the devices, the model or the rows, or it cuts time.
        """
        rows = [clips.batch // self.accumulate for clips in self.clips]
        devices = whole_streams(Devices.of(self.mesh, batch=math.gcd(*rows), among=among))
        if devices.mesh is not None:
            for batch, length in zip(rows, frames, strict=True):
                check_mesh(devices.shape, student.config, hybrid=student.hybrid, batch=batch, latent_frames=length)
        return devices

    def critic_loss(self, models: Models, batch: OwnBatch) -> dict[str, Mean]:
        """The critic's flow on finished videos, whatever of them was given."""
        noise, level = _noise(batch, 0), batch.levels[:, :1]
        noisy = noised(batch.video, noise, jnp.broadcast_to(level, batch.weights.shape))
        seen, image = shown(batch.scored, noisy)
        velocity = models["critic"](
            seen, 1000 * level[:, 0], batch.text, text_tokens=TEXT_LENGTH, remat=self.rematerialised, **image
        )
        return {"loss": aim_mean(velocity, Aim(noise - batch.video, jnp.ones_like(batch.weights)))}

    def student_loss(self, models: Models, batch: OwnBatch) -> dict[str, Mean]:
        """The difference of the scores, at the student's guess where each chunk left its steps; and how far that is
        from the teacher's, which says more than the loss."""
        student, (rows, _, height, width, _) = models["student"], batch.video.shape
        like = jax.eval_shape(lambda: student.init_state(rows, height, width))
        noisy, image = shown(batch.condition, batch.noisy)
        velocity = forced(
            student,
            noisy,
            batch.times,
            student.precompute_text_kv(batch.text, TEXT_LENGTH, **image),
            rows_back(batch.state, like, axis=1),
            past=shown(batch.condition, batch.past)[0],
            past_times=batch.past_times,
            first_frame=batch.first_frame[0],
            text_tokens=TEXT_LENGTH,
            stop=self.stop,
            remat=self.rematerialised,
        ).velocity
        counted = (batch.weights > 0).astype(jnp.float32)
        given = jax.lax.stop_gradient(velocity)
        own = guess(batch.noisy, given, batch.sigma)
        video = jnp.where(counted[:, :, None, None, None] > 0, own, batch.video)
        real, fake = self.scores(models, batch, video)
        difference = score_difference(video, real, fake, counted)
        aim = scores_aim(given, difference, batch.sigma, batch.weights)
        gap = jnp.mean(jnp.abs(video - real), axis=(2, 3, 4))
        means = {"loss": aim_mean(velocity, aim), "gap": Mean.of(gap, counted, weight=0.0)}
        return means if batch.rewards is None else means | {"reward": Mean.of(batch.rewards, weight=0.0)}

    def scores(
        self, models: Models, batch: OwnBatch, video: Float[Array, "B T h w z"]
    ) -> tuple[Float[Array, "B T h w z"], Float[Array, "B T h w z"]]:
        """What the teacher, with guidance, and the critic take these videos for, with noise of one level."""
        level, guidance = batch.levels[:, 1:], Guidance(scale=self.guidance_scale)
        noisy = noised(video, _noise(batch, 1), jnp.broadcast_to(level, batch.weights.shape))
        time, wide = 1000 * level[:, 0], level[:, :, None, None, None]
        texts = jnp.stack([batch.text, batch.empty] if guidance.needs_negative else [batch.text])
        teacher, critic = models["teacher"], models["critic"]
        real = guided_velocity(
            functools.partial(teacher, text_tokens=TEXT_LENGTH),
            texts,
            guidance=guidance,
            dtype=teacher.dtype,
            condition=batch.scored,
        )(noisy, time)
        seen, image = shown(batch.scored, noisy)
        fake = critic(seen, time, batch.text, text_tokens=TEXT_LENGTH, **image).astype(jnp.float32)
        return jax.lax.stop_gradient((noisy - wide * real, noisy - wide * fake))

    def memory_need(self) -> Need:
        source, devices = whole_model(self.source), 1 if self.mesh.single else jax.device_count()
        model, vae = open_component(source, "transformer").config, open_component(source, "vae").config
        teacher = find_model(self.teacher)
        critic = find_model(self.critic) if self.critic is not None else teacher
        score = open_component(teacher, "transformer").config
        learning = (
            (source, model, "the student", self.optimizer, self.lora, 4),
            (critic, score, "the critic", self.critic_optimizer, self.critic_lora, jnp.dtype(self.dtype).itemsize),
        )
        parts = {
            f"{what} and its optimiser": adapted_learner_bytes(
                config,
                weights_bytes(folder, "transformer", dtype=jnp.float32) // 4,
                optimizer,
                rank=lora.rank,
                base=base,
            )
            // devices
            for folder, config, what, optimizer, lora, base in learning
        }
        parts |= {
            "the teacher": weights_bytes(teacher, "transformer", dtype=self.dtype) // devices,
            "the VAE": weights_bytes(source, "vae", dtype=self.dtype),
        }
        if model.image_dim is not None:
            parts["the image encoder"] = weights_bytes(source, "image_encoder", dtype=jnp.float32)
        passes = []
        for clips in self.clips:
            if isinstance(clips, PreparedClips):
                shape = Prepared.read_index(clips.folder).plan.latents[:3]
            elif isinstance(clips, Bucket):
                shape = latent_shape(vae, frames=clips.frames, height=world.HEIGHT, width=clips.width)
            rows = -(-clips.batch // (self.accumulate * devices))
            for each, twice in ((model, 2), (score, 1)):  # forced: the exits and what was committed
                tokens = twice * math.prod(side // patch for side, patch in zip(shape, each.patch_size, strict=True))
                passes.append(
                    backward_bytes(each, tokens=tokens, clips=rows, dtype=self.dtype, remat=self.rematerialised)
                )
        return Need(device=parts | {"a step's videos": max(passes)})


def _noise(batch: OwnBatch, which: int) -> Float[Array, "B T h w z"]:
    """Of each row by its own key, so that neither parts nor devices change it."""
    shape = batch.video.shape[1:]
    return jax.vmap(lambda key: jax.random.normal(key, shape))(batch.keys[:, which])

"""Train a few-step student on its own videos: their distribution is drawn to a softmax teacher's.

The student makes videos as it makes them for a user, chunk after chunk from its state. A teacher says where they should
be, a critic where they are, and the difference of the two scores moves the student: distribution matching (Yin et al.,
arXiv 2311.18828) on own rollouts (Self-Forcing, arXiv 2506.08009), here through the state as well. The critic learns in
every step what the student makes, the student in each so many.

The file defines ``config``, a `train.stages.forcing.ForcingTraining`.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from jaxtyping import Array, Float

from rehyat_jax.errors import ConfigError
from rehyat_jax.mixers.config import BlockMixers, HybridConfig
from rehyat_jax.models.checkpoints import load_text_encoder, load_transformer, load_vae
from rehyat_jax.models.folder import find_model, read_scheduler
from rehyat_jax.models.memory import weights_bytes
from rehyat_jax.models.networks import open_component
from rehyat_jax.models.wan.config import VAEConfig, WanConfig
from rehyat_jax.models.wan.forced import forced
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.runtime.memory import Need
from rehyat_jax.sampling import FlowSchedule, Guidance, Renoise, guided_velocity, sampling_steps
from rehyat_jax.sampling.rollout import Sampler, check_context_noise
from rehyat_jax.sprites import world
from rehyat_jax.text.prompt_encoder import TEXT_LENGTH
from rehyat_jax.text.tokenizer import Tokenizer
from train.cli.command import run_training
from train.data.clips import AnyBucket, Bucket, check_rounds, choose
from train.data.pools import Captions, Feed, SpriteFeed
from train.data.prepared import Prepared, PreparedClips, PreparedFeed, open_prepared
from train.data.rollouts import Roller, Rollouts, rows_back
from train.engine.arithmetic import forward_flops
from train.engine.folder import RunFolder
from train.engine.gradients import Mean
from train.engine.memory import backward_bytes, learner_bytes
from train.engine.optimizer import OptimizerConfig
from train.engine.run import RunConfig
from train.engine.stage import Models, Network, Stage, Update
from train.parallel.devices import Devices, first_process, loading
from train.parallel.sharding import check_mesh
from train.stages.aims import Aim, aim_mean, guess, noised
from train.stages.finetune import computing, student_of, write_student
from train.stages.flow import Show, embed, padded_captions
from train.stages.planned import latent_shape
from train.stages.rewards import Reward
from train.stages.scores import score_difference, scores_aim
from train.stages.sizes import check_sizes, whole_model
from train.stages.videos import showing
from train.stages.windows import OwnBatch, Windows


def main(argv: list[str]) -> int:
    """``rehyat forcing CONFIG [--field value …]``; see `run_training`."""
    return run_training("forcing", argv, about=__doc__ or "", kinds=lambda: (ForcingTraining,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """Videos of the averaged student now and then, by its own defaults and the same noise each time."""

    #: Steps from one time to the next; 0: never.
    every: int = 0
    #: Each a video: ``videos/`` beside the checkpoints.
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.every < 0 or (self.every > 0) != bool(self.prompts):
            raise ConfigError("validation has both: prompts, and every so many steps (every above 0)")


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
    #: Keep each block's input alone for the backward pass, and compute the block again there: less memory, more work.
    remat: bool = True
    validation: Shown = Shown()
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
        few = {"num_inference_steps": self.num_inference_steps, "guidance_scale": 1.0, "solver": "Renoise"}
        more = {} if self.first_chunk_steps is None else {"first_chunk_steps": self.first_chunk_steps}
        return few | more | {"remember": self.remember}

    @property
    def decodes(self) -> bool:
        """Whether its rounds need the VAE."""
        looks = self.reward is not None and not self.reward.of_latents
        return looks or any(rollouts.windows > 1 for rollouts in self.buckets)

    def stage(self) -> ForcingStage:
        return ForcingStage(self)

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
        devices = Devices.of(self.mesh, batch=math.gcd(*rows), among=among)
        if devices.shape.get("context", 1) > 1:
            raise ConfigError("a stream's time cannot be cut over devices: leave the mesh's context at 1")
        if devices.mesh is not None:
            for batch, length in zip(rows, frames, strict=True):
                check_mesh(devices.shape, student.config, hybrid=student.hybrid, batch=batch, latent_frames=length)
        return devices

    def critic_loss(self, models: Models, batch: OwnBatch) -> dict[str, Mean]:
        """The critic's flow on finished videos, whatever of them was given."""
        noise, level = _noise(batch, 0), batch.levels[:, :1]
        noisy = noised(batch.video, noise, jnp.broadcast_to(level, batch.weights.shape))
        velocity = models["critic"](noisy, 1000 * level[:, 0], batch.text, text_tokens=TEXT_LENGTH, remat=self.remat)
        return {"loss": aim_mean(velocity, Aim(noise - batch.video, jnp.ones_like(batch.weights)))}

    def student_loss(self, models: Models, batch: OwnBatch) -> dict[str, Mean]:
        """The difference of the scores, at the student's guess where each chunk left its steps; and how far that is
        from the teacher's, which says more than the loss."""
        student, (rows, _, height, width, _) = models["student"], batch.video.shape
        like = jax.eval_shape(lambda: student.init_stream(rows, height, width))
        velocity = forced(
            student,
            batch.noisy,
            batch.times,
            student.read_text(batch.text, TEXT_LENGTH),
            rows_back(batch.state, like, axis=1),
            past=batch.past,
            past_times=batch.past_times,
            first_frame=batch.first_frame[0],
            text_tokens=TEXT_LENGTH,
            stop=self.stop,
            remat=self.remat,
        ).velocity
        counted = (batch.weights > 0).astype(jnp.float32)
        given = jax.lax.stop_gradient(velocity)
        own = guess(batch.noisy, given, batch.sigma)
        video = jnp.where(counted[:, :, None, None, None] > 0, own, batch.video)
        real, fake = self.scores(models, batch, video)
        difference = score_difference(video, real, fake, counted)
        aim = scores_aim(given, difference, batch.sigma, batch.weights)
        gap = jnp.mean(jnp.abs(video - real), axis=(2, 3, 4))
        return {"loss": aim_mean(velocity, aim), "gap": Mean.of(gap, counted, weight=0.0)}

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
            functools.partial(teacher, text_tokens=TEXT_LENGTH), texts, guidance=guidance, dtype=teacher.dtype
        )(noisy, time)
        fake = critic(noisy, time, batch.text, text_tokens=TEXT_LENGTH).astype(jnp.float32)
        return jax.lax.stop_gradient((noisy - wide * real, noisy - wide * fake))

    def memory_need(self) -> Need:
        source, devices = whole_model(self.source), 1 if self.mesh.single else jax.device_count()
        model, vae = open_component(source, "transformer").config, open_component(source, "vae").config
        teacher = find_model(self.teacher)
        critic = find_model(self.critic) if self.critic is not None else teacher
        score = open_component(teacher, "transformer").config
        learning = ((source, "the student", self.optimizer), (critic, "the critic", self.critic_optimizer))
        parts = {
            f"{what} and its optimiser": learner_bytes(
                weights_bytes(folder, "transformer", dtype=jnp.float32) // 4, optimizer
            )
            // devices
            for folder, what, optimizer in learning
        }
        parts |= {
            "the teacher": weights_bytes(teacher, "transformer", dtype=self.dtype) // devices,
            "the VAE": weights_bytes(source, "vae", dtype=self.dtype),
        }
        passes = []
        for clips in self.clips:
            if isinstance(clips, PreparedClips):
                shape = Prepared.read_index(clips.folder).plan.latents[:3]
            elif isinstance(clips, Bucket):
                shape = latent_shape(vae, frames=clips.frames, height=world.HEIGHT, width=clips.width)
            rows = -(-clips.batch // (self.accumulate * devices))
            for each, twice in ((model, 2), (score, 1)):  # forced: the exits and what was committed
                tokens = twice * math.prod(side // patch for side, patch in zip(shape, each.patch_size, strict=True))
                passes.append(backward_bytes(each, tokens=tokens, clips=rows, dtype=self.dtype, remat=self.remat))
        return Need(device=parts | {"a step's videos": max(passes)})


def _noise(batch: OwnBatch, which: int) -> Float[Array, "B T h w z"]:
    """Of each row by its own key, so that neither parts nor devices change it."""
    shape = batch.video.shape[1:]
    return jax.vmap(lambda key: jax.random.normal(key, shape))(batch.keys[:, which])


class ForcingStage(Stage):
    """A student learns from two scores, and a critic what the student makes."""

    def __init__(self, training: ForcingTraining) -> None:
        self.training = training
        self.steps_per_round = training.steps_per_round
        self.validate_every = training.validation.every
        self.updates = (
            Update(role="critic", loss=training.critic_loss, parts=training.accumulate),
            Update(role="student", loss=training.student_loss, every=training.every, parts=training.accumulate),
        )

    @functools.cached_property
    def source(self) -> Path:
        return whole_model(self.training.source)

    @functools.cached_property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.training.dtype)

    @functools.cached_property
    def student(self) -> WanTransformer:
        """Before it has learned."""
        with loading(self.training.mesh):
            student = student_of(load_transformer(self.source), self.training.hybrid, where=self.source)
        check_sizes(self.training.model, student.config, where=self.source)
        return computing(student, self.dtype)

    @functools.cached_property
    def vae(self) -> WanVAE:
        return load_vae(self.source, dtype=self.dtype)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.source)

    @functools.cached_property
    def schedule(self) -> FlowSchedule:
        return read_scheduler(self.source)[0]

    @functools.cached_property
    def prepared(self) -> Mapping[Path, Prepared]:
        return open_prepared(self.training.clips, self.source)

    @functools.cached_property
    def devices(self) -> Devices:
        _ = self.prepared  # before weights are read
        shapes = [self.latent_shape(number) for number in range(len(self.training.buckets))]
        return self.training.devices(self.student, [shape[0] for shape in shapes])

    @property
    def networks(self) -> dict[str, Network]:
        training = self.training
        found = {
            "student": Network(make=lambda: self.student, optimizer=training.optimizer),
            "critic": Network(make=self._critic, optimizer=training.critic_optimizer),
            "teacher": Network(make=self._teacher),
        }
        if any(isinstance(clips, Bucket) for clips in training.clips):  # captions of prepared clips are embedded
            found["text"] = Network(make=lambda: load_text_encoder(self.source, dtype=self.dtype))
        if training.decodes:
            found["vae"] = Network(make=lambda: self.vae)
        return found

    def _teacher(self) -> WanTransformer:
        return self._softmax(self.training.teacher, said=self.training.teacher_model, dtype=self.dtype)

    def _critic(self) -> WanTransformer:
        name = self.training.critic or self.training.teacher
        return computing(self._softmax(name, said=None, dtype=jnp.dtype(jnp.float32)), self.dtype)

    def _softmax(self, name: Path, *, said: WanConfig | None, dtype: jnp.dtype) -> WanTransformer:
        folder = find_model(name)
        with loading(self.training.mesh):
            model = load_transformer(folder, hybrid=None, dtype=dtype)
        check_sizes(said, model.config, where=folder)
        ours, theirs = self.student.config, model.config
        if (ours.in_channels, ours.text_dim) != (theirs.in_channels, theirs.text_dim):
            raise ConfigError(f"{folder} has no score of {self.source}'s videos: latents or text are of other widths")
        return model

    def read(self, models: Models, tokens: Captions) -> Array:
        return embed(models["text"], tokens)

    def feed(self, number: int) -> Feed:
        """Captions and true beginnings of a bucket."""
        training, clips = self.training, self.training.buckets[number].clips
        if isinstance(clips, PreparedClips):
            return PreparedFeed(
                self.prepared[clips.folder],
                count=clips.batch,
                seed=training.seed,
                dtype=self.dtype,
                place=self._place(number),
                rows=self.devices.rows(),
            )
        return SpriteFeed(
            clips,
            count=clips.batch,
            seed=training.seed,
            vae=self.vae,
            tokens=functools.partial(padded_captions, self.tokenizer, length=training.caption_tokens),
            read=self.read,
        )

    def data(self) -> list[Windows]:
        training = self.training
        found = []
        for number, rollouts in enumerate(training.buckets):
            shape = (*self.latent_shape(number), self.student.config.in_channels)
            roller = training.roller(rollouts, self.schedule, shape=shape, chunk=self.student.chunk_frames())
            windows = Windows(
                training,
                rollouts,
                self.feed(number),
                roller=roller,
                student=self.student,
                place=self._place(number),
            )
            found.append(windows)
        return found

    def which(self, index: int) -> int:
        training = self.training
        return choose(training.clips, training.seed, index, progress=index * self.steps_per_round / training.steps)

    def _place(self, number: int) -> Callable[[int], int]:
        """Of a round of the run among those that draw from a bucket."""
        return functools.partial(bisect.bisect_left, self._rounds[number])

    @functools.cached_property
    def _rounds(self) -> list[list[int]]:
        rounds: list[list[int]] = [[] for _ in self.training.buckets]
        for index in range(-(-self.training.steps // self.steps_per_round)):
            rounds[self.which(index)].append(index)
        return rounds

    def flops(self, data: int) -> float:
        """Of a round, the student's share of it as it is due: rollouts, the critic's steps, the replay, the scores."""
        training, student, shape = self.training, self.student, self.latent_shape(data)
        own = forward_flops(student.config, student.hybrid, shape=shape)
        score = forward_flops(self._score_config, None, shape=shape)
        guided = Guidance(scale=training.guidance_scale).evaluations
        learned = (2 * 3 * own + (guided + 1) * score) * training.steps_per_round / training.every
        made = own * (training.num_inference_steps + 1)
        return (made + 3 * training.steps_per_round * score + learned) * training.clips[data].batch

    @functools.cached_property
    def _score_config(self) -> WanConfig:
        """The teacher's sizes; the critic's, where they are others, are counted as these."""
        return open_component(find_model(self.training.teacher), "transformer").config

    def title(self, data: int) -> str:
        clips = self.training.clips[data]
        return f"{clips.batch} own videos of {clips.frames} frames"

    def clips(self, data: int) -> int:
        return self.training.clips[data].batch * self.steps_per_round

    def tokens(self, data: int) -> int:
        shape = zip(self.latent_shape(data), self.student.config.patch_size, strict=True)
        return math.prod(side // patch for side, patch in shape) * self.clips(data)

    def latent_shape(self, number: int) -> tuple[int, int, int]:
        """Latent frames, rows and columns of a bucket's windows."""
        clips = self.training.buckets[number].clips
        if isinstance(clips, PreparedClips):
            frames, rows, columns = self.prepared[clips.folder].plan.latents[:3]
            return frames, rows, columns
        return latent_shape(self.vae_config, frames=clips.frames, height=world.HEIGHT, width=clips.width)

    @property
    def vae_config(self) -> VAEConfig:
        return self.vae.config

    @functools.cached_property
    def show(self) -> Show | None:
        validation = self.training.validation
        if not validation.every:
            return None
        return showing(validation.prompts, folder=self.source, dtype=self.dtype, defaults=self.training.defaults)

    def report(
        self, results: Sequence[Any], averages: Callable[[], Mapping[str, Any]], *, step: int, folder: RunFolder
    ) -> dict[str, float]:
        if self.show is not None:
            student = averages()["student"]
            if first_process():
                self.show(student, folder.videos(step))
        return {}

    def export(self, averages: Mapping[str, Any], folder: Path) -> None:
        write_student(folder, self.source, averages["student"], defaults=self.training.defaults)

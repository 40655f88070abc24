"""The stage of `rehyat forcing`: its networks, its rollouts at work, its result; and the same from shapes alone."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from rehyat_jax.adapters.training import LoraConfig, with_adapters
from rehyat_jax.errors import CheckpointError, ConfigError
from rehyat_jax.mixers.config import Conversion
from rehyat_jax.models.checkpoints import load_text_encoder, load_transformer
from rehyat_jax.models.clip.features import ImageFeatures
from rehyat_jax.models.folder import find_model, read_scheduler
from rehyat_jax.models.networks import open_component
from rehyat_jax.models.wan.config import VAEConfig, WanConfig
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.runtime.devices import Devices, first_process, loading
from rehyat_jax.runtime.variables import AdapterParam, MixerParam
from rehyat_jax.sampling import FlowSchedule, Guidance
from rehyat_jax.sprites import world
from rehyat_jax.weights.files import read_json
from rehyat_jax.weights.writing import write_json
from train.data.clips import Bucket, choose
from train.data.pools import Captions, Feed
from train.data.prepared import Prepared, PreparedClips, open_prepared
from train.data.rollouts import Rollouts
from train.engine.arithmetic import forward_flops
from train.engine.folder import RunFolder
from train.engine.stage import Measure, Models, Network, Stage, Update
from train.stages.feeds import feed_of
from train.stages.flow import embed
from train.stages.forcing import ForcingTraining
from train.stages.from_image import FromImage, takes_image
from train.stages.planned import PlannedFeed, check_planned, latent_shape, planned_model
from train.stages.sizes import check_sizes
from train.stages.sourced import FromSource
from train.stages.students import computing, student_of, write_student
from train.stages.windows import Windows


def adapted(model: WanTransformer, lora: LoraConfig) -> WanTransformer:
    """The model, with adapters beside its blocks' linear layers where it is to have some."""
    return with_adapters(model, lora, within=model.blocks, rngs=nnx.Rngs(0)) if lora.rank else model


#: In a run's folder: the averaged student of the highest reward in a validation, and beside it which that was.
BEST = "best"


class ForcingStage(FromSource, Stage):
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
    def student(self) -> WanTransformer:
        """Before it has learned."""
        with loading(self.training.mesh):
            student = student_of(load_transformer(self.source), self.training.hybrid, where=self.source)
        check_sizes(self.training.model, student.config, where=self.source)
        return computing(student, self.dtype)

    @functools.cached_property
    def features(self) -> ImageFeatures | None:
        """The source's image encoder, where it has one."""
        return None if self.student.config.image_dim is None else ImageFeatures(self.source)

    @functools.cached_property
    def images(self) -> FromImage | None:
        """Of a student that is shown the first frame of the true clip.

        Raises:
            ConfigError: it cannot be trained so.
        """
        if not takes_image(self.student.config, self.vae_config):
            return None
        images = FromImage.of(self.student.config, self.vae_config, self.features)
        if images.between:
            raise ConfigError(f"{self.source} makes videos between two images: it has no streams to learn from")
        if any(rollouts.switches for rollouts in self.training.buckets):
            raise ConfigError(f"{self.source} makes videos from an image, which a row keeps: leave switches out")
        if self.training.validation.prompts:
            raise ConfigError("videos of a validation are made from text: leave its prompts out")
        return images

    @functools.cached_property
    def schedule(self) -> FlowSchedule:
        return read_scheduler(self.source)[0]

    @functools.cached_property
    def prepared(self) -> Mapping[Path, Prepared]:
        return open_prepared(self.training.clips, self.source, held_out=self.training.validation.held_out)

    @functools.cached_property
    def devices(self) -> Devices:
        _ = self.prepared  # before weights are read
        _ = self.images
        shapes = [self.latent_shape(number) for number in range(len(self.training.buckets))]
        return self.training.devices(self.student, [shape[0] for shape in shapes])

    @property
    def networks(self) -> dict[str, Network]:
        training = self.training
        found = {
            "student": Network(
                make=lambda: adapted(self.student, training.lora),
                optimizer=training.optimizer,
                trainable=(AdapterParam, MixerParam) if training.lora.rank else nnx.Param,
            ),
            "critic": Network(
                make=lambda: adapted(self._critic(), training.critic_lora),
                optimizer=training.critic_optimizer,
                trainable=AdapterParam if training.critic_lora.rank else nnx.Param,
            ),
            "teacher": Network(make=self._teacher),
        }
        if any(isinstance(clips, Bucket) for clips in training.clips):  # captions of prepared clips are embedded
            found["text"] = Network(make=lambda: load_text_encoder(self.source, dtype=self.dtype))
        if training.decodes:
            found["vae"] = Network(make=lambda: self.vae)
        if self.images is not None:
            found |= self.images.networks(lambda: self.vae, self.features)
        return found

    def _teacher(self) -> WanTransformer:
        return self._softmax(self.training.teacher, said=self.training.teacher_model, dtype=self.dtype)

    def _critic(self) -> WanTransformer:
        name = self.training.critic or self.training.teacher
        return computing(self._softmax(name, said=None, dtype=self._critic_dtype), self.dtype)

    @property
    def _critic_dtype(self) -> jnp.dtype:
        """Of its weights: what learns is in float32."""
        return self.dtype if self.training.critic_lora.rank else jnp.dtype(jnp.float32)

    def _softmax(self, name: Path, *, said: WanConfig | None, dtype: jnp.dtype) -> WanTransformer:
        folder = find_model(name)
        with loading(self.training.mesh):
            model = load_transformer(folder, hybrid=None, dtype=dtype)
        check_sizes(said, model.config, where=folder)
        ours, theirs = self.student.config, model.config
        if any(getattr(ours, name) != getattr(theirs, name) for name in ("in_channels", "text_dim", "image_dim")):
            raise ConfigError(
                f"{folder} has no score of {self.source}'s videos: latents, text or images are of other widths"
            )
        return model

    def read(self, models: Models, tokens: Captions) -> Array:
        return embed(models["text"], tokens)

    def feed(self, number: int, *, held_out: int = 0) -> Feed:
        """Captions and true beginnings of a bucket or, with a count, so many that are held out."""
        clips = self.training.buckets[number].clips
        how: Any = {"count": held_out or clips.batch, "place": self._place(number), "held_out": bool(held_out)}
        return feed_of(self, clips, **how)

    def data(self) -> list[Windows]:
        buckets = self.training.buckets
        return [self._windows(number, rollouts, self.feed(number)) for number, rollouts in enumerate(buckets)]

    def _windows(self, number: int, rollouts: Rollouts, feed: Feed) -> Windows:
        shape, chunk = (*self.latent_shape(number), self.student.config.out_channels), self.student.chunk_frames()
        roller = self.training.roller(rollouts, self.schedule, shape=shape, chunk=chunk)
        return Windows(
            self.training,
            rollouts,
            feed,
            roller=roller,
            student=self.student,
            place=self._place(number),
            images=self.images,
        )

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
        return self.shape_of(self.training.buckets[number].clips)

    def measures(self) -> list[Measure]:
        training = self.training
        measured = training.validation.every and training.reward is not None
        return [self._measure(number) for number in range(len(training.buckets))] if measured else []

    def _measure(self, number: int) -> Measure:
        """The mean reward of first windows."""
        rollouts, count = self.training.buckets[number], self.training.validation.clips
        alone = Rollouts(clips=dataclasses.replace(rollouts.clips, batch=count), given=rollouts.given)
        windows = self._windows(number, alone, self.feed(number, held_out=count))

        def measure(models: Models, frozen: Any, host: Any) -> Array:
            rewards = windows.draw(models, None, host, frozen)[1](jnp.int32(0)).rewards
            assert rewards is not None
            return jnp.mean(rewards)

        return Measure(function=measure, frozen=windows.frozen, host=windows.host(0), host_shapes=windows.host_shapes())

    def report(
        self, results: Sequence[Any], averages: Callable[[], Mapping[str, Any]], *, step: int, folder: RunFolder
    ) -> dict[str, float]:
        found = [float(result) for result in results]
        named = {f"validation/{n}-reward": reward for n, reward in enumerate(found)}
        best, reward = folder.path / BEST, float(np.mean(found)) if found else math.nan
        improves = bool(found) and not reward <= _reward_of(best)
        if self.show is None and not improves:
            return named
        student = averages()["student"]
        if first_process():
            if self.show is not None:
                self.show(student, folder.videos(step))
            if improves:
                shutil.rmtree(best, ignore_errors=True)
                self.export({"student": student}, best)
                write_json(best.with_suffix(".json"), {"step": step, "reward": reward})
        return named

    def export(self, averages: Mapping[str, Any], folder: Path) -> None:
        training = self.training
        write_student(folder, self.source, averages["student"], defaults=training.defaults, lora=training.lora)


def _reward_of(best: Path) -> float:
    """Of the student that was kept, as it was measured; none: less than any."""
    if not best.is_dir():
        return -math.inf
    try:
        return float(read_json(best.with_suffix(".json"))["reward"])
    except (CheckpointError, KeyError, TypeError, ValueError):
        return -math.inf


class PlannedForcing(ForcingStage):
    """The same programs, from shapes: no weights and no data are read."""

    def __init__(self, training: ForcingTraining, among: Sequence[Any], *, size: tuple[int, int]) -> None:
        super().__init__(training)
        self._among, self._size = among, size
        self.prepared, self.source, self.features = {}, training.source, None
        self.schedule = FlowSchedule(shift=training.shift)

    @functools.cached_property
    def student(self) -> WanTransformer:
        return self._by_shapes(planned_model(self.training.model, self.training.source), self.training.hybrid)

    @functools.cached_property
    def vae(self) -> WanVAE:
        vae = VAEConfig.published_for(planned_model(self.training.model, self.training.source))
        return nnx.eval_shape(lambda: WanVAE(vae, dtype=self.dtype, rngs=nnx.Rngs(0)))

    @functools.cached_property
    def devices(self) -> Devices:
        frames = [self.latent_shape(number)[0] for number in range(len(self.training.buckets))]
        return self.training.devices(self.student, frames, among=self._among)

    @property
    def networks(self) -> dict[str, Network]:
        return {role: network for role, network in super().networks.items() if role != "text"}

    @property
    def _score_config(self) -> WanConfig:
        return self.training.teacher_model or planned_model(self.training.model, self.training.teacher)

    def _teacher(self) -> WanTransformer:
        return self._by_shapes(self._score_config, None, param_dtype=self.dtype)

    def _critic(self) -> WanTransformer:
        """Of the teacher's sizes, or where it is another's copy of the student's."""
        own = self.training.critic is not None
        config = self.student.config if own else self._score_config
        return self._by_shapes(config, None, param_dtype=self._critic_dtype)

    def _by_shapes(
        self, config: WanConfig, hybrid: Conversion | None, *, param_dtype: Any = jnp.float32
    ) -> WanTransformer:
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": param_dtype}
        return nnx.eval_shape(lambda: WanTransformer(config, hybrid=hybrid, **kinds, rngs=nnx.Rngs(0)))

    def feed(self, number: int, *, held_out: int = 0) -> Feed:
        shape = (*self.latent_shape(number), self.vae_config.z_dim)
        return PlannedFeed(self.training.clips[number].batch, shape, self.student.config.text_dim, self.dtype)

    def latent_shape(self, number: int) -> tuple[int, int, int]:
        clips = self.training.buckets[number].clips
        width, height = self._size if isinstance(clips, PreparedClips) else (clips.width, world.HEIGHT)
        check_planned(self.vae_config, self.student.config, frames=clips.frames, size=(width, height))
        return latent_shape(self.vae_config, frames=clips.frames, height=height, width=width)

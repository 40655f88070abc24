"""Train the whole of a converted model by flow matching, on clips longer than its teacher knew.

ReHyAt (arXiv 2601.04342), second stage: after attention distillation every parameter learns, on prompts and videos,
through the causal hybrid. A second term, the student's velocity against a teacher's on the same noisy video, is ours.

The file defines ``config``, a `train.stages.finetune.FinetuneTraining`, or a `train.stages.forced.ForcedTraining`,
whose student learns through its own state, for streams, and for few steps.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from flax import nnx
from jaxtyping import Array, Float, Key

from rehyat_jax.adapters.training import LoraConfig, with_adapters
from rehyat_jax.errors import ConfigError
from rehyat_jax.mixers.config import BlockMixers, Conversion, HybridConfig
from rehyat_jax.models.checkpoints import load_text_encoder
from rehyat_jax.models.checkpoints.loading import open_transformer
from rehyat_jax.models.clip.features import ImageFeatures
from rehyat_jax.models.folder import find_model, read_traits
from rehyat_jax.models.memory import weights_bytes
from rehyat_jax.models.networks import open_component
from rehyat_jax.models.wan.config import VAEConfig, WanConfig
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.runtime.devices import Devices, loading
from rehyat_jax.runtime.memory import Need
from rehyat_jax.runtime.variables import AdapterParam, GateParam, MixerParam
from rehyat_jax.sampling.rollout import check_context_noise
from rehyat_jax.sprites import world
from rehyat_jax.text.prompt_encoder import TEXT_LENGTH
from train.data.clips import Bucket
from train.data.pools import Captions, Feed
from train.data.prepared import Prepared, PreparedClips, open_prepared
from train.engine.arithmetic import forward_flops
from train.engine.gradients import Mean
from train.engine.memory import adapted_learner_bytes, backward_bytes
from train.engine.optimizer import OptimizerConfig, Shares
from train.engine.stage import Models, Network
from train.stages.flow import Batch, FlowStage, FlowTraining, embed, flow_loss
from train.stages.from_image import FromImage, takes_image
from train.stages.history import History
from train.stages.planned import PlannedFeed, check_planned, latent_shape, planned_model
from train.stages.sizes import check_sizes, whole_model
from train.stages.sourced import FromSource
from train.stages.students import computing, student_of, write_student


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneTraining(FlowTraining):
    """One run. ``out`` becomes a student's folder in the diffusers layout, whole or not there."""

    #: A bundled model's name or a model's folder in the diffusers layout: a student, or a teacher to be converted.
    source: Path
    #: Of a source of two experts (Wan2.2's A14B), the one that learns, on the noise levels that it is for; the other
    #: stays as it is. The result is the source of the other's training.
    expert: Literal["high", "low"] | None = None
    #: Leave the source's student alone, if it is one: its teacher is converted as ``hybrid`` says, not distilled.
    anew: bool = False
    #: Its sizes, which `rehyat plan` needs before there is such a folder; none: whatever it has.
    model: tyro.conf.AvoidSubcommands[WanConfig | None] = None
    #: How blocks are converted; none: as the source's are. A student keeps its feature maps, and what it lacks of
    #: this (decay, length) starts as if it were not there.
    hybrid: tyro.conf.AvoidSubcommands[HybridConfig | BlockMixers | None] = None
    #: With a rank, learn adapters alone, and what the conversion adds; the base is frozen. Beside the model, which has
    #: them folded in, the result has them as LoRA files, and with the conversion as one small file over the base.
    lora: LoraConfig = LoraConfig()
    history: History = History()
    #: What the student's streams do unless a user says otherwise: see ``rehyat generate --remember``.
    remember: Literal["steps"] | float = "steps"
    #: Whose velocity the student's is compared with, and the weight of their mean squared difference beside the flow's.
    teacher: Path | None = None
    teacher_weight: float = 0.0
    #: Longer clips are not compared: a teacher knows no more than it was trained on.
    teacher_frames: int = 129
    buckets: tyro.conf.AvoidSubcommands[tuple[Bucket | PreparedClips, ...]] = (
        Bucket(kind="plain", frames=65, batch=64, share=0.3),
        Bucket(kind="plain", frames=129, batch=32, share=0.2),
        Bucket(kind="plain", frames=257, batch=16, share=0.2),
        Bucket(kind="occlusion", frames=129, batch=24, share=0.15, longest_wait=48),
        Bucket(kind="occlusion", frames=257, batch=8, share=0.15, longest_wait=48),
    )
    steps: int = 1000
    optimizer: OptimizerConfig = OptimizerConfig(method="muon", learning_rate=2e-3, warmup_steps=50, ema_decay=0.99)
    #: Learning rate of the feature maps, as a multiple of the rest's.
    hybrid_rate: float = 1.0
    #: The same of a head's decay and power of length, numbers that have far to go from 0.
    gate_rate: float = 50.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("teacher_weight", "hybrid_rate", "gate_rate"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if (self.teacher is None) != (self.teacher_weight == 0):
            raise ConfigError("a teacher needs a teacher_weight above 0, and a teacher_weight needs a teacher")
        if self.teacher is not None and all(bucket.frames > self.teacher_frames for bucket in self.buckets):
            raise ConfigError(f"no bucket's clips are as short as teacher_frames ({self.teacher_frames})")
        if self.history.share and not _causal_chunks(self.hybrid):
            raise ConfigError("history is of causal chunks of one length: say by hybrid what the student's are")
        if self.history.share and self.teacher is not None:
            raise ConfigError("a teacher has seen one noise level for all frames alone: it cannot be beside history")
        check_context_noise(self.remember)

    def stage(self) -> FinetuneStage:
        return FinetuneStage(self)

    def planned(
        self, among: Sequence[Any], *, size: tuple[int, int], frames: int | None = None, batch: int | None = None
    ) -> FinetuneStage:
        """The stage by shapes alone.

        Args:
            among: devices that need not be here.
            size: width and height of prepared clips.
            frames, batch: of every clip, and of a step, in place of the configuration's.

        Raises:
            ConfigError: the configuration does not say what the model is, or the mesh does not divide.
        """
        # As a TPU would choose: what this machine would is another thing.
        return PlannedFinetune(self._planned("pallas", frames=frames, batch=batch), among, size=size)

    def _planned(self, by: Literal["scan", "pallas"], *, frames: int | None, batch: int | None) -> Any:
        """The same with other buckets, its blocks by an implementation where they had been left to ``"auto"``."""
        changes: dict[str, Any] = {name: x for name, x in (("frames", frames), ("batch", batch)) if x is not None}
        buckets = tuple(dataclasses.replace(bucket, **changes) for bucket in self.buckets)
        return dataclasses.replace(self, buckets=buckets, hybrid=(self.hybrid or HybridConfig()).implemented(by))

    def levels(
        self, sigma: Float[Array, " B"], key: Key[Array, ""], *, frames: int
    ) -> tuple[Float[Array, "B *T"], Float[Array, "B T"] | None]:
        """With `History` a level for each chunk."""
        if not self.history.share or self.hybrid is None:
            return sigma, None
        return self.history.levels(sigma, key, frames=frames, chunk=self.hybrid.chunk_frames)

    @property
    def defaults(self) -> dict[str, Any]:
        """What the result is sampled with unless a user says otherwise, where that is not the source's."""
        return {"remember": self.remember}

    def student(self, source: Path) -> WanTransformer:
        """The student before it has learned."""
        model, _ = open_transformer(source, self.part, hybrid=None if self.anew else "auto")
        if self.lora.rank and self.hybrid is None:
            return model  # a LoRA may be of a softmax model too
        return student_of(model, self.hybrid, where=source)

    def write(self, folder: Path, source: Path, student: WanTransformer) -> None:
        """The finished model's folder, whole or not there; with adapters their files in it."""
        write_student(folder, source, student, defaults=self.defaults, lora=self.lora, part=self.part)

    @property
    def part(self) -> Literal["transformer", "transformer_2"]:
        """The folder of what learns."""
        return "transformer_2" if self.expert == "low" else "transformer"

    def at_its_levels(self) -> FinetuneTraining:
        """The same with the noise levels of its expert.

        Raises:
            ConfigError: there are others already.
        """
        if self.expert is None:
            return self
        if self.levels_of != (0.0, 1.0):
            raise ConfigError("an expert has noise levels of its own: leave levels_of out")
        traits = read_traits(whole_model(self.source, expert=self.expert))
        return dataclasses.replace(self, levels_of=traits.levels(self.expert))

    def loss(self, models: Models, batch: Batch, *, longest: int, images: FromImage | None = None) -> dict[str, Mean]:
        """The student's means; clips of up to ``longest`` latent frames are compared with the teacher.

        Args:
            images: of a model that is shown each clip's first frame.
        """
        noisy, times, image = batch.noisy, batch.timesteps, {}
        if images is not None:
            sigma = (times / 1000).reshape(len(noisy), -1, 1, 1, 1)
            condition = images.condition(models, noisy - sigma * batch.velocity)  # of the clips themselves
            noisy, times = condition.seen(noisy, times)
            image = {} if condition.image is None else {"image": condition.image}
        inputs = noisy, times, batch.text
        velocity = models["student"](*inputs, **self.forward, **image)
        means = {"loss": flow_loss(velocity, batch.velocity, batch.weights)}
        if "teacher" in models and batch.noisy.shape[1] <= longest:
            target = jax.lax.stop_gradient(models["teacher"](*inputs, text_tokens=TEXT_LENGTH, **image))
            means["teacher"] = flow_loss(velocity, target, weight=self.teacher_weight)
        return means

    def memory_need(self) -> Need:
        source = whole_model(self.source, expert=self.expert)
        model, vae = open_component(source, "transformer").config, open_component(source, "vae").config
        parameters = weights_bytes(source, "transformer", dtype=jnp.float32) // 4
        devices = 1 if self.mesh.single else jax.device_count()
        parts = {
            "the student and its optimiser": self._learner_bytes(model, parameters) // devices,
            "the VAE": weights_bytes(source, "vae", dtype=self.dtype),
        }
        if self.teacher is not None:
            parts["the teacher"] = weights_bytes(find_model(self.teacher), "transformer", dtype=jnp.float32) // devices
        if any(isinstance(bucket, Bucket) for bucket in self.buckets):
            parts["the text encoder"] = weights_bytes(source, "text_encoder", dtype=self.dtype) // devices
        passes = []
        for bucket in self.buckets:
            if isinstance(bucket, PreparedClips):
                shape = Prepared.read_index(bucket.folder).plan.latents[:3]
            else:
                shape = latent_shape(vae, frames=bucket.frames, height=world.HEIGHT, width=bucket.width)
            tokens = math.prod(side // patch for side, patch in zip(shape, model.patch_size, strict=True))
            clips = -(-bucket.batch // (self.accumulate * devices))
            passes.append(
                backward_bytes(model, tokens=tokens, clips=clips, dtype=self.dtype, remat=self.rematerialised)
            )
        return Need(device=parts | {"a step's clips": max(passes)})

    def _learner_bytes(self, model: WanConfig, parameters: int) -> int:
        return adapted_learner_bytes(model, parameters, self.optimizer, rank=self.lora.rank)

    @property
    def shares(self) -> Shares:
        """Of the learning rate, by variable type."""
        return {GateParam: self.gate_rate, MixerParam: self.hybrid_rate}


class FinetuneStage(FromSource, FlowStage):
    """A converted model learns whole, with or without a teacher beside it."""

    training: FinetuneTraining

    def __init__(self, training: FinetuneTraining) -> None:
        super().__init__(training.at_its_levels())

    @functools.cached_property
    def images(self) -> FromImage | None:
        """Of a model that is shown a clip's first frame."""
        model = self.student.config
        if not takes_image(model, self.vae_config):
            return None
        return FromImage.of(model, self.vae_config, self.features)

    @functools.cached_property
    def features(self) -> ImageFeatures | None:
        """The model's image encoder, where it has one."""
        return None if self.student.config.image_dim is None else ImageFeatures(self.source)

    @functools.cached_property
    def student(self) -> WanTransformer:
        """Before it has learned."""
        with loading(self.training.mesh):
            student = self.training.student(self.source)
        check_sizes(self.training.model, student.config, where=self.source)
        return student

    @functools.cached_property
    def prepared(self) -> Mapping[Path, Prepared]:
        return open_prepared(self.training.buckets, self.source, held_out=self.training.validation.held_out)

    @functools.cached_property
    def devices(self) -> Devices:
        _ = self.prepared  # before weights are read
        student, vae = self.student, self.vae_config
        self.training.check_fits(vae, student.config, where=self.source / "vae", images=self.images is not None)
        if self.training.validation.prompts and (self.images is not None or self.training.expert is not None):
            raise ConfigError("videos of a validation are made from text by one transformer: leave its prompts out")
        return self.training.devices(vae, student.config, student.hybrid)

    @property
    def networks(self) -> dict[str, Network]:
        training = self.training
        found = {
            "student": Network(
                make=self._learner,
                optimizer=training.optimizer,
                trainable=(AdapterParam, MixerParam) if training.lora.rank else nnx.Param,
                shares=training.shares,
            )
        }
        if any(isinstance(bucket, Bucket) for bucket in training.buckets):  # captions of prepared clips are embedded
            found["text"] = Network(make=lambda: load_text_encoder(self.source, dtype=self.dtype))
        if training.teacher is not None:
            found["teacher"] = Network(make=self._teacher)
        if self.images is not None:
            found |= self.images.networks(lambda: self.vae, self.features)
        return found

    def _learner(self) -> WanTransformer:
        model, lora = computing(self.student, self.dtype), self.training.lora
        return model if not lora.rank else with_adapters(model, lora, within=model.blocks, rngs=nnx.Rngs(0))

    def _teacher(self) -> WanTransformer:
        with loading(self.training.mesh):
            teacher, _ = open_transformer(find_model(self.training.teacher or ""), self.training.part, hybrid=None)
        if teacher.config != self.student.config:
            raise ConfigError(f"{self.training.teacher} is no teacher of {self.source}: they are of different sizes")
        return computing(teacher, self.dtype)

    def read(self, models: Models, tokens: Captions) -> Array:
        return embed(models["text"], tokens)

    @property
    def longest(self) -> int:
        """Latent frames of the longest clip that is compared with the teacher."""
        return 1 + (self.training.teacher_frames - 1) // self.vae_config.temporal_factor

    def loss(self, models: Models, batch: Batch) -> dict[str, Mean]:
        return self.training.loss(models, batch, longest=self.longest, images=self.images)

    def flops(self, data: int) -> float:
        training, student = self.training, self.student
        bucket, shape = training.buckets[data], self.latent_shape(data)
        compared = training.teacher is not None and shape[0] <= self.longest
        clip = 3 * forward_flops(student.config, student.hybrid, shape=shape)
        clip += forward_flops(student.config, None, shape=shape) if compared else 0
        return float(clip * bucket.batch * training.steps_per_round)

    def tokens(self, data: int) -> int:
        shape = zip(self.latent_shape(data), self.student.config.patch_size, strict=True)
        return math.prod(side // patch for side, patch in shape) * self.clips(data)

    def latent_shape(self, number: int) -> tuple[int, int, int]:
        """Latent frames, rows and columns of a bucket's clips."""
        return self.shape_of(self.training.buckets[number])

    def export(self, averages: Mapping[str, Any], folder: Path) -> None:
        self.training.write(folder, self.source, averages["student"])


class PlannedFinetune(FinetuneStage):
    """The same programs, from shapes: no weights and no data are read."""

    def __init__(self, training: FinetuneTraining, among: Sequence[Any], *, size: tuple[int, int]) -> None:
        FlowStage.__init__(self, training)  # which noise levels are an expert's says a folder that need not be here
        self._among, self._size = among, size
        self.prepared, self.source = {}, training.source
        self.vae_config = VAEConfig.published_for(planned_model(training.model, training.source))
        self.features = None
        self.vae = nnx.eval_shape(lambda: WanVAE(self.vae_config, dtype=self.dtype, rngs=nnx.Rngs(0)))

    @functools.cached_property
    def student(self) -> WanTransformer:
        return self._transformer(self.training.hybrid)

    @functools.cached_property
    def devices(self) -> Devices:
        student = self.student
        return self.training.devices(self.vae_config, student.config, student.hybrid, among=self._among)

    @property
    def networks(self) -> dict[str, Network]:
        return {role: network for role, network in super().networks.items() if role != "text"}

    def _teacher(self) -> WanTransformer:
        return self._transformer(None)

    def _transformer(self, hybrid: Conversion | None) -> WanTransformer:
        model = planned_model(self.training.model, self.training.source)
        return nnx.eval_shape(lambda: WanTransformer(model, hybrid=hybrid, dtype=self.dtype, rngs=nnx.Rngs(0)))

    def feed(self, number: int, *, held_out: int = 0) -> Feed:
        shape = (*self.latent_shape(number), self.vae_config.z_dim)
        return PlannedFeed(
            self.training.pool(self.training.buckets[number]), shape, self.student.config.text_dim, self.dtype
        )

    def latent_shape(self, number: int) -> tuple[int, int, int]:
        bucket = self.training.buckets[number]
        width, height = self._size if isinstance(bucket, PreparedClips) else (bucket.width, world.HEIGHT)
        check_planned(self.vae_config, self.student.config, frames=bucket.frames, size=(width, height))
        return latent_shape(self.vae_config, frames=bucket.frames, height=height, width=width)


def _causal_chunks(hybrid: Conversion | None) -> bool:
    """Whether the converted blocks have chunks of one length, which see no later ones."""
    mixers = () if hybrid is None else hybrid.distinct()
    return len({mixer.chunk_frames for mixer in mixers}) == 1 and not any(mixer.why_not_stream() for mixer in mixers)

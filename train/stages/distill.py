"""Attention distillation: a teacher's blocks learn, each by itself, to do without most of their softmax.

The first stage of a conversion after ReHyAt (arXiv 2601.04342): the teacher samples from prompts alone; at each step a
forward pass of it gives every block's q, k, v and softmax output, and each block's feature maps φ learn to reproduce
that output as a hybrid. The file defines ``config``, a `train.stages.distill.DistillTraining`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

from rehyat_jax.errors import CheckpointError, ConfigError
from rehyat_jax.mixers.config import BlockMixers, HybridConfig
from rehyat_jax.models.memory import text_encoder_bytes, transformer_bytes, weights_bytes
from rehyat_jax.models.networks import open_component
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.mixing import Mixing
from rehyat_jax.models.wan.sharding import check_mesh
from rehyat_jax.runtime.devices import Devices, first_process
from rehyat_jax.runtime.memory import Need
from rehyat_jax.runtime.record import Phases
from rehyat_jax.sampling import FlowSchedule, Guidance, Solver
from train.data.sources import Source
from train.data.trajectories import Sampling, Trajectories
from train.engine.arithmetic import distillation_flops
from train.engine.optimizer import OptimizerConfig
from train.engine.run import RunConfig
from train.stages.attention_loss import LossName, check_learns
from train.stages.choice import Choice, Chosen
from train.stages.from_image import takes_image
from train.stages.learner import Learner
from train.stages.sizes import whole_model

if TYPE_CHECKING:
    from train.stages.distill_stage import DistillStage  # made from such a configuration


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillTraining(RunConfig):
    """One run. ``out`` becomes the teacher's folder with a ``rehyat`` part, whole or not there."""

    #: A bundled model's name, or a model's folder in the diffusers layout. Its own weights stay as they are. A causal
    #: few-step model, as `rehyat convert` makes one of a public file, teaches its own window of softmax, on videos that
    #: it streams at its own levels; the student streams at these.
    teacher: Path = Path("mini-sprites")
    #: Its sizes, which `rehyat plan` needs before there is such a folder; none: whatever it has.
    model: tyro.conf.AvoidSubcommands[WanConfig | None] = None
    hybrid: tyro.conf.AvoidSubcommands[HybridConfig | BlockMixers] = HybridConfig()
    #: Only so many of the converted blocks stay converted in the result: those with the smallest held-out error.
    best: int | None = None
    #: Of a teacher of two experts (Wan2.2's A14B), the one that is learned from, at the noise levels that it is for;
    #: the other stays as it is. The result is the teacher of the other's distillation.
    expert: Literal["high", "low"] | None = None
    #: In place of ``hybrid``: each block's mixer is chosen among several, by its error and its time on this device.
    choice: tyro.conf.AvoidSubcommands[Choice | None] = None
    sources: tuple[Source, ...] = (Source(frames=65, batch=32),)
    #: Of the teacher's sampling; at a guidance of 1 or less there is no branch of the empty prompt.
    num_inference_steps: int = 20
    #: Have ftfy repair prompts, as Wan's own code does.
    repair_prompts: bool = True
    guidance_scale: float = 4.0
    #: Flow shifts that the trajectories take in turn, for a wider mix of noise levels; none: the model's own.
    shifts: tuple[float, ...] = ()
    #: "l1": the error of the output, as published. "score": of the weights; see `score_loss`.
    loss: LossName = "l1"
    #: The points of one forward pass of the teacher serve so often, and in so many parts, an optimiser step each.
    updates_per_point: int = 1
    minibatches: int = 1
    #: Of the optimiser, every block's.
    steps: int = 2000
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-3, warmup_steps=50, weight_decay=0.0)
    #: Prompts of each source that measure, and the rounds from one measurement to the next; 0: at the end alone.
    held_out: int = 8
    measure_rounds: int = 250
    #: Of the computation, and of the teacher's weights; φ and its optimiser are in float32.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in {
            "updates_per_point": 1,
            "minibatches": 1,
            "held_out": 1,
            "measure_rounds": 0,
            "num_inference_steps": 1,
        }.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not sum(source.share for source in self.sources) > 0:
            raise ConfigError("at least one source must have a share above 0")
        for source in self.sources:
            if self._rows(source) % self.minibatches:
                raise ConfigError(
                    f"{self._rows(source)} points ({source.batch} x {self._rows(source) // source.batch} evaluations "
                    f"of guidance) cannot be cut into {self.minibatches} minibatches"
                )
        check_learns(self.hybrid.distinct() if self.choice is None else self.choice.candidates, self.loss)
        if self.choice is not None and self.best is not None:
            raise ConfigError("a choice has a budget, and best is a choice of its own: one of them")

    @property
    def steps_per_round(self) -> int:
        """Optimiser steps on one forward pass of the teacher."""
        return self.updates_per_point * self.minibatches

    def _rows(self, source: Source) -> int:
        return source.batch * (Guidance(scale=self.guidance_scale).evaluations if source.samples else 1)

    def memory_need(self) -> Need:
        teacher = whole_model(self.teacher, expert=self.expert)
        model, vae = open_component(teacher, "transformer").config, open_component(teacher, "vae").config
        weights = weights_bytes(teacher, "transformer", dtype=self.dtype)
        devices = 1 if self.mesh.single else jax.device_count()
        passes = []
        for source in self.sources:
            shape = source.latent_shape(vae, model)[:3]
            tokens = math.prod(side // patch for side, patch in zip(shape, model.patch_size, strict=True))
            rows = -(-self._rows(source) // devices)
            passes.append(transformer_bytes(model, tokens=tokens, batch=rows, dtype=self.dtype, weights=weights))
        parts = {
            "the teacher": weights // devices,
            "the text encoder": text_encoder_bytes(teacher, dtype=self.dtype),
            "a round's trajectories": max(passes),
        }
        if takes_image(model, vae):
            parts["the VAE"] = weights_bytes(teacher, "vae", dtype=self.dtype)
        if model.image_dim is not None:
            parts["the image encoder"] = weights_bytes(teacher, "image_encoder", dtype=jnp.float32)
        return Need(device=parts)

    def run(self, phases: Phases | None = None, *, change: bool = False, force: bool = False) -> None:
        if self.choice is not None and not self.choice_file.exists():
            from train.stages.candidates import CandidatesTraining  # which is such a run itself

            self.check_result()
            CandidatesTraining.of(self).run(phases, change=change, force=force)
        super().run(phases, change=change, force=force)

    def stage(self) -> DistillStage:
        from train.stages.distill_stage import DistillStage
        from train.stages.streamed_distill import StreamedDistillStage, causal_mixer

        if (causal := causal_mixer(whole_model(self.teacher, expert=self.expert))) is None:
            return DistillStage(self if self.choice is None else self.chosen())
        if self.choice is not None:
            raise ConfigError("mixers are chosen for a softmax teacher; of a causal one give a hybrid")
        return StreamedDistillStage(self, causal)

    @property
    def choice_file(self) -> Path:
        """The choice, once it is made."""
        return self.train_folder / "choice.json"

    def chosen(self) -> DistillTraining:
        """The run with the mixers that were chosen.

        Raises:
            CheckpointError: no choice was made yet, or its file is damaged.
            ConfigError: it was among others.
        """
        if not self.choice_file.exists():
            raise CheckpointError(f"{self.choice_file} does not exist: no choice was made yet")
        chosen, choice = Chosen.read(self.choice_file), self.choice
        if choice is None or (chosen.candidates, chosen.share) != (choice.all, choice.budget):
            raise ConfigError(f"{self.choice_file} is of other candidates or another budget; choose another --out")
        if first_process():
            print(chosen)
        return dataclasses.replace(self, hybrid=chosen.mixers, choice=None)

    def mixing(self, model: WanConfig) -> Mixing:
        """The mixers that learn, and in which blocks."""
        return Mixing.of(self.hybrid, model.num_layers)

    def planned(
        self, among: Sequence[Any], *, size: tuple[int, int], frames: int | None = None, batch: int | None = None
    ) -> DistillStage:
        """The stage by shapes alone, on the teacher's own trajectories; see `FinetuneTraining.planned`.

        Raises:
            ConfigError: the configuration does not say what the model is, or the mesh does not divide.
        """
        if self.choice is not None:
            raise ConfigError("which mixers are chosen is known once they are measured: a plan needs a hybrid")
        changes: dict[str, Any] = {name: x for name, x in (("frames", frames), ("batch", batch)) if x is not None}
        sizes: dict[str, Any] = {} if self.sources[0].of_sprites else {"width": size[0], "height": size[1]}
        sources = tuple(dataclasses.replace(source, **changes, **sizes) for source in self.sources)
        # As a TPU would choose: what this machine would is another thing.
        hybrid = self.hybrid.implemented("pallas")
        from train.stages.distill_planned import PlannedDistill

        return PlannedDistill(dataclasses.replace(self, sources=sources, hybrid=hybrid), among)

    def devices(
        self, model: WanConfig, shapes: Sequence[tuple[int, ...]], *, among: Sequence[jax.Device] | None = None
    ) -> Devices:
        """What the run is on: the mesh's devices, or of those ``among`` which it is planned.

        Args:
            shapes: of every source's latents.

        Raises:
            ConfigError: the mesh does not divide the devices, the model, the trajectories, a minibatch of their points
                or the held-out prompts.
        """
        chunk = model.patch_size[0] * self.hybrid.chunk_frames
        batch = math.gcd(self.held_out, *(source.batch for source in self.sources))
        chunks = max(min(shape[0] for shape in shapes) // chunk, 1)
        devices = Devices.of(self.mesh, chunks=chunks, batch=batch, among=among)
        if devices.mesh is not None:
            for source, shape in zip(self.sources, shapes, strict=True):
                for clips in (source.batch, self.held_out):
                    check_mesh(devices.shape, model, hybrid=self.hybrid, batch=clips, latent_frames=shape[0])
                if (rows := self._rows(source) // self.minibatches) % (pieces := devices.batch_pieces):
                    raise ConfigError(
                        f"{rows} points of a minibatch ({self._rows(source)} in {self.minibatches}) do not divide by "
                        f"data x fsdp = {pieces} of the mesh"
                    )
        return devices

    def learner(self, model: WanConfig, *, sampling: Trajectories) -> Learner:
        """What makes the programs."""
        return Learner(
            config=model,
            mixing=self.mixing(model),
            sampling=sampling,
            optimizer=self.optimizer,
            loss=self.loss,
            updates_per_point=self.updates_per_point,
            minibatches=self.minibatches,
        )

    def flops(self, model: WanConfig, source: Source, shape: tuple[int, ...]) -> int:
        """Floating-point operations of a round."""
        mixing = self.mixing(model)
        mixers = [mixer for mixer in mixing.converted_groups for _ in mixing.blocks(mixer)]
        return self._rows(source) * distillation_flops(
            model, mixers, shape=(shape[0], shape[1], shape[2]), updates=self.updates_per_point
        )

    def blocks(self, model: WanConfig) -> Any:
        """The converted blocks' mixers before they have learned."""
        made = self.mixing(model).make(
            model,
            dtype=jnp.dtype(self.dtype),
            param_dtype=jnp.float32,
            rngs=nnx.Rngs(self.seed),
        )
        assert made is not None
        return made

    def sampling(self, schedule: FlowSchedule, solver: Solver, *, levels: tuple[float, float] = (0.0, 1.0)) -> Sampling:
        """The teacher's, of a model with this schedule and solver, at these noise levels."""
        return Sampling(
            schedules=tuple(dataclasses.replace(schedule, shift=shift) for shift in self.shifts or (schedule.shift,)),
            solver=solver,
            grid_steps=self.num_inference_steps,
            guidance=Guidance(scale=self.guidance_scale),
            levels=levels,
        )

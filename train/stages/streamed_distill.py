"""Distillation of a causal few-step teacher: its window of softmax is what the mixers learn to do with a state."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path

from rehyat_jax.errors import ConfigError
from rehyat_jax.mixers.base import MixerConfig
from rehyat_jax.models.checkpoints.loading import load_transformer
from rehyat_jax.models.folder import STUDENTS_DEFAULTS, Defaults, defaults_files, read_defaults, read_scheduler
from rehyat_jax.models.memory import student_config
from rehyat_jax.models.networks import open_component
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.runtime.devices import Devices, loading
from rehyat_jax.sampling import Guidance, sampling_steps
from rehyat_jax.sampling.rollout import Sampler
from rehyat_jax.sampling.solvers import Renoise
from train.data.sources import Inputs
from train.data.streams import OwnStreams, StreamSampling
from train.engine.arithmetic import forward_flops
from train.stages.attending import Streamed
from train.stages.distill import DistillTraining
from train.stages.distill_stage import DistillStage, draw_key
from train.stages.forced import whole_streams
from train.stages.learner import Learner
from train.stages.sizes import check_sizes


def causal_mixer(folder: Path) -> MixerConfig | None:
    """The mixer of every block of a model whose own part has no parameters: a public causal few-step model's window.

    None: it is a softmax teacher, or a student.
    """
    conversion = student_config(folder)
    if conversion is None:
        return None
    depth = open_component(folder, "transformer").config.num_layers
    mixers = set(conversion.mixers(depth))
    mixer = next(iter(mixers))
    return mixer if len(mixers) == 1 and mixer.converts and not mixer.losses else None


class StreamedDistillStage(DistillStage):
    """As `DistillStage`, of a causal teacher: on videos that it streams, at its own levels.

    Raises:
        ConfigError: the settings are not those of such a teacher.
    """

    def __init__(self, training: DistillTraining, teacher: MixerConfig) -> None:
        super().__init__(training)
        self._mixer = teacher
        if training.expert is not None or self.clips_given is not None:
            raise ConfigError("a causal teacher is learned from that makes videos of text by one transformer")
        of_softmax = {field.name: field.default for field in dataclasses.fields(training)}
        for name in ("num_inference_steps", "guidance_scale"):
            own = getattr(self.defaults, name)
            if getattr(training, name) not in (own, of_softmax[name]):
                raise ConfigError(f"this causal teacher is sampled at its own {name}, {own}: leave {name} out")
        if training.shifts or training.loss != "l1":
            raise ConfigError("a causal teacher is learned from by the l1 loss, at its own levels: leave shifts out")
        if self.defaults.guidance_scale > 1 or self.defaults.remember == "steps":
            raise ConfigError("a causal teacher makes its videos without guidance, and remembers finished chunks")
        chunks = {mixer.chunk_frames for mixer in self.learner.mixing.converted_groups}
        if chunks != {teacher.chunk_frames}:
            raise ConfigError(
                f"the teacher makes chunks of {teacher.chunk_frames} latent frames, and so must the mixers that learn: "
                f"not {', '.join(map(str, sorted(chunks)))}"
            )
        for source, shape in zip(training.sources, self.shapes, strict=True):
            if not source.samples:
                raise ConfigError("a causal teacher is learned from on its own videos: leave videos and prepared out")
            if shape[0] % teacher.chunk_frames:
                raise ConfigError(
                    f"{source.frames} frames are {shape[0]} latent ones, and no whole number of chunks of "
                    f"{teacher.chunk_frames}"
                )
            if source.batch % training.minibatches:
                raise ConfigError(f"{source.batch} videos cannot be cut into {training.minibatches} minibatches")

    @functools.cached_property
    def defaults(self) -> Defaults:
        return read_defaults(self.folder)

    @functools.cached_property
    def teacher(self) -> WanTransformer:
        with loading(self.training.mesh):
            teacher = load_transformer(self.folder, dtype=self.dtype)
        check_sizes(self.training.model, teacher.config, where=self.folder)
        return teacher

    @functools.cached_property
    def streams(self) -> StreamSampling:
        """
        Raises:
            ConfigError: its solver is another than such models'.
        """
        schedule, solver = read_scheduler(self.folder)
        if not isinstance(solver, Renoise):
            raise ConfigError(f"a causal few-step teacher's solver is Renoise, not {type(solver).__name__}")
        defaults = self.defaults
        first = defaults.first_chunk_steps or 0
        return StreamSampling(
            sampler=Sampler(solver=solver, guidance=Guidance(scale=1.0), context_noise=defaults.remember),
            steps=sampling_steps(schedule, solver, num_steps=defaults.num_inference_steps),
            first_steps=sampling_steps(schedule, solver, num_steps=first)
            if first > defaults.num_inference_steps
            else None,
            chunk=self._mixer.chunk_frames,
        )

    @functools.cached_property
    def devices(self) -> Devices:
        return whole_streams(super().devices)

    @functools.cached_property
    def learner(self) -> Learner:
        learner = self.training.learner(self.model, sampling=self.streams)
        return dataclasses.replace(learner, attending=Streamed(self._mixer))

    def _inputs(self, place: int, texts: Callable[[int], str] | None) -> Inputs:
        assert texts is not None
        return OwnStreams(
            self.training.sources[place].batch,
            sampling=self.streams,
            texts=texts,
            embed=self.embed,
            shape=self.shapes[place],
            key=draw_key(self.training.seed, 1 + place),
        )

    def round_flops(self, place: int) -> float:
        """The videos are made as well, each step and the finished chunk."""
        shape, training = self.shapes[place], self.training
        made = forward_flops(self.model, student_config(self.folder), shape=shape[:3])
        videos = training.sources[place].batch * (self.streams.num_steps + 1)
        return super().round_flops(place) + float(videos * made)

    def write_beside(self, folder: Path) -> None:
        """The student is run at the teacher's own levels."""
        for file in defaults_files(self.folder)[-1:]:
            shutil.copyfile(file, folder / STUDENTS_DEFAULTS)

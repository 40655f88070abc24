"""Attention distillation: a teacher's blocks learn, each by itself, to do without most of their softmax.

The first stage of a conversion after ReHyAt (arXiv 2601.04342): the teacher samples from prompts alone; at each step a
forward pass of it gives every block's q, k, v and softmax output, and each block's feature maps φ learn to reproduce
that output as a hybrid. The file defines ``config``, a `train.stages.distill.DistillTraining`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jaxtyping import Array, Int, Key, PyTree

from rehyat_jax.errors import CheckpointError, ConfigError, RehyatError
from rehyat_jax.mixers.config import BlockMixers, HybridConfig
from rehyat_jax.models.checkpoints import load_text_encoder, load_transformer, load_vae
from rehyat_jax.models.folder import find_model, read_scheduler
from rehyat_jax.models.wan.config import VAEConfig, WanConfig
from rehyat_jax.models.wan.mixing import Mixing
from rehyat_jax.models.wan.student import write_student
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.runtime.compilation import cache_folder
from rehyat_jax.runtime.record import Phases
from rehyat_jax.sampling import FlowSchedule, Guidance, Solver
from rehyat_jax.text.prompt_encoder import PromptEncoder
from rehyat_jax.text.tokenizer import Tokenizer, embed_prompts
from rehyat_jax.weights.files import read_json
from rehyat_jax.weights.writing import whole_folder
from train.cli.command import run_training
from train.data.sources import Embed, Inputs, NoisyClips, OwnTrajectories, PreparedInputs, Source, prepared_sources
from train.data.trajectories import Sampling
from train.engine.arithmetic import distillation_flops
from train.engine.checkpoint import Checkpoints
from train.engine.loop import compile_all, run
from train.engine.optimizer import OptimizerConfig, Skipped, TrainState
from train.parallel.devices import Devices, Processes, first_process, loading, wait_for_all
from train.parallel.sharding import MeshConfig, check_mesh
from train.stages.attention_loss import LossName, check_learns
from train.stages.block_choice import choose_blocks
from train.stages.blockwise import Figures
from train.stages.learner import Learner
from train.stages.sizes import check_sizes

#: What a result has from its teacher, as it is there; the transformer's folder gets a ``rehyat`` part.
_KEPT = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json", "rehyat_defaults.json")


class DistillState(NamedTuple):
    """All that a run carries from round to round."""

    step: Int[Array, ""]
    #: Each converted group's mixers and optimisers over a leading axis of its blocks, as `Mixing.joined` has them; None
    #: for a group without parameters.
    blocks: PyTree
    #: What each source carries.
    carried: tuple[PyTree, ...]

    @property
    def skipped(self) -> Skipped:
        """Of each block that learns."""
        groups = jax.tree.leaves(self.blocks, is_leaf=lambda x: isinstance(x, TrainState))
        return jax.tree.map(lambda *counts: jnp.concatenate(counts), *(group.skipped for group in groups))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillTraining:
    """One run. ``out`` becomes the teacher's folder with a ``rehyat`` part, whole or not there."""

    out: Path
    #: A bundled model's name, or a model's folder in the diffusers layout. Its own weights stay as they are.
    teacher: Path = Path("mini-sprites")
    #: Its sizes, which `rehyat plan` needs before there is such a folder; none: whatever it has.
    model: tyro.conf.AvoidSubcommands[WanConfig | None] = None
    hybrid: tyro.conf.AvoidSubcommands[HybridConfig | BlockMixers] = HybridConfig()
    #: Only so many of the converted blocks stay converted in the result: those with the smallest held-out error.
    best: int | None = None
    sources: tuple[Source, ...] = (Source(frames=65, batch=32),)
    #: Of the teacher's sampling; at a guidance of 1 or less there is no branch of the empty prompt.
    num_inference_steps: int = 20
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
    seed: int = 0
    #: Between two checkpoints; 0 saves after every round.
    checkpoint_seconds: float = 60.0
    #: Devices along each axis; by default one device is used.
    mesh: MeshConfig = MeshConfig(fsdp=1)
    processes: Processes = Processes()

    def __post_init__(self) -> None:
        for name, least in {
            "steps": 1,
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
                    f"{self._rows(source)} points ({source.batch} x {self._rows(source) // source.batch} branches of "
                    f"guidance) cannot be cut into {self.minibatches} minibatches"
                )
        check_learns(self.hybrid, self.loss)

    @property
    def result(self) -> Path:
        """The folder that stands when the run is done, and not before."""
        return self.out

    @property
    def train_folder(self) -> Path:
        """Checkpoints and metrics, beside the result."""
        return self.out.with_name(f"{self.out.name}-train")

    @property
    def steps_per_round(self) -> int:
        """Optimiser steps on one forward pass of the teacher."""
        return self.updates_per_point * self.minibatches

    def _rows(self, source: Source) -> int:
        return source.batch * (Guidance(scale=self.guidance_scale).branches if source.samples else 1)

    def run(self, phases: Phases | None = None) -> None:
        """Train, or continue a run that was stopped; ``phases`` takes times and memory.

        What is measured on held-out prompts goes, block by block, to ``blocks.jsonl`` beside ``metrics.jsonl``.

        Raises:
            RehyatError: ``out`` is there already, or training diverged.
            CheckpointError: the teacher is no such model; checkpoints of another model; a full disk.
            ConfigError: blocks or clips do not fit the teacher; prompts cannot be read.
            Stopped: by a signal; see `train.engine.loop.run`.
        """
        if self.result.exists():
            raise RehyatError(f"{self.out} is there already; choose another --out")
        phases, folder = phases or Phases(), find_model(self.teacher)
        if not (folder / "model_index.json").is_file():
            raise CheckpointError(f"{folder} is no whole model in the diffusers layout; rehyat convert can make one")
        with loading(self.mesh):
            teacher = load_transformer(folder, dtype=jnp.dtype(self.dtype), hybrid=None)
        distillation = Distillation(self, teacher, folder)
        with phases.measure("compile"):
            distillation.compile()
        with phases.measure("train"):
            state = run(
                distillation.state,
                distillation.advance,
                steps=self.steps,
                steps_per_advance=self.steps_per_round,
                folder=self.train_folder,
                checkpoint_seconds=self.checkpoint_seconds,
                flops=distillation.flops,
                devices=distillation.devices.count,
            )
        with phases.measure("measure"):
            error = distillation.measure(state).error
        with phases.measure("save"):
            averaged = distillation.devices.on_host(distillation.averaged(state))
            if first_process():
                self._write(self.result, folder, distillation, averaged, error)
            wait_for_all("result")

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

    def learner(self, model: WanConfig, teacher: Any, *, sampling: Sampling, devices: Devices) -> Learner:
        """What makes the programs; ``teacher``: its graph."""
        mixing = Mixing.of(self.hybrid, model.num_layers)
        blocks = nnx.eval_shape(lambda: self.blocks(model))
        return Learner(
            config=model,
            mixing=mixing,
            teacher=teacher,
            graphs=[nnx.split(group)[0] for group in mixing.parted(blocks)],
            sampling=sampling,
            optimizer=self.optimizer,
            loss=self.loss,
            updates_per_point=self.updates_per_point,
            minibatches=self.minibatches,
            devices=devices,
        )

    def flops(self, model: WanConfig, source: Source, shape: tuple[int, ...]) -> int:
        """Floating-point operations of a round."""
        return self._rows(source) * distillation_flops(
            model, self.hybrid, shape=(shape[0], shape[1], shape[2]), updates=self.updates_per_point
        )

    def blocks(self, model: WanConfig) -> Any:
        """The converted blocks' mixers before they have learned."""
        made = Mixing.of(self.hybrid, model.num_layers).make(
            model,
            dtype=jnp.dtype(self.dtype),
            param_dtype=jnp.float32,
            rngs=nnx.Rngs(self.seed),
        )
        assert made is not None
        return made

    def init_blocks(self, params: Sequence[PyTree]) -> list[TrainState | None]:
        """Of each group, from its parameters over an axis of its blocks; None where it has none."""
        init = jax.vmap(self.optimizer.init)
        return [init(group) if jax.tree.leaves(group) else None for group in params]

    def sampling(self, schedule: FlowSchedule, solver: Solver) -> Sampling:
        """The teacher's, of a model with this schedule and solver."""
        return Sampling(
            schedules=tuple(dataclasses.replace(schedule, shift=shift) for shift in self.shifts or (schedule.shift,)),
            solver=solver,
            num_steps=self.num_inference_steps,
            guidance=Guidance(scale=self.guidance_scale),
        )

    def export(self, folder: Path, *, step: int | None = None) -> None:
        """The model of a checkpoint of this run, of ``step`` or the newest: its averaged maps, as `run` writes them.

        Raises:
            CheckpointError: there is no such checkpoint, it is of another model, or ``folder`` cannot be written.
        """
        teacher = find_model(self.teacher)
        model = load_transformer(teacher, dtype=jnp.dtype(self.dtype), hybrid=None)
        distillation = Distillation(self, model, teacher)
        with Checkpoints(self.train_folder / "checkpoints") as checkpoints:
            state = checkpoints.read(distillation.state, step=step)
        error = None
        if self.best is not None:
            distillation.compile()
            error = distillation.measure(state).error
        self._write(folder, teacher, distillation, distillation.averaged(state), error)

    def _write(
        self,
        folder: Path,
        teacher: Path,
        distillation: Distillation,
        averaged: PyTree,
        error: Array | np.ndarray | None,
    ) -> None:
        """The teacher's folder with a ``rehyat`` part, of the blocks with the smallest error where some are chosen."""
        mixing, hybrid = distillation.mixing, self.hybrid
        blocks = distillation.module(averaged)
        if self.best is not None and error is not None:
            chosen = choose_blocks(error.tolist(), self.best)
            hybrid = hybrid.only(tuple(distillation.numbers[i] for i in chosen))
            blocks = mixing.selected(blocks, Mixing.of(hybrid, distillation.teacher.config.num_layers))
        with whole_folder(folder) as partial:
            for name in _KEPT:
                if (teacher / name).is_dir():
                    shutil.copytree(teacher / name, partial / name, ignore=shutil.ignore_patterns("rehyat"))
                elif (teacher / name).is_file():
                    shutil.copyfile(teacher / name, partial / name)
            write_student(partial / "transformer", distillation.teacher.config, hybrid, blocks)


class Distillation:
    """A run at work: its programs, and what they are given."""

    def __init__(self, training: DistillTraining, teacher: WanTransformer, folder: Path) -> None:
        self.training, self.teacher = training, teacher
        config, dtype = teacher.config, jnp.dtype(training.dtype)
        check_sizes(training.model, config, where=folder)
        self.mixing = mixing = Mixing.of(training.hybrid, config.num_layers)
        #: The converted blocks' numbers among all.
        self.numbers = [i for i, chosen in enumerate(mixing.converted) if chosen]
        if training.best is not None and not 1 <= training.best <= len(self.numbers):
            raise ConfigError(f"the best {training.best} of {len(self.numbers)} converted blocks cannot be chosen")
        self._sampling = training.sampling(*read_scheduler(folder))
        vae = VAEConfig.from_dict(read_json(folder / "vae" / "config.json"))
        if not vae.z_dim == config.in_channels == config.out_channels:
            raise CheckpointError(
                f"{folder / 'vae'} makes latents of {vae.z_dim} channels, and the transformer has "
                f"{config.in_channels} in and {config.out_channels} out"
            )
        self._shapes = [source.latent_shape(vae, config) for source in training.sources]
        self.devices = devices = training.devices(config, self._shapes)
        graph, params = nnx.split(teacher)
        self._teacher = devices.parameters(params)
        self._learner = training.learner(config, graph, sampling=self._sampling, devices=devices)
        self._blocks = nnx.eval_shape(lambda: training.blocks(config))
        params = [nnx.state(group) for group in mixing.parted(training.blocks(config))]
        prepared = prepared_sources(training.sources, folder, held_out=training.held_out)
        # All that a user may have got wrong is known before the text encoder is read.
        texts = {
            index: source.texts(seed=training.seed, reserved=training.held_out)
            for index, source in enumerate(training.sources)
            if source.samples
        }
        held_out = [
            source.held_out(training.held_out)
            if source.prepared is None
            else prepared[source.prepared].held_out_captions(training.held_out)
            for source in training.sources
        ]
        embed = _embeddings(folder, training.sources, dtype)
        self._held_out = [devices.everywhere(embed(prompts)) for prompts in held_out]
        self._nothing = devices.everywhere(embed([""]))
        self._inputs: list[Inputs] = []
        for index, (source, shape) in enumerate(zip(training.sources, self._shapes, strict=True)):
            key = _key(training.seed, 1 + index)
            if source.videos:
                clips = NoisyClips(
                    source, sampling=self._sampling, embed=embed, vae=load_vae(folder, dtype=dtype), key=key
                )
                self._inputs.append(clips)
            elif source.prepared is not None:
                self._inputs.append(
                    PreparedInputs(
                        source,
                        prepared[source.prepared],
                        sampling=self._sampling,
                        dtype=dtype,
                        key=key,
                        seed=training.seed,
                        rows=devices.rows(),
                    )
                )
            else:
                self._inputs.append(
                    OwnTrajectories(
                        source, sampling=self._sampling, texts=texts[index], embed=embed, shape=shape, key=key
                    )
                )
        self._latest: dict[str, Any] = {}
        # Which source each round draws from, and which round of that source it is.
        share = np.array([source.share for source in training.sources])
        rounds = -(-training.steps // training.steps_per_round)
        self._plan = np.random.default_rng(training.seed).choice(len(share), size=rounds, p=share / share.sum())
        for inputs in self._inputs:
            inputs.frozen = devices.everywhere(inputs.frozen)
        self.state = DistillState(
            devices.everywhere(jnp.zeros((), jnp.int32)),
            mixing.joined(devices.made(jax.jit(training.init_blocks), devices.parameters(params))),
            tuple(inputs.begin(devices) for inputs in self._inputs),
        )

    def compile(self) -> None:
        """Every program of the run, side by side."""
        count = len(self._inputs)
        kinds = self._lower, self._lower_measurer
        makers = [functools.partial(make, index) for make in kinds for index in range(count)]
        programs = compile_all(makers)
        self._learners, self._measurers = programs[:count], programs[count:]

    def advance(self, state: DistillState, step: int) -> tuple[DistillState, dict[str, Any]]:
        """A round: one forward pass of the teacher, and the blocks' optimiser steps on it."""
        training = self.training
        index = step // training.steps_per_round
        if training.measure_rounds and index % training.measure_rounds == 0:
            found = self.measure(state)
            self._latest = {"held_out": found.error.mean(), "share": found.share.mean()}
        which = self._plan[index]
        inputs, devices = self._inputs[which], self.devices
        turn = devices.batch(inputs.turn(int((self._plan[:index] == which).sum())), inputs.turn_shapes())
        rate = jnp.float32(training.optimizer.rate(step, training.steps))
        key, rate = devices.everywhere((_key(training.seed, 0, index), rate))
        blocks, carried, errors = self._learners[which](
            state.blocks, state.carried[which], self._teacher, inputs.frozen, turn, key, rate
        )
        everything = (*state.carried[:which], carried, *state.carried[which + 1 :])
        return DistillState(state.step + training.steps_per_round, blocks, everything), {"loss": errors} | self._latest

    def flops(self, step: int) -> float:
        """Of the round that begins at a step."""
        which = self._plan[step // self.training.steps_per_round]
        return float(self.training.flops(self.teacher.config, self.training.sources[which], self._shapes[which]))

    def measure(self, state: DistillState) -> Figures:
        """The averaged blocks on prompts held out, over whole trajectories of every source; goes to a file too.

        The same noise and prompts in every run.
        """
        found = [
            measurer(self.averaged(state), self._teacher, text, self._nothing)
            for measurer, text in zip(self._measurers, self._held_out, strict=True)
        ]
        everything: Figures = jax.tree.map(lambda *x: np.stack(x), *jax.device_get(found))  # [source, step, block]
        figures = Figures(
            everything.error.mean((0, 1)), everything.share.mean((0, 1)), everything.normaliser.min((0, 1))
        )
        entry = {"step": int(state.step), "block": self.numbers} | {k: v.tolist() for k, v in figures._asdict().items()}
        entry |= {
            "error_by_source": everything.error.mean((1, 2)).tolist(),
            "error_by_sampling_step": everything.error.mean((0, 2)).tolist(),
        }
        if not first_process():
            return figures
        self.training.train_folder.mkdir(parents=True, exist_ok=True)
        with (self.training.train_folder / "blocks.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        return figures

    def averaged(self, state: DistillState) -> PyTree:
        """The averaged parameters of every converted group, as `Mixing.joined` has them."""
        groups = self.mixing.parted(state.blocks)
        return self.mixing.joined([nnx.State({}) if group is None else group.ema for group in groups])

    def module(self, averaged: PyTree) -> Any:
        """The blocks' mixers with these parameters."""
        groups = zip(self.mixing.parted(self._blocks), self.mixing.parted(averaged), strict=True)
        made = [nnx.merge(nnx.split(shapes)[0], params) for shapes, params in groups]
        return made[0] if len(made) == 1 else nnx.List(made)

    def _lower(self, which: int) -> jax.stages.Lowered:
        return self._learner.lower(
            self._inputs[which], self.state.blocks, self.state.carried[which], self._teacher, shape=self._shapes[which]
        )

    def _lower_measurer(self, which: int) -> jax.stages.Lowered:
        arrays = self.averaged(self.state), self._teacher, self._held_out[which], self._nothing
        return self._learner.lower_measurer(*arrays, shape=self._shapes[which])


def _key(seed: int, *numbers: int) -> Key[Array, ""]:
    return functools.reduce(jax.random.fold_in, numbers, jax.random.key(seed))


def _embeddings(folder: Path, sources: tuple[Source, ...], dtype: jnp.dtype) -> Embed:
    """A teacher's prompt embeddings. Those of a file are kept on disk, for they come again and again."""
    if all(source.of_sprites for source in sources):
        encoder, tokenizer = load_text_encoder(folder, dtype=dtype), Tokenizer.from_folder(folder)
        return lambda texts: embed_prompts(encoder, tokenizer, texts).astype(dtype)
    cache = cache_folder()
    kept = PromptEncoder(folder, dtype=dtype, cache=cache and cache / "prompts")
    return lambda texts: jnp.concatenate([kept(text) for text in texts]).astype(dtype)


def main(argv: list[str]) -> int:
    """``rehyat distill CONFIG [--field value …]``; see `run_training`."""
    return run_training("distill", argv, about=__doc__ or "", kinds=lambda: (DistillTraining,))

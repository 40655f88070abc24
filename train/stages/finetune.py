"""Train the whole of a converted model by flow matching, on clips longer than its teacher knew.

ReHyAt (arXiv 2601.04342), second stage: after attention distillation every parameter learns, on prompts and videos,
through the causal hybrid. A second term, the student's velocity against a teacher's on the same noisy video, is ours.

The file defines ``config``, a `train.stages.finetune.FinetuneTraining`.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from flax import nnx
from jaxtyping import Array, Float, Key, PyTree

from rehyat_jax.errors import CheckpointError, ConfigError, RehyatError
from rehyat_jax.mixers.config import BlockMixers, Conversion, HybridConfig
from rehyat_jax.models.checkpoints import load_text_encoder, load_transformer, load_vae, save_transformer
from rehyat_jax.models.folder import DEFAULTS_FILE, find_model
from rehyat_jax.models.wan.config import VAEConfig, WanConfig
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.runtime.record import Phases
from rehyat_jax.runtime.variables import GateParam, MixerParam
from rehyat_jax.sampling.rollout import check_remember
from rehyat_jax.text.prompt_encoder import TEXT_LENGTH
from rehyat_jax.text.tokenizer import Tokenizer
from rehyat_jax.weights.files import read_json
from rehyat_jax.weights.writing import whole_folder, write_json
from train.cli.command import run_training
from train.data.clips import Bucket
from train.data.pools import Captions
from train.data.prepared import PreparedClips, open_prepared
from train.engine.arithmetic import forward_flops
from train.engine.checkpoint import Checkpoints
from train.engine.optimizer import OptimizerConfig, Shares
from train.parallel.devices import first_process, loading, wait_for_all
from train.stages.flow import Batch, FlowTraining, Loss, embed, flow_loss
from train.stages.sizes import check_sizes
from train.stages.videos import showing

#: What a result has from its source, as it is there.
_KEPT = ("vae", "text_encoder", "tokenizer", "scheduler", "model_index.json", DEFAULTS_FILE)


def main(argv: list[str]) -> int:
    """``rehyat finetune CONFIG [--field value …]``; see `run_training`."""
    return run_training("finetune", argv, about=__doc__ or "", kinds=lambda: (FinetuneTraining,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
    """Clips whose chunks have noise levels of their own, many of them almost none (Diffusion Forcing, arXiv
    2407.01392): so that a chunk learns to go on from finished ones, which a stream then remembers as they are.

    At one level for all frames the past is as noisy as the present. What only it can tell, as who is behind the pillar,
    then shows at the few levels at which the past is clear enough to tell it and the present not to know it already.
    """

    #: Of clips; the others have one level for all frames.
    share: float = 0.0
    #: Of their chunks, those that are history: nearly clean, and not learned themselves.
    clean: float = 0.5
    #: The highest noise level of history.
    noise: float = 0.1

    def __post_init__(self) -> None:
        if not (0 <= self.share <= 1 and 0 <= self.clean < 1 and 0 <= self.noise < 1):
            raise ConfigError("history needs a share from 0 to 1, and clean and noise from 0 to below 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneTraining(FlowTraining):
    """One run. ``out`` becomes a student's folder in the diffusers layout, whole or not there."""

    #: A bundled model's name or a model's folder in the diffusers layout: a student, or a teacher to be converted.
    source: Path
    #: Leave the source's student alone, if it is one: its teacher is converted as ``hybrid`` says, not distilled.
    anew: bool = False
    #: Its sizes, which `rehyat plan` needs before there is such a folder; none: whatever it has.
    model: tyro.conf.AvoidSubcommands[WanConfig | None] = None
    #: How blocks are converted; none: as the source's are. A student keeps its feature maps, and what it lacks of
    #: this (decay, length) starts as if it were not there.
    hybrid: tyro.conf.AvoidSubcommands[HybridConfig | BlockMixers | None] = None
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
        check_remember(self.remember)

    @property
    def result(self) -> Path:
        """The folder that stands when the run is done, and not before."""
        return self.out

    @property
    def train_folder(self) -> Path:
        """Checkpoints and metrics, beside the result."""
        return self.out.with_name(f"{self.out.name}-train")

    def run(self, phases: Phases | None = None) -> None:
        """Train, or continue a run that was stopped; ``phases`` takes times and memory.

        Raises:
            RehyatError: ``out`` is there already, or training diverged.
            CheckpointError: the source or the teacher is no such model; checkpoints of another model; a full disk.
            ConfigError: the source's blocks cannot become ``hybrid``'s, or clips do not fit its VAE; a prepared folder
                is not finished, damaged, or of another model.
            Stopped: by a signal; see `train.engine.loop.run`.
        """
        if self.result.exists():
            raise RehyatError(f"{self.out} is there already; choose another --out")
        phases, dtype, source = phases or Phases(), jnp.dtype(self.dtype), whole_model(self.source)
        prepared = open_prepared(self.buckets, source, held_out=self.validation.held_out)
        with loading(self.mesh):
            student = self.student(source)
        graph, params = _in_dtype(student, dtype)
        vae = load_vae(source, dtype=dtype)
        check_sizes(self.model, student.config, where=source)
        self.check_fits(vae.config, student.config, where=source / "vae")
        devices = self.devices(vae.config, student.config, student.hybrid)
        frozen, teacher_graph = {}, None
        if any(isinstance(bucket, Bucket) for bucket in self.buckets):  # captions of prepared clips are embedded
            text_graph, frozen["text"] = nnx.split(load_text_encoder(source, dtype=dtype))
        if self.teacher is not None:
            with loading(self.mesh):
                teacher = load_transformer(find_model(self.teacher), hybrid=None)
            if teacher.config != student.config:
                raise ConfigError(f"{self.teacher} is no teacher of {source}: they are of different sizes")
            teacher_graph, frozen["teacher"] = _in_dtype(teacher, dtype)

        def read(frozen: PyTree, tokens: Captions) -> Array:
            return embed(nnx.merge(text_graph, frozen["text"]), tokens)

        longest = self.longest(vae.config)
        flops = functools.partial(self.flops, student.config, student.hybrid, longest=longest)
        loss = self.loss(graph, teacher_graph, longest=longest)
        prompts = self.validation.prompts if self.validation.every else ()
        state = self.train(
            params,
            loss,
            vae=vae,
            tokenizer=Tokenizer.from_folder(source),
            phases=phases,
            read=read,
            frozen=frozen,
            shares=self.shares,
            flops=flops,
            prepared=prepared,
            show=showing(prompts, graph=graph, folder=source, dtype=dtype) if prompts else None,
            devices=devices,
        )
        with phases.measure("save"):
            averaged = devices.on_host(state.ema)
            if first_process():
                self._write(self.result, source, nnx.merge(graph, averaged))
            wait_for_all("result")

    def levels(
        self, sigma: Float[Array, " B"], key: Key[Array, ""], *, frames: int
    ) -> tuple[Float[Array, "B *T"], Float[Array, "B T"] | None]:
        """With `History` a level for each chunk: the clip's own, history's, or another clip's."""
        if not self.history.share or self.hybrid is None:
            return sigma, None
        history, size = self.history, sigma.shape[0]
        chunk = jnp.arange(frames, dtype=jnp.int32) // self.hybrid.chunk_frames
        own, mixed, clean, noise = jax.random.split(key, 4)
        shape = size, -(-frames // self.hybrid.chunk_frames)
        others = jax.vmap(lambda k: jax.random.permutation(k, sigma))(jax.random.split(mixed, shape[1])).T
        past = jax.random.bernoulli(clean, history.clean, shape)
        levels = jnp.where(past, history.noise * jax.random.uniform(noise, shape), others)
        # Stratified over the batch, whose order says nothing but the clip's level: which is left at random.
        apart = (jax.random.permutation(own, size) < round(history.share * size))[:, None]
        weights = 1 - (past & apart).astype(jnp.float32)
        return jnp.where(apart, levels, sigma[:, None])[:, chunk], weights[:, chunk]

    def student(self, source: Path) -> WanTransformer:
        """The student before it has learned."""
        model = load_transformer(source, hybrid=None if self.anew else "auto")
        return student_of(model, self.hybrid, where=source)

    def longest(self, vae: VAEConfig) -> int:
        """Latent frames of the longest clip that is compared with the teacher."""
        return 1 + (self.teacher_frames - 1) // vae.temporal_factor

    def flops(self, model: WanConfig, hybrid: Conversion | None, shape: tuple[int, int, int], *, longest: int) -> int:
        """Floating-point operations of a step on one clip of these latent frames, rows and columns."""
        compared = self.teacher is not None and shape[0] <= longest
        learning = 3 * forward_flops(model, hybrid, shape=shape)
        return learning + (forward_flops(model, None, shape=shape) if compared else 0)

    def export(self, folder: Path, *, step: int | None = None) -> None:
        """The model of a checkpoint of this run, of ``step`` or the newest: its averaged weights, as `run` writes them.

        Raises:
            CheckpointError: there is no such checkpoint, it is of another model, or ``folder`` cannot be written.
        """
        source = whole_model(self.source)
        student = self.student(source)
        graph, params = _in_dtype(student, jnp.dtype(self.dtype))
        with Checkpoints(self.train_folder / "checkpoints") as checkpoints:
            state = checkpoints.read(self.optimizer.init(params), step=step)
        self._write(folder, source, nnx.merge(graph, state.ema))

    def _write(self, folder: Path, source: Path, student: WanTransformer) -> None:
        with whole_folder(folder) as partial:
            for name in _KEPT:
                if (source / name).is_dir():
                    shutil.copytree(source / name, partial / name)
                elif (source / name).is_file():
                    shutil.copyfile(source / name, partial / name)
            defaults = dict(read_json(file)) if (file := source / DEFAULTS_FILE).is_file() else {}
            if self.remember != defaults.get("remember", "steps"):
                write_json(partial / DEFAULTS_FILE, defaults | {"remember": self.remember})
            save_transformer(student, partial / "transformer", dtype=jnp.bfloat16)

    @property
    def shares(self) -> Shares:
        """Of the learning rate, by variable type."""
        return {GateParam: self.gate_rate, MixerParam: self.hybrid_rate}

    def loss(self, graph: Any, teacher_graph: Any, *, longest: int) -> Loss:
        """Of the student's parameters, ``{"teacher": …}`` and clips; up to ``longest`` latent frames are compared."""

        def loss(params: PyTree, frozen: PyTree, batch: Batch) -> tuple[Array, dict[str, Array]]:
            inputs = batch.noisy, batch.timesteps, batch.text
            velocity = nnx.merge(graph, params)(*inputs, **self.forward)
            flow = flow_loss(velocity, batch.velocity, batch.weights)
            if teacher_graph is None or batch.noisy.shape[1] > longest:
                return flow, {"loss": flow}
            teacher = nnx.merge(teacher_graph, frozen["teacher"])
            target = jax.lax.stop_gradient(teacher(*inputs, text_tokens=TEXT_LENGTH))
            apart = flow_loss(velocity, target)
            return flow + self.teacher_weight * apart, {"loss": flow, "teacher": apart}

        return loss


def _causal_chunks(hybrid: Conversion | None) -> bool:
    """Whether the converted blocks have chunks of one length, which see no later ones."""
    mixers = () if hybrid is None else hybrid.distinct()
    return len({mixer.chunk_frames for mixer in mixers}) == 1 and not any(mixer.why_not_stream() for mixer in mixers)


def whole_model(name: Path) -> Path:
    """The folder of a bundled model's name or a path.

    Raises:
        CheckpointError: it is no whole model.
    """
    folder = find_model(name)
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(f"{folder} is no whole model in the diffusers layout; rehyat convert can make one")
    return folder


def student_of(model: WanTransformer, hybrid: Conversion | None, *, where: Path) -> WanTransformer:
    """The student that finetuning begins with: the model itself, or with its blocks converted as ``hybrid`` says.

    A student keeps its hybrid blocks' parameters; those that ``hybrid`` adds are at their start.

    Raises:
        ConfigError: ``model`` (which is at ``where``) is a teacher and there is no ``hybrid``, or its parameters are
            not such a student's.
    """
    if hybrid is None:
        if model.hybrid is None:
            raise ConfigError(f"{where} is a softmax model: distil it first, or say by hybrid how it is converted")
        return model
    student = model.with_hybrid(hybrid, rngs=nnx.Rngs(0))
    if model.hybrid is None:
        return student
    ours, theirs = (dict(nnx.to_flat_state(nnx.state(x.hybrid_blocks))) for x in (student, model))
    if model.mixing.pattern != student.mixing.pattern or any(
        path not in ours or ours[path].get_value().shape != leaf.get_value().shape for path, leaf in theirs.items()
    ):
        raise ConfigError(f"{where} has other hybrid blocks than this run's hybrid: their parameters do not fit")
    nnx.update(student.hybrid_blocks, nnx.from_flat_state(list(theirs.items())))
    return student


def _in_dtype(model: WanTransformer, dtype: jnp.dtype) -> Any:
    """Graph and parameters of a model that computes in ``dtype`` and keeps its parameters as they are."""
    computing = nnx.eval_shape(lambda: WanTransformer(model.config, hybrid=model.hybrid, dtype=dtype, rngs=nnx.Rngs(0)))
    return nnx.split(computing, nnx.Param)[0], nnx.state(model, nnx.Param)

"""Attention distillation at work: the networks, rounds, measures and result of a `DistillTraining`."""

from __future__ import annotations

import bisect
import functools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Key, PyTree

from rehyat_jax.errors import CheckpointError, ConfigError
from rehyat_jax.models.checkpoints import load_text_encoder, load_vae
from rehyat_jax.models.checkpoints.loading import open_transformer
from rehyat_jax.models.clip.features import ImageFeatures
from rehyat_jax.models.folder import read_scheduler, read_traits
from rehyat_jax.models.wan.config import VAEConfig, WanConfig
from rehyat_jax.models.wan.mixing import Mixing
from rehyat_jax.models.wan.student import write_student
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.runtime.compilation import cache_folder
from rehyat_jax.runtime.devices import Devices, first_process, loading
from rehyat_jax.text.prompt_encoder import PromptEncoder
from rehyat_jax.text.tokenizer import Tokenizer, embed_prompts
from rehyat_jax.weights.files import read_json
from rehyat_jax.weights.writing import whole_folder
from train.data.prepared import Prepared
from train.data.sources import (
    Embed,
    Inputs,
    NoisyClips,
    OwnTrajectories,
    PreparedInputs,
    Shown,
    Source,
    prepared_sources,
)
from train.data.trajectories import Given, Sampling
from train.engine.folder import RunFolder
from train.engine.stage import Inputs as RoundInputs
from train.engine.stage import Measure, Models, Network, Round, Stage
from train.stages.block_choice import choose_blocks
from train.stages.blockwise import Figures
from train.stages.clips_given import ClipsGiven
from train.stages.distill import DistillTraining
from train.stages.from_image import FromImage, takes_image
from train.stages.learner import Learner
from train.stages.sizes import check_sizes, whole_model

#: What a result has from its teacher, as it is there; the folder of what was learned from gets a ``rehyat`` part.
_KEPT = (
    *("transformer", "transformer_2", "vae", "text_encoder", "tokenizer", "scheduler"),
    *("image_encoder", "image_processor", "model_index.json", "rehyat_defaults.json"),
)


class _Points(RoundInputs):
    """A source at work: each of its rounds, and a key for what is drawn of its points."""

    def __init__(self, inputs: Inputs, rounds: Sequence[int], *, seed: int) -> None:
        self.inputs, self.frozen, self._rounds, self._seed = inputs, inputs.frozen, rounds, seed

    def host(self, index: int) -> PyTree:
        return self.inputs.host_batch(bisect.bisect_left(self._rounds, index)), draw_key(self._seed, 0, index)

    def host_shapes(self) -> PyTree:
        return self.inputs.host_batch_shapes(), jax.eval_shape(lambda: draw_key(0))

    def begin(self, devices: Devices) -> PyTree:
        return self.inputs.begin(devices)


class DistillStage(Stage):
    """A teacher's converted blocks learn, each by itself, on what the teacher's pass shows them.

    What is measured on held-out prompts goes, block by block, to ``blocks.jsonl`` beside ``metrics.jsonl``.
    """

    def __init__(self, training: DistillTraining) -> None:
        self.training, self.steps_per_round = training, training.steps_per_round
        # 0: at the end alone.
        self.validate_every = (training.measure_rounds or training.steps) * self.steps_per_round
        self.validate_first = training.measure_rounds > 0
        self._error: np.ndarray | None = None

    @functools.cached_property
    def folder(self) -> Path:
        """The teacher's."""
        return whole_model(self.training.teacher, expert=self.training.expert)

    @functools.cached_property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.training.dtype)

    @functools.cached_property
    def teacher(self) -> WanTransformer:
        with loading(self.training.mesh):
            teacher, _ = open_transformer(self.folder, self.part, dtype=self.dtype, hybrid=None)
        check_sizes(self.training.model, teacher.config, where=self.folder)
        return teacher

    @property
    def part(self) -> Literal["transformer", "transformer_2"]:
        """The folder of what is learned from."""
        return "transformer_2" if self.training.expert == "low" else "transformer"

    @property
    def model(self) -> WanConfig:
        return self.teacher.config

    @functools.cached_property
    def vae(self) -> VAEConfig:
        config, where = VAEConfig.from_dict(read_json(self.folder / "vae" / "config.json")), self.folder / "vae"
        if takes_image(self.model, config):
            return config
        if not config.z_dim == self.model.in_channels == self.model.out_channels:
            raise CheckpointError(
                f"{where} makes latents of {config.z_dim} channels, and the transformer has {self.model.in_channels} "
                f"in and {self.model.out_channels} out"
            )
        return config

    @functools.cached_property
    def sampling(self) -> Sampling:
        """
        Raises:
            ConfigError: the teacher's schedule has no such steps at its expert's noise levels.
        """
        sampling = self.training.sampling(*read_scheduler(self.folder), levels=self.levels)
        _ = sampling.num_steps
        return sampling

    @property
    def levels(self) -> tuple[float, float]:
        """The teacher's noise levels: its expert's."""
        return read_traits(self.folder).levels(self.training.expert)

    @functools.cached_property
    def vae_module(self) -> WanVAE:
        return load_vae(self.folder, dtype=self.dtype)

    @functools.cached_property
    def shown(self) -> Shown | None:
        """How a teacher that takes images is shown a clip's own."""
        if not takes_image(self.model, self.vae):
            return None
        features = None if self.model.image_dim is None else ImageFeatures(self.folder)
        return FromImage.of(self.model, self.vae, features).shown(lambda: self.vae_module, features)

    @property
    def begins_with_clips(self) -> bool:
        """The lower expert goes on where another stopped: its trajectories begin with clips under noise."""
        return self.levels[1] < 1

    @functools.cached_property
    def clips_given(self) -> ClipsGiven | None:
        """What its trajectories have of clips; None: prompts are enough."""
        images = takes_image(self.model, self.vae)
        if not images and not self.begins_with_clips:
            return None

        def shown() -> Shown:
            assert self.shown is not None
            return self.shown

        return ClipsGiven(shown=shown if images else None, begins=self.begins_with_clips, vae=lambda: self.vae_module)

    @functools.cached_property
    def numbers(self) -> list[int]:
        """The converted blocks' among all."""
        training = self.training
        numbers = [i for i, chosen in enumerate(self.learner.mixing.converted) if chosen]
        if training.best is not None and not 1 <= training.best <= len(numbers):
            raise ConfigError(f"the best {training.best} of {len(numbers)} converted blocks cannot be chosen")
        return numbers

    @functools.cached_property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        """Of each source's latents."""
        return [source.latent_shape(self.vae, self.model) for source in self.training.sources]

    @functools.cached_property
    def devices(self) -> Devices:
        _ = self.numbers, self.sampling  # what else a user may have got wrong
        if self.begins_with_clips and len(self.training.shifts) > 1:
            raise ConfigError("the lower expert's trajectories begin at one noise level: give one of the shifts")
        if self.clips_given is not None:
            for source in self.training.sources:
                self.clips_given.check(source)
        return self.training.devices(self.model, self.shapes)

    @property
    def networks(self) -> dict[str, Network]:
        """The teacher and, each in a role of its own, the converted blocks' mixers by group (`Mixing`)."""

        def mixers(number: int) -> Network:
            # Of a mixer without parameters nothing learns.
            learns = self.training.optimizer if jax.tree.leaves(nnx.state(self.blocks[number])) else None
            return Network(make=lambda: self.blocks[number], optimizer=learns, stacked=True)

        found = {role: mixers(number) for number, role in enumerate(self.learner.roles)}
        return found | {"teacher": Network(make=lambda: self.teacher)}

    @functools.cached_property
    def blocks(self) -> tuple[Any, ...]:
        """The converted groups' mixers before they have learned."""
        return self.learner.mixing.parted(self.training.blocks(self.model))

    @functools.cached_property
    def learner(self) -> Learner:
        return self.training.learner(self.model, sampling=self.sampling)

    @functools.cached_property
    def _plan(self) -> list[int]:
        """Which source each round draws from."""
        share = np.array([source.share for source in self.training.sources])
        rounds = -(-self.training.steps // self.steps_per_round)
        return np.random.default_rng(self.training.seed).choice(len(share), size=rounds, p=share / share.sum()).tolist()

    def round_of(self, index: int) -> tuple[int, ...]:
        return (self._plan[index],)

    def rounds(self) -> dict[tuple[int, ...], Round]:
        return {(place,): self._round(place, inputs) for place, inputs in enumerate(self.inputs())}

    def _round(self, place: int, inputs: Inputs) -> Round:
        training, shape = self.training, self.shapes[place]
        rounds = [index for index, which in enumerate(self._plan) if which == place]
        return Round(
            function=self.learner.round(inputs, place, shape=shape),
            inputs=_Points(inputs, rounds, seed=training.seed),
            flops=self.round_flops(place),
        )

    def round_flops(self, place: int) -> float:
        """Floating-point operations of a round on a source."""
        return float(self.training.flops(self.model, self.training.sources[place], self.shapes[place]))

    def title(self, data: int) -> str:
        source = self.training.sources[data]
        return f"{source.batch} clips of {source.frames} frames"

    @functools.cached_property
    def embed(self) -> Embed:
        """Prompts, embedded by the teacher's text encoder."""
        repair = self.training.repair_prompts
        return _embeddings(self.folder, self.training.sources, self.dtype, repair=repair)

    def inputs(self) -> list[Inputs]:
        """Each source at work."""
        training = self.training
        _ = self.prepared
        # All that a user may have got wrong is known before the text encoder is read.
        seed, reserved = training.seed, training.held_out
        texts = [source.texts(seed=seed, reserved=reserved) if source.samples else None for source in training.sources]
        _ = self.held_out
        return [self._inputs(place, text) for place, text in enumerate(texts)]

    def _inputs(self, place: int, texts: Callable[[int], str] | None) -> Inputs:
        training, source = self.training, self.training.sources[place]
        key, shape = draw_key(training.seed, 1 + place), self.shapes[place]
        if source.videos:
            return NoisyClips(
                source, sampling=self.sampling, embed=self.embed, vae=self.vae_module, key=key, shown=self.shown
            )
        if source.prepared is not None:
            return PreparedInputs(
                source,
                self.prepared[source.prepared],
                sampling=self.sampling,
                dtype=self.dtype,
                key=key,
                seed=training.seed,
                rows=self.devices.rows(),
                shown=self.shown,
            )
        assert texts is not None
        given = self.clips_given
        return OwnTrajectories(
            source,
            sampling=self.sampling,
            texts=texts,
            embed=self.embed,
            shape=shape,
            key=key,
            clips=None if given is None else given.of(source, seed=training.seed),
        )

    @functools.cached_property
    def prepared(self) -> Mapping[Path, Prepared]:
        """The opened folders of prepared sources."""
        return prepared_sources(self.training.sources, self.folder, held_out=self.training.held_out)

    @functools.cached_property
    def held_out(self) -> list[list[str]]:
        """Prompts of each source that measure."""
        count = self.training.held_out
        return [
            source.held_out(count)
            if source.prepared is None
            else self.prepared[source.prepared].held_out_captions(count)
            for source in self.training.sources
        ]

    def measures(self) -> list[Measure]:
        """Whole trajectories of every source's held-out prompts, and clips where these are needed: the same noise,
        prompts and clips in every run."""
        negative = self.embed([""])
        return [
            Measure(
                function=self.learner.measure(shape=shape),
                frozen={"text": self.embed(prompts), "negative": negative, "given": self._given(source)},
                host=None,
                host_shapes=None,
            )
            for source, prompts, shape in zip(self.training.sources, self.held_out, self.shapes, strict=True)
        ]

    def _given(self, source: Source) -> Given:
        """What a source's measuring trajectories have of clips."""
        if self.clips_given is None:
            return Given()
        prepared = None if source.prepared is None else self.prepared[source.prepared]
        return self.clips_given.held_out(source, prepared, self.training.held_out)

    def report(
        self, results: Sequence[PyTree], averages: Callable[[], Mapping[str, Any]], *, step: int, folder: RunFolder
    ) -> dict[str, float]:
        everything: Figures = jax.tree.map(lambda *x: np.stack(x), *results)  # [source, step, block]
        figures = Figures(
            everything.error.mean((0, 1)), everything.share.mean((0, 1)), everything.normaliser.min((0, 1))
        )
        self._error = np.asarray(figures.error)
        entry = {"step": step, "block": self.numbers} | {k: v.tolist() for k, v in figures._asdict().items()}
        entry |= {
            "error_by_source": everything.error.mean((1, 2)).tolist(),
            "error_by_sampling_step": everything.error.mean((0, 2)).tolist(),
        }
        if first_process():
            folder.path.mkdir(parents=True, exist_ok=True)
            with folder.blocks.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        return {"held_out": float(figures.error.mean()), "share": float(figures.share.mean())}

    def export(self, averages: Mapping[str, Any], folder: Path) -> None:
        """The teacher's folder with a ``rehyat`` part, of the blocks with the smallest error where some are chosen."""
        training, hybrid, mixing = self.training, self.training.hybrid, self.learner.mixing
        groups = {role: averages.get(role, self.blocks[number]) for number, role in enumerate(self.learner.roles)}
        made = list(groups.values())
        blocks = made[0] if len(made) == 1 else nnx.List(made)
        if training.best is not None:
            chosen = choose_blocks(self._measured(groups).tolist(), training.best)
            hybrid = hybrid.only(tuple(self.numbers[i] for i in chosen))
            blocks = mixing.selected(blocks, Mixing.of(hybrid, self.model.num_layers))
        with whole_folder(folder) as partial:
            for name in _KEPT:
                if (self.folder / name).is_dir():
                    # The other expert's student stays as it is.
                    old = shutil.ignore_patterns("rehyat") if name == self.part else None
                    shutil.copytree(self.folder / name, partial / name, ignore=old)
                elif (self.folder / name).is_file():
                    shutil.copyfile(self.folder / name, partial / name)
            write_student(partial / self.part, self.model, hybrid, blocks)
            self.write_beside(partial)

    def write_beside(self, folder: Path) -> None:
        """What a result has beside the teacher's files and its own part."""

    def _measured(self, groups: Mapping[str, Any]) -> np.ndarray:
        """Each block's error: of the last validation or, for a checkpoint's, measured now."""
        if self._error is not None:
            return self._error
        split = {role: nnx.split(module) for role, module in {**groups, "teacher": self.teacher}.items()}
        graphs, devices = {role: graph for role, (graph, _) in split.items()}, self.devices
        params = devices.parameters({role: variables for role, (_, variables) in split.items()})

        def error(measure: Measure) -> np.ndarray:
            def program(params: PyTree, frozen: PyTree) -> Figures:
                return measure.function(Models(graphs, frozen=params), frozen, None)

            arrays = params, devices.replicate(measure.frozen)
            compiled = devices.lower(program, *arrays, out=devices.replicated).compile()
            return np.asarray(compiled(*arrays).error)

        return np.stack([error(measure) for measure in self.measures()]).mean((0, 1))


def draw_key(seed: int, *numbers: int) -> Key[Array, ""]:
    return functools.reduce(jax.random.fold_in, numbers, jax.random.key(seed))


def _embeddings(folder: Path, sources: tuple[Source, ...], dtype: jnp.dtype, *, repair: bool) -> Embed:
    """A teacher's prompt embeddings. Those of a file are kept on disk, for they come again and again."""
    if all(source.of_sprites for source in sources):
        encoder, tokenizer = load_text_encoder(folder, dtype=dtype), Tokenizer.from_folder(folder, repair=repair)
        return lambda texts: embed_prompts(encoder, tokenizer, texts).astype(dtype)
    cache = cache_folder()
    kept = PromptEncoder(folder, dtype=dtype, cache=cache and cache / "prompts", repair=repair)
    kept.tell_cut([line for source in sources if source.samples and not source.of_sprites for line in source.lines()])
    return lambda texts: jnp.concatenate([kept(text) for text in texts]).astype(dtype)

"""Pretraining: a softmax Wan transformer on MovingSprites by flow matching, with a small UMT5 encoder along with it."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.models.checkpoints import (
    load_text_encoder,
    load_transformer,
    load_vae,
    save_text_encoder,
    save_transformer,
)
from rehyat_jax.models.folder import find_model
from rehyat_jax.models.umt5.config import TextEncoderConfig
from rehyat_jax.models.umt5.encoder import UMT5Encoder
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.runtime.devices import Devices, first_process, wait_for_all
from rehyat_jax.sampling import FlowSchedule, UniPC, scheduler_to_config
from rehyat_jax.sprites.world import NAMES
from rehyat_jax.text.tokenizer import Tokenizer
from rehyat_jax.weights.writing import whole_folder, write_json
from train.data.clips import Bucket
from train.data.pools import Captions
from train.data.tokenizer import build_sprite_tokenizer
from train.engine.gradients import Mean
from train.engine.stage import Models, Network
from train.stages.flow import Batch, FlowStage, FlowTraining, embed, flow_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionTraining(FlowTraining):
    """One run. It reads ``vae/`` under ``out``, and completes the folder in the diffusers layout.

    Its ``shift`` is sampling's as well.
    """

    #: A trained model, a folder or a bundled one's name, whose transformer and text encoder the run begins with, and
    #: whose VAE it takes where ``out`` has none; none: it begins at random.
    init: Path | None = None
    model: WanConfig = WanConfig.mini_sprites()
    text_encoder: TextEncoderConfig = TextEncoderConfig.mini_sprites()
    buckets: tuple[Bucket, ...] = (
        Bucket(kind="plain", frames=65, batch=64, share=0.5),
        Bucket(kind="plain", frames=33, batch=128, share=0.1),
        Bucket(kind="plain", frames=129, batch=32, share=0.15),
        Bucket(kind="occlusion", frames=129, batch=24, share=0.25, longest_wait=48),
    )
    steps: int = 10_000
    #: What the finished model is sampled with unless a user says otherwise.
    defaults: Mapping[str, int | float] = dataclasses.field(
        default_factory=lambda: {
            "height": 64,
            "width": 64,
            "num_frames": 81,
            "num_inference_steps": 20,
            "guidance_scale": 4.0,
        }
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.text_dim != self.text_encoder.d_model:
            raise ConfigError(
                f"the transformer reads text of width {self.model.text_dim}, and the text encoder's is "
                f"{self.text_encoder.d_model}"
            )

    @property
    def result(self) -> Path:
        """The folder that stands when the run is done, and not before."""
        return self.out / "transformer"

    @property
    def train_folder(self) -> Path:
        """Checkpoints and metrics."""
        return self.out / "train-dit"

    def check_result(self) -> None:
        # A text encoder without a run's folder is someone else's.
        foreign = (self.out / "text_encoder").exists() and not self.train_folder.exists()
        if self.result.exists() or foreign:
            raise RehyatError(f"{self.out} holds a trained model already; choose another --out")

    def stage(self) -> DiffusionStage:
        return DiffusionStage(self)


class DiffusionStage(FlowStage):
    """A transformer and its text encoder learn together."""

    training: DiffusionTraining

    @functools.cached_property
    def init(self) -> Path | None:
        return None if self.training.init is None else find_model(self.training.init)

    @functools.cached_property
    def vae(self) -> WanVAE:
        training, folder = self.training, self.training.out / "vae"
        if self.init is not None and first_process() and not folder.exists():
            with whole_folder(folder) as partial:
                shutil.copytree(self.init / "vae", partial, dirs_exist_ok=True)
        wait_for_all("vae")
        return load_vae(folder, dtype=jnp.dtype(training.dtype))

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        folder = self.training.out / "tokenizer"
        if first_process():
            build_sprite_tokenizer(folder, list(NAMES))
        wait_for_all("tokenizer")
        return Tokenizer.from_folder(folder)

    @functools.cached_property
    def devices(self) -> Devices:
        training = self.training
        training.check_fits(self.vae.config, training.model, where=training.out / "vae")
        return training.devices(self.vae.config, training.model, None)

    @property
    def networks(self) -> dict[str, Network]:
        return {"student": Network(make=self._student, optimizer=self.training.optimizer)}

    def _student(self) -> Student:
        training, dtype = self.training, jnp.dtype(self.training.dtype)
        text_config = dataclasses.replace(training.text_encoder, vocab_size=self.tokenizer.vocab_size)
        student = Student(
            WanTransformer(training.model, dtype=dtype, rngs=nnx.Rngs(training.seed)),
            UMT5Encoder(text_config, dtype=dtype, rngs=nnx.Rngs(training.seed + 1)),
        )
        if self.init is None:
            return student
        trained = Student(load_transformer(self.init, hybrid=None), load_text_encoder(self.init))
        if (trained.transformer.config, trained.text_encoder.config) != (training.model, text_config):
            raise ConfigError(f"{self.init} is of other sizes than this run's model and text encoder")
        nnx.update(student, nnx.state(trained))
        return student

    def loss(self, models: Models, batch: Batch) -> dict[str, Mean]:
        student = models["student"]
        text = embed(student.text_encoder, Captions(*batch.text))
        velocity = student.transformer(batch.noisy, batch.timesteps, text, **self.training.forward)
        return {"loss": flow_loss(velocity, batch.velocity)}

    def export(self, averages: Mapping[str, Any], folder: Path) -> None:
        training, student = self.training, averages["student"]
        if folder == training.result:
            self._write(training.out, student)
            return
        with whole_folder(folder) as partial:
            for part in ("vae", "tokenizer"):
                shutil.copytree(training.out / part, partial / part)
            self._write(partial, student)

    def _write(self, folder: Path, student: Student) -> None:
        complete_folder(folder, shift=self.training.shift, defaults=self.training.defaults)
        # One that is there was left by a process killed between this line and the last.
        shutil.rmtree(folder / "text_encoder", ignore_errors=True)
        save_text_encoder(student.text_encoder, folder / "text_encoder", dtype=jnp.bfloat16)
        save_transformer(student.transformer, folder / "transformer", dtype=jnp.bfloat16)


def complete_folder(folder: Path, *, shift: float, defaults: Mapping[str, int | float]) -> None:
    """Write the small files that make ``folder`` a checkpoint of diffusers' WanPipeline, and ours beside them."""
    files = {
        "scheduler/scheduler_config.json": scheduler_to_config(FlowSchedule(shift=shift), UniPC()),
        "model_index.json": {
            "_class_name": "WanPipeline",
            "_diffusers_version": "0.37.0",
            "scheduler": ["diffusers", "UniPCMultistepScheduler"],
            "text_encoder": ["transformers", "UMT5EncoderModel"],
            # Not T5TokenizerFast, which transformers 5 rebuilds from the pieces, losing the lower case.
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
            "transformer": ["diffusers", "WanTransformer3DModel"],
            "vae": ["diffusers", "AutoencoderKLWan"],
        },
        "rehyat_defaults.json": defaults,
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_json(folder / name, content)


class Student(nnx.Module):
    """The two networks that train together."""

    def __init__(self, transformer: WanTransformer, text_encoder: UMT5Encoder) -> None:
        self.transformer = transformer
        self.text_encoder = text_encoder

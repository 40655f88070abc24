"""Pretraining: a softmax Wan transformer on MovingSprites by flow matching, with a small UMT5 encoder along with it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PyTree

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
from rehyat_jax.runtime.record import Phases
from rehyat_jax.sampling import FlowSchedule, UniPC, scheduler_to_config
from rehyat_jax.sprites.world import NAMES
from rehyat_jax.text.tokenizer import Tokenizer
from rehyat_jax.weights.writing import whole_folder, write_json
from train.data.clips import Bucket
from train.data.pools import Captions
from train.data.tokenizer import build_sprite_tokenizer
from train.engine.checkpoint import Checkpoints
from train.parallel.devices import first_process, wait_for_all
from train.stages.flow import Batch, FlowTraining, embed, flow_loss


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

    def run(self, phases: Phases | None = None) -> None:
        """Train, or continue a run that was stopped; ``phases`` takes times and memory.

        Raises:
            RehyatError: ``out`` holds a finished transformer, or training diverged.
            CheckpointError: ``out`` has no VAE that fits, or checkpoints of another model, or cannot be written.
            Stopped: by a signal; see `train.engine.loop.run`.
        """
        # A text encoder without a run's folder is someone else's.
        foreign = (self.out / "text_encoder").exists() and not self.train_folder.exists()
        if self.result.exists() or foreign:
            raise RehyatError(f"{self.out} holds a trained model already; choose another --out")
        phases = phases or Phases()
        init = None if self.init is None else find_model(self.init)
        if init is not None and first_process() and not (self.out / "vae").exists():
            with whole_folder(self.out / "vae") as partial:
                shutil.copytree(init / "vae", partial, dirs_exist_ok=True)
        wait_for_all("vae")
        vae = load_vae(self.out / "vae", dtype=jnp.dtype(self.dtype))
        self.check_fits(vae.config, self.model, where=self.out / "vae")
        devices = self.devices(vae.config, self.model, None)
        if first_process():
            build_sprite_tokenizer(self.out / "tokenizer", list(NAMES))
        wait_for_all("tokenizer")
        tokenizer = Tokenizer.from_folder(self.out / "tokenizer")
        graph, params = self._models(tokenizer, init=init)

        def loss(params: PyTree, _: None, batch: Batch) -> tuple[Array, dict[str, Array]]:
            models = nnx.merge(graph, params)
            text = embed(models.text_encoder, Captions(*batch.text))
            velocity = models.transformer(batch.noisy, batch.timesteps, text, **self.forward)
            value = flow_loss(velocity, batch.velocity)
            return value, {"loss": value}

        state = self.train(params, loss, vae=vae, tokenizer=tokenizer, phases=phases, devices=devices)
        with phases.measure("save"):
            averaged = devices.on_host(state.ema)
            if first_process():
                self._write(self.out, nnx.merge(graph, averaged))
            wait_for_all("result")

    def export(self, folder: Path, *, step: int | None = None) -> None:
        """The model of a checkpoint of this run, of ``step`` or the newest: its averaged weights, as `run` writes them.

        Raises:
            CheckpointError: there is no such checkpoint, it is of another model, or ``folder`` cannot be written.
        """
        graph, params = self._models(Tokenizer.from_folder(self.out / "tokenizer"))
        with Checkpoints(self.train_folder / "checkpoints") as checkpoints:
            state = checkpoints.read(self.optimizer.init(params), step=step)
        with whole_folder(folder) as partial:
            for part in ("vae", "tokenizer"):
                shutil.copytree(self.out / part, partial / part)
            self._write(partial, nnx.merge(graph, state.ema))

    def _models(self, tokenizer: Tokenizer, *, init: Path | None = None) -> tuple[Any, PyTree]:
        """Both networks as they begin: their graph and their parameters."""
        text_config = dataclasses.replace(self.text_encoder, vocab_size=tokenizer.vocab_size)
        models = Models(
            WanTransformer(self.model, dtype=jnp.dtype(self.dtype), rngs=nnx.Rngs(self.seed)),
            UMT5Encoder(text_config, dtype=jnp.dtype(self.dtype), rngs=nnx.Rngs(self.seed + 1)),
        )
        graph, params = nnx.split(models, nnx.Param)
        if init is None:
            return graph, params
        trained = Models(load_transformer(init, hybrid=None), load_text_encoder(init))
        if (trained.transformer.config, trained.text_encoder.config) != (self.model, text_config):
            raise ConfigError(f"{init} is of other sizes than this run's model and text encoder")
        return graph, nnx.state(trained, nnx.Param)

    def _write(self, folder: Path, models: Models) -> None:
        complete_folder(folder, shift=self.shift, defaults=self.defaults)
        # One that is there was left by a process killed between this line and the last.
        shutil.rmtree(folder / "text_encoder", ignore_errors=True)
        save_text_encoder(models.text_encoder, folder / "text_encoder", dtype=jnp.bfloat16)
        save_transformer(models.transformer, folder / "transformer", dtype=jnp.bfloat16)


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


class Models(nnx.Module):
    """The two networks that train together."""

    def __init__(self, transformer: WanTransformer, text_encoder: UMT5Encoder) -> None:
        self.transformer = transformer
        self.text_encoder = text_encoder

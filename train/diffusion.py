"""Train a softmax Wan transformer on MovingSprites by flow matching, with a small UMT5 encoder trained along with it.

A round encodes a pool of fresh clips with the frozen VAE and makes several optimiser steps on it, all in one jitted
call: each clip serves ``reuse`` times with other noise, which pays for its encoding.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree

from rehyat_jax.config import TextEncoderConfig, VAEConfig, WanConfig
from rehyat_jax.errors import CheckpointError, ConfigError, RehyatError
from rehyat_jax.models.dit import WanTransformer
from rehyat_jax.models.umt5 import UMT5Encoder
from rehyat_jax.record import Phases
from rehyat_jax.sampling import FlowSchedule, UniPC, scheduler_to_config
from rehyat_jax.sprites.captions import captions
from rehyat_jax.sprites.world import NAMES
from rehyat_jax.text import Tokenizer
from rehyat_jax.weights import load_vae, save_text_encoder, save_transformer
from rehyat_jax.weights.writing import write_json
from train.clips import Bucket, check_rounds, choose, round_key
from train.loop import compile_all, run
from train.optimizer import OptimizerConfig, TrainState
from train.tokenizer import build_sprite_tokenizer

#: Wan pads its text to this many tokens.
_TEXT_TOKENS = 512
#: Clips, and latent frames of each, that the VAE encodes at a time: one shape for all lengths.
_ENCODE_CLIPS, _ENCODE_FRAMES = 32, 8


class Pool(NamedTuple):
    """Clips of a round: normalised latents and their captions' tokens."""

    latents: Float[Array, "M T h w z"]
    ids: Int[Array, "M L"]
    mask: Int[Array, "M L"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionTraining:
    """One run. It reads ``vae/`` under ``out``, and completes the folder in the diffusers layout."""

    out: Path
    model: WanConfig = WanConfig.mini_sprites()
    text_encoder: TextEncoderConfig = TextEncoderConfig.mini_sprites()
    buckets: tuple[Bucket, ...] = (
        Bucket(kind="plain", frames=65, batch=64, share=0.5),
        Bucket(kind="plain", frames=33, batch=128, share=0.1),
        Bucket(kind="plain", frames=129, batch=32, share=0.15),
        Bucket(kind="occlusion", frames=129, batch=24, share=0.25, longest_wait=48),
    )
    steps: int = 10_000
    #: Optimiser steps a round, and how often each clip of its pool serves.
    steps_per_round: int = 16
    reuse: int = 4
    optimizer: OptimizerConfig = OptimizerConfig()
    #: Flow shift of training and of sampling: the share of high noise.
    shift: float = 3.0
    #: Share of clips trained with the empty prompt, for guidance.
    caption_dropout: float = 0.1
    #: Tokens a caption may have; longer ones would be cut.
    caption_tokens: int = 48
    #: Of the computation; weights and optimiser are in float32.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    seed: int = 0
    #: Between two checkpoints; 0 saves after every round.
    checkpoint_seconds: float = 60.0
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
        check_rounds(self.buckets, steps=self.steps, steps_per_round=self.steps_per_round)
        if self.model.text_dim != self.text_encoder.d_model:
            raise ConfigError(
                f"the transformer reads text of width {self.model.text_dim}, and the text encoder's is "
                f"{self.text_encoder.d_model}"
            )
        if self.reuse < 1 or not 1 <= self.caption_tokens <= _TEXT_TOKENS:
            raise ConfigError(f"reuse must be at least 1, and caption_tokens 1 to {_TEXT_TOKENS}")
        if not (0 <= self.caption_dropout <= 1 and 0 < self.shift < float("inf")):
            raise ConfigError("caption_dropout must be 0 to 1, and shift above 0")
        for bucket in self.buckets:
            clips = self._pool(bucket)
            if clips * self.reuse != bucket.batch * self.steps_per_round or clips % min(_ENCODE_CLIPS, clips or 1):
                raise ConfigError(
                    f"batch {bucket.batch} x {self.steps_per_round} steps a round / reuse {self.reuse} must be a "
                    f"multiple of {_ENCODE_CLIPS} clips"
                )

    def _pool(self, bucket: Bucket) -> int:
        """Fresh clips a round."""
        return bucket.batch * self.steps_per_round // self.reuse

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
            Stopped: by a signal; see `train.loop.run`.
        """
        # A text encoder without a run's folder is someone else's.
        foreign = (self.out / "text_encoder").exists() and not self.train_folder.exists()
        if self.result.exists() or foreign:
            raise RehyatError(f"{self.out} holds a trained model already; choose another --out")
        phases = phases or Phases()
        vae = load_vae(self.out / "vae", dtype=jnp.dtype(self.dtype))
        self._check_fits(vae.config)
        vae_graph, vae_params = nnx.split(vae)
        build_sprite_tokenizer(self.out / "tokenizer", list(NAMES))
        tokenizer = Tokenizer.from_folder(self.out / "tokenizer")
        text_config = dataclasses.replace(self.text_encoder, vocab_size=tokenizer.vocab_size)
        models = Models(
            WanTransformer(self.model, dtype=jnp.dtype(self.dtype), rngs=nnx.Rngs(self.seed)),
            UMT5Encoder(text_config, dtype=jnp.dtype(self.dtype), rngs=nnx.Rngs(self.seed + 1)),
        )
        graph, params = nnx.split(models, nnx.Param)
        empty = _padded(tokenizer.encode([""], max_length=self.caption_tokens).ids, self.caption_tokens)

        def encode(bucket: Bucket, vae_params: PyTree, scenes: Any) -> Array:
            vae = nnx.merge(vae_graph, vae_params)
            return vae.normalize(vae.encode(bucket.render(scenes), frames_per_step=_ENCODE_FRAMES).astype(jnp.float32))

        def train_step(state: TrainState, pool: Pool, key: Key[Array, ""], rate: Array) -> tuple[TrainState, Array]:
            drop_key, time_key, noise_key = jax.random.split(key, 3)
            size = pool.latents.shape[0]
            dropped = jax.random.bernoulli(drop_key, self.caption_dropout, (size, 1))
            ids = jnp.where(dropped, empty, pool.ids)
            mask = jnp.where(dropped, (jnp.arange(ids.shape[1])[None] == 0).astype(jnp.int32), pool.mask)
            # Stratified over the batch: every level of noise in every step.
            even = (jnp.arange(size, dtype=jnp.float32) + jax.random.uniform(time_key, (size,))) / size
            sigma = self.shift * even / (1 + (self.shift - 1) * even)
            noise = jax.random.normal(noise_key, pool.latents.shape)
            wide = sigma[:, None, None, None, None]

            def loss(params: PyTree) -> Array:
                velocity = nnx.merge(graph, params)((1 - wide) * pool.latents + wide * noise, sigma * 1000, ids, mask)
                return jnp.mean(jnp.square(velocity.astype(jnp.float32) - (noise - pool.latents)))

            value, gradients = jax.value_and_grad(loss)(state.params)
            return self.optimizer.apply(state, gradients, rate), value

        def program(bucket: Bucket) -> jax.stages.Lowered:
            count = self._pool(bucket)

            def advance(
                state: TrainState, vae_params: PyTree, scenes: Any, ids: Array, mask: Array, key: Array, rate: Array
            ) -> tuple[TrainState, dict[str, Array]]:
                parts = jax.tree.map(lambda x: x.reshape(-1, min(_ENCODE_CLIPS, count), *x.shape[1:]), scenes)
                latents = jax.lax.map(lambda part: encode(bucket, vae_params, part), parts)
                pool = Pool(latents.reshape(count, *latents.shape[2:]), ids, mask)
                order_key, key = jax.random.split(key)
                order = jax.vmap(lambda k: jax.random.permutation(k, count))(jax.random.split(order_key, self.reuse))

                def step(state: TrainState, x: tuple[Array, Array]) -> tuple[TrainState, Array]:
                    return train_step(state, jax.tree.map(lambda a: a[x[0]], pool), x[1], rate)

                order = order.reshape(self.steps_per_round, bucket.batch)
                state, losses = jax.lax.scan(step, state, (order, jax.random.split(key, self.steps_per_round)))
                return state, {"loss": losses}

            scenes = jax.eval_shape(functools.partial(bucket.sample, count=count), round_key(0, 0))
            tokens = jax.ShapeDtypeStruct((count, self.caption_tokens), jnp.int32)
            return jax.jit(advance, donate_argnums=0).lower(
                state, vae_params, scenes, tokens, tokens, round_key(0, 0), jnp.float32(0)
            )

        with phases.measure("compile"):
            state = self.optimizer.init(params)
            samplers = [jax.jit(functools.partial(bucket.sample, count=self._pool(bucket))) for bucket in self.buckets]
            programs = compile_all([functools.partial(program, bucket) for bucket in self.buckets])

        def advance(state: TrainState, step: int) -> tuple[TrainState, dict[str, Array]]:
            index = step // self.steps_per_round
            bucket = choose(self.buckets, self.seed, index, progress=step / self.steps)
            scene_key, key = jax.random.split(round_key(self.seed, index))
            scenes = samplers[bucket](scene_key)
            tokens = tokenizer.encode(captions(scenes), max_length=self.caption_tokens)
            ids, mask = (_padded(x, self.caption_tokens) for x in (tokens.ids, tokens.mask))
            rate = jnp.float32(self.optimizer.rate(step, self.steps))
            return programs[bucket](state, vae_params, scenes, ids, mask, key, rate)

        with phases.measure("train"):
            state = run(
                state,
                advance,
                steps=self.steps,
                steps_per_advance=self.steps_per_round,
                folder=self.train_folder,
                checkpoint_seconds=self.checkpoint_seconds,
            )
        with phases.measure("save"):
            models = nnx.merge(graph, state.ema)
            self._complete()
            # One that is there was left by a process killed between this line and the last.
            shutil.rmtree(self.out / "text_encoder", ignore_errors=True)
            save_text_encoder(models.text_encoder, self.out / "text_encoder", dtype=jnp.bfloat16)
            save_transformer(models.transformer, self.result, dtype=jnp.bfloat16)

    def _check_fits(self, vae: VAEConfig) -> None:
        if not vae.z_dim == self.model.in_channels == self.model.out_channels:
            raise CheckpointError(
                f"{self.out / 'vae'} makes latents of {vae.z_dim} channels, and the transformer has "
                f"{self.model.in_channels} in and {self.model.out_channels} out"
            )
        for bucket in self.buckets:
            if (bucket.frames - 1) % vae.temporal_factor:
                raise ConfigError(f"{bucket.frames} frames are not {vae.temporal_factor}k + 1")

    def _complete(self) -> None:
        """The small files that make ``out`` a checkpoint of diffusers' WanPipeline, and ours beside them."""
        files = {
            "scheduler/scheduler_config.json": scheduler_to_config(FlowSchedule(shift=self.shift), UniPC()),
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
            "rehyat_defaults.json": self.defaults,
        }
        for name, content in files.items():
            (self.out / name).parent.mkdir(exist_ok=True)
            write_json(self.out / name, content)


def _padded(x: np.ndarray, length: int) -> Int[Array, "M L"]:
    return jnp.asarray(np.pad(x, ((0, 0), (0, length - x.shape[1]))), jnp.int32)


class Models(nnx.Module):
    """The two networks that train together."""

    def __init__(self, transformer: WanTransformer, text_encoder: UMT5Encoder) -> None:
        self.transformer = transformer
        self.text_encoder = text_encoder

    def __call__(
        self,
        latents: Float[Array, "B T h w z"],
        timesteps: Float[Array, " B"],
        ids: Int[Array, "B L"],
        mask: Int[Array, "B L"],
    ) -> Float[Array, "B T h w z"]:
        return self.transformer(latents, timesteps, self.embed(ids, mask))

    def embed(self, ids: Int[Array, "B L"], mask: Int[Array, "B L"]) -> Float[Array, "B K D"]:
        """Prompt embeddings as `rehyat_jax.text.embed_prompts` makes them for sampling: zeros beyond the mask."""
        text = self.text_encoder(ids, mask)
        text = jnp.where(mask[..., None] > 0, text, jnp.zeros((), text.dtype))
        return jnp.pad(text, ((0, 0), (0, _TEXT_TOKENS - text.shape[1]), (0, 0)))

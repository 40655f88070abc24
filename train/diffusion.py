"""Train a softmax Wan transformer on MovingSprites by flow matching, with a small UMT5 encoder trained along with it.

A round encodes a pool of fresh clips with the frozen VAE and makes several optimiser steps on it, all in one jitted
call: each clip serves ``reuse`` times with other noise, which pays for its encoding.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from rehyat_jax.config import TextEncoderConfig, WanConfig
from rehyat_jax.errors import ConfigError
from rehyat_jax.models.dit import WanTransformer
from rehyat_jax.models.umt5 import UMT5Encoder
from rehyat_jax.sampling.schedule import FlowSchedule
from rehyat_jax.sampling.scheduler_config import SchedulerConfig
from rehyat_jax.sprites.captions import captions
from rehyat_jax.sprites.world import NAMES
from rehyat_jax.text import Tokenizer
from rehyat_jax.weights import load_vae, save_text_encoder, save_transformer
from train.clips import Bucket, choose, round_key
from train.loop import run
from train.optimizer import OptimizerConfig, TrainState, apply_gradients, init_state
from train.tokenizer import build_sprite_tokenizer

#: Wan pads its text to this many tokens.
_TEXT_TOKENS = 512


class Pool(NamedTuple):
    """Clips of a round: normalised latents and their captions' tokens."""

    latents: Float[Array, "M T h w z"]
    ids: Int[Array, "M L"]
    mask: Bool[Array, "M L"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionTraining:
    """One run. It reads ``vae/`` under ``out``, and completes the folder in the diffusers layout."""

    out: Path
    model: WanConfig = WanConfig.mini_sprites()
    text_encoder: TextEncoderConfig = TextEncoderConfig.mini_sprites()
    buckets: tuple[Bucket, ...] = (
        Bucket(kind="plain", frames=65, batch=64, share=0.45),
        Bucket(kind="plain", frames=33, batch=128, share=0.1),
        Bucket(kind="plain", frames=129, batch=32, share=0.15),
        Bucket(kind="occlusion", frames=81, batch=32, share=0.1, longest_wait=0),
        Bucket(kind="occlusion", frames=129, batch=20, share=0.2, longest_wait=48),
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
    dtype: str = "bfloat16"
    seed: int = 0

    def __post_init__(self) -> None:
        for bucket in self.buckets:
            if bucket.batch * self.steps_per_round % self.reuse:
                raise ConfigError(f"batch {bucket.batch} × steps_per_round is not a multiple of reuse {self.reuse}")

    def run(self) -> None:
        build_sprite_tokenizer(self.out / "tokenizer", list(NAMES))
        tokenizer = Tokenizer.from_folder(self.out / "tokenizer")
        vae_graph, vae_params = nnx.split(load_vae(self.out / "vae", dtype=jnp.dtype(self.dtype)))
        text_config = dataclasses.replace(self.text_encoder, vocab_size=tokenizer.vocab_size)
        models = Models(
            WanTransformer(self.model, dtype=jnp.dtype(self.dtype), rngs=nnx.Rngs(self.seed)),
            UMT5Encoder(text_config, dtype=jnp.dtype(self.dtype), rngs=nnx.Rngs(self.seed + 1)),
        )
        graph, params = nnx.split(models, nnx.Param)
        transform = self.optimizer.build(self.steps)
        empty = jnp.asarray(tokenizer.encode([""], max_length=self.caption_tokens).ids)

        def encode(bucket: Bucket, vae_params: PyTree, scenes: Any) -> Array:
            vae = nnx.merge(vae_graph, vae_params)
            return vae.normalize(vae.encode(bucket.render(scenes)).astype(jnp.float32))

        def train_step(state: TrainState, batch: tuple[Pool, Key[Array, ""]]) -> tuple[TrainState, Array]:
            pool, key = batch
            drop_key, time_key, noise_key = jax.random.split(key, 3)
            size = pool.latents.shape[0]
            dropped = jax.random.bernoulli(drop_key, self.caption_dropout, (size, 1))
            ids = jnp.where(dropped, empty, pool.ids)
            mask = jnp.where(dropped, jnp.arange(ids.shape[1])[None] == 0, pool.mask)
            # Stratified over the batch: every level of noise in every step.
            even = (jnp.arange(size) + jax.random.uniform(time_key, (size,))) / size
            sigma = self.shift * even / (1 + (self.shift - 1) * even)
            noise = jax.random.normal(noise_key, pool.latents.shape)
            wide = sigma[:, None, None, None, None]

            def loss(params: PyTree) -> Array:
                velocity = nnx.merge(graph, params)((1 - wide) * pool.latents + wide * noise, sigma * 1000, ids, mask)
                return jnp.mean(jnp.square(velocity.astype(jnp.float32) - (noise - pool.latents)))

            value, gradients = jax.value_and_grad(loss)(state.params)
            return apply_gradients(state, gradients, transform, ema_decay=self.optimizer.ema_decay), value

        def rounds(bucket: Bucket):
            count = bucket.batch * self.steps_per_round // self.reuse
            pieces = max(count // 32, 1)

            @jax.jit(donate_argnums=0)
            def advance(
                state: TrainState, vae_params: PyTree, scenes: Any, ids: Array, mask: Array, key: Key[Array, ""]
            ) -> tuple[TrainState, dict[str, Array]]:
                split = jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), scenes)
                latents = jax.lax.map(lambda part: encode(bucket, vae_params, part), split)
                pool = Pool(latents.reshape(count, *latents.shape[2:]), ids, mask)
                order_key, key = jax.random.split(key)
                order = jax.vmap(lambda k: jax.random.permutation(k, count))(jax.random.split(order_key, self.reuse))
                order = order.reshape(self.steps_per_round, bucket.batch)
                state, losses = jax.lax.scan(
                    lambda state, x: train_step(state, (jax.tree.map(lambda a: a[x[0]], pool), x[1])),
                    state,
                    (order, jax.random.split(key, self.steps_per_round)),
                )
                return state, {"loss": losses}

            return jax.jit(lambda key: bucket.sample(key, count)), advance

        programs = [rounds(bucket) for bucket in self.buckets]

        def advance(state: TrainState) -> tuple[TrainState, dict[str, Array]]:
            index = int(state.step) // self.steps_per_round
            sample, step = programs[choose(self.buckets, self.seed, index)]
            scene_key, key = jax.random.split(round_key(self.seed, index))
            scenes = sample(scene_key)
            tokens = tokenizer.encode(captions(scenes), max_length=self.caption_tokens)
            return step(state, vae_params, scenes, jnp.asarray(tokens.ids), jnp.asarray(tokens.mask, bool), key)

        state = run(init_state(params, transform), advance, steps=self.steps, folder=self.out / "train-dit")
        models = nnx.merge(graph, state.ema)
        save_transformer(models.transformer, self.out / "transformer", dtype=jnp.bfloat16)
        save_text_encoder(models.text_encoder, self.out / "text_encoder", dtype=jnp.bfloat16)


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
        mask: Bool[Array, "B L"],
    ) -> Float[Array, "B T h w z"]:
        text = self.text_encoder(ids, mask)
        text = jnp.where(mask[..., None], text, 0)
        text = jnp.pad(text, ((0, 0), (0, _TEXT_TOKENS - text.shape[1]), (0, 0)))
        return self.transformer(latents, timesteps, text)

"""Flow matching on MovingSprites: what pretraining and finetuning share.

A round encodes a pool of fresh clips with the frozen VAE and makes several optimiser steps on it, all in one jitted
call: each clip serves ``reuse`` times with other noise, which pays for its encoding. A step is ``loss(params, frozen,
batch)`` and its gradient, without anything else in hand.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree

from rehyat_jax.config import VAEConfig, WanConfig
from rehyat_jax.errors import CheckpointError, ConfigError
from rehyat_jax.models.umt5 import UMT5Encoder
from rehyat_jax.models.vae import WanVAE
from rehyat_jax.record import Phases
from rehyat_jax.sprites.captions import captions
from rehyat_jax.text import Tokenizer
from train.clips import Bucket, check_rounds, choose, round_key
from train.loop import compile_all, run
from train.optimizer import OptimizerConfig, TrainState

#: Wan pads its text to this many tokens.
TEXT_TOKENS = 512
#: Clips, and latent frames of each, that the VAE encodes at a time: one shape for all lengths.
_ENCODE_CLIPS, _ENCODE_FRAMES = 32, 8


class Pool(NamedTuple):
    """Clips of a round: normalised latents, and their captions as the loss reads them, a row a clip."""

    latents: Float[Array, "M T h w z"]
    text: PyTree


class Batch(NamedTuple):
    """Clips of a step, each at a noise level of its own."""

    noisy: Float[Array, "B T h w z"]
    #: 1000 times the noise level.
    timesteps: Float[Array, " B"]
    text: PyTree
    #: What is to be learned: noise − video.
    velocity: Float[Array, "B T h w z"]


class Captions(NamedTuple):
    """Captions in tokens; for the mask see `rehyat_jax.text.Tokens`."""

    ids: Int[Array, "B L"]
    mask: Int[Array, "B L"]


#: From parameters that learn, others that do not, and a batch: what is minimised, and values to log.
Loss = Callable[[PyTree, PyTree, Batch], tuple[Array, dict[str, Array]]]
#: Captions as the pool keeps them, from the parameters that do not learn.
Read = Callable[[PyTree, Captions], PyTree]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowTraining:
    """The settings of either stage, and its rounds."""

    out: Path
    buckets: tuple[Bucket, ...]
    steps: int
    #: Optimiser steps a round, and how often each clip of its pool serves.
    steps_per_round: int = 16
    reuse: int = 4
    optimizer: OptimizerConfig = OptimizerConfig()
    #: Flow shift of training: the share of high noise.
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

    def __post_init__(self) -> None:
        check_rounds(self.buckets, steps=self.steps, steps_per_round=self.steps_per_round)
        if self.reuse < 1 or not 1 <= self.caption_tokens <= TEXT_TOKENS:
            raise ConfigError(f"reuse must be at least 1, and caption_tokens 1 to {TEXT_TOKENS}")
        if not (0 <= self.caption_dropout <= 1 and 0 < self.shift < float("inf")):
            raise ConfigError("caption_dropout must be 0 to 1, and shift above 0")
        for bucket in self.buckets:
            clips = self._pool(bucket)
            if clips * self.reuse != bucket.batch * self.steps_per_round or clips % min(_ENCODE_CLIPS, clips or 1):
                raise ConfigError(
                    f"batch {bucket.batch} x {self.steps_per_round} steps a round / reuse {self.reuse} must be a "
                    f"multiple of {_ENCODE_CLIPS} clips"
                )

    @property
    def train_folder(self) -> Path:
        """Checkpoints and metrics."""
        raise NotImplementedError

    def _pool(self, bucket: Bucket) -> int:
        """Fresh clips a round."""
        return bucket.batch * self.steps_per_round // self.reuse

    def check_fits(self, vae: VAEConfig, model: WanConfig, *, where: Path) -> None:
        """
        Raises:
            CheckpointError, ConfigError: the VAE, which is at ``where``, is not the model's or the clips'.
        """
        if not vae.z_dim == model.in_channels == model.out_channels:
            raise CheckpointError(
                f"{where} makes latents of {vae.z_dim} channels, and the transformer has "
                f"{model.in_channels} in and {model.out_channels} out"
            )
        for bucket in self.buckets:
            if (bucket.frames - 1) % vae.temporal_factor:
                raise ConfigError(f"{bucket.frames} frames are not {vae.temporal_factor}k + 1")

    def captions(self, tokenizer: Tokenizer, texts: list[str]) -> Captions:
        """Every text in ``caption_tokens`` tokens."""
        tokens = tokenizer.encode(texts, max_length=self.caption_tokens)
        return Captions(*(jnp.asarray(_padded(x, self.caption_tokens)) for x in tokens))

    def batch(self, pool: Pool, empty: PyTree, key: Key[Array, ""]) -> Batch:
        """These clips with noise, some without their caption: ``empty``'s only row stands for it."""
        drop_key, time_key, noise_key = jax.random.split(key, 3)
        size = pool.latents.shape[0]
        dropped = jax.random.bernoulli(drop_key, self.caption_dropout, (size,))

        def mixed(rows: Array, nothing: Array) -> Array:
            return jnp.where(dropped.reshape(-1, *[1] * (rows.ndim - 1)), nothing, rows)

        # Stratified over the batch: every level of noise in every step.
        even = (jnp.arange(size, dtype=jnp.float32) + jax.random.uniform(time_key, (size,))) / size
        sigma = self.shift * even / (1 + (self.shift - 1) * even)
        noise = jax.random.normal(noise_key, pool.latents.shape)
        wide = sigma[:, None, None, None, None]
        return Batch(
            noisy=(1 - wide) * pool.latents + wide * noise,
            timesteps=sigma * 1000,
            text=jax.tree.map(mixed, pool.text, empty),
            velocity=noise - pool.latents,
        )

    def train(
        self,
        params: PyTree,
        loss: Loss,
        *,
        vae: WanVAE,
        tokenizer: Tokenizer,
        phases: Phases,
        read: Read = lambda _, tokens: tokens,
        frozen: PyTree = None,
        shares: PyTree = None,
    ) -> TrainState:
        """All steps, from the newest checkpoint on where there is one.

        Args:
            read: applied to a round's captions, and to the empty one, once a round.
            frozen: parameters for ``read`` and ``loss`` that do not learn.
            shares: of the learning rate, a leaf of ``params`` each; see `OptimizerConfig.apply`.

        Raises:
            RehyatError, CheckpointError, Stopped: see `train.loop.run`.
        """
        vae_graph, vae_params = nnx.split(vae)
        empty = self.captions(tokenizer, [""])

        def encode(bucket: Bucket, vae_params: PyTree, scenes: Any) -> Array:
            vae = nnx.merge(vae_graph, vae_params)
            return vae.normalize(vae.encode(bucket.render(scenes), frames_per_step=_ENCODE_FRAMES).astype(jnp.float32))

        def program(bucket: Bucket) -> jax.stages.Lowered:
            count = self._pool(bucket)

            def advance(
                state: TrainState,
                vae_params: PyTree,
                frozen: PyTree,
                scenes: Any,
                tokens: Captions,
                key: Array,
                rate: Array,
            ) -> tuple[TrainState, dict[str, Array]]:
                parts = jax.tree.map(lambda x: x.reshape(-1, min(_ENCODE_CLIPS, count), *x.shape[1:]), scenes)
                latents = jax.lax.map(lambda part: encode(bucket, vae_params, part), parts)
                pool = Pool(latents.reshape(count, *latents.shape[2:]), read(frozen, tokens))
                nothing = read(frozen, empty)
                order_key, key = jax.random.split(key)
                order = jax.vmap(lambda k: jax.random.permutation(k, count))(jax.random.split(order_key, self.reuse))

                def step(state: TrainState, x: tuple[Array, Array]) -> tuple[TrainState, dict[str, Array]]:
                    batch = self.batch(jax.tree.map(lambda a: a[x[0]], pool), nothing, x[1])
                    gradients, metrics = jax.grad(loss, has_aux=True)(state.params, frozen, batch)
                    return self.optimizer.apply(state, gradients, rate, shares=shares), metrics

                order = order.reshape(self.steps_per_round, bucket.batch)
                return jax.lax.scan(step, state, (order, jax.random.split(key, self.steps_per_round)))

            scenes = jax.eval_shape(functools.partial(bucket.sample, count=count), round_key(0, 0))
            tokens = jax.eval_shape(lambda: jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), empty))
            return jax.jit(advance, donate_argnums=0).lower(
                state, vae_params, frozen, scenes, tokens, round_key(0, 0), jnp.float32(0)
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
            tokens = self.captions(tokenizer, captions(scenes))
            rate = jnp.float32(self.optimizer.rate(step, self.steps))
            return programs[bucket](state, vae_params, frozen, scenes, tokens, key, rate)

        with phases.measure("train"):
            return run(
                state,
                advance,
                steps=self.steps,
                steps_per_advance=self.steps_per_round,
                folder=self.train_folder,
                checkpoint_seconds=self.checkpoint_seconds,
            )


def embed(encoder: UMT5Encoder, tokens: Captions) -> Float[Array, "B L D"]:
    """Prompt embeddings as `rehyat_jax.text.embed_prompts` makes them for sampling, not padded yet."""
    text = encoder(tokens.ids, tokens.mask)
    return jnp.where(tokens.mask[..., None] > 0, text, jnp.zeros((), text.dtype))


def pad_text(text: Float[Array, "B L D"]) -> Float[Array, "B K D"]:
    """Zeros up to Wan's number of text tokens."""
    return jnp.pad(text, ((0, 0), (0, TEXT_TOKENS - text.shape[1]), (0, 0)))


def flow_loss(velocity: Float[Array, "B T h w z"], target: Float[Array, "B T h w z"]) -> Float[Array, ""]:
    """Mean squared error, in float32."""
    return jnp.mean(jnp.square(velocity.astype(jnp.float32) - target.astype(jnp.float32)))


def _padded(x: np.ndarray, length: int) -> np.ndarray:
    return np.pad(x, ((0, 0), (0, length - x.shape[1])))

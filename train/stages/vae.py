"""Train a VAE of Wan's architecture on MovingSprites: reconstruction and a mild pull of the posterior to the normal.

Or a decoder alone, for the latents that there are: every model that makes them goes on with it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, PyTree

from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.models.checkpoints import load_vae, save_vae
from rehyat_jax.models.folder import find_model
from rehyat_jax.models.wan.config import VAEConfig
from rehyat_jax.models.wan.vae import Moments, WanVAE
from rehyat_jax.runtime.devices import Devices
from rehyat_jax.runtime.mesh import constrain_sharding
from train.data.clips import Bucket, check_rounds, round_key
from train.engine.gradients import Mean
from train.engine.optimizer import OptimizerConfig
from train.engine.run import RunConfig
from train.engine.stage import Data, Models, Network, Stage, Update

#: Videos, and a key for their posteriors' noise.
Batch = tuple[Float[Array, "B F H W 3"], Key[Array, ""]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAETraining(RunConfig):
    """One run. The result is a ``vae/`` folder in the diffusers layout under ``out``."""

    model: VAEConfig = VAEConfig.mini_sprites()
    #: A model whose encoder stays, and with it the latents and what makes them: the decoder alone learns, from the
    #: model's own where they are of one width. None: both learn.
    encoder: Path | None = None
    #: Every step takes a batch of each, so that there is one program: their clips are of one size.
    buckets: tuple[Bucket, ...] = (
        Bucket(kind="plain", frames=17, batch=24),
        Bucket(kind="occlusion", frames=17, batch=8, longest_wait=8, columns=64),
    )
    #: Clips begin at a frame drawn from 0 to this.
    latest_start: int = 96
    steps: int = 1600
    #: Optimiser steps in one jitted call.
    steps_per_round: int = 8
    optimizer: OptimizerConfig = OptimizerConfig(method="muon", learning_rate=2e-2, weight_decay=0.0)
    #: Weight of the mean Kullback-Leibler divergence a latent value against the mean absolute error a pixel.
    kl_weight: float = 3e-3
    #: Log-variance that the posterior starts with. At 0 its noise drowns the means for hundreds of steps.
    initial_logvar: float = -6.0
    #: Weight of the squared error, which the verifier's likelihood sees.
    square_weight: float = 1.0
    #: Clips whose posterior means give ``latents_mean`` and ``latents_std``.
    statistics_clips: int = 512
    #: Of the computation; weights and optimiser are in float32.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        check_rounds(self.buckets, steps=self.steps, steps_per_round=self.steps_per_round)
        super().__post_init__()
        sizes = {(bucket.frames, bucket.width) for bucket in self.buckets}
        if len(sizes) > 1:
            raise ConfigError(
                f"the clips of a VAE's buckets must be of one size, not of (frames, width) {sorted(sizes)}"
            )
        for frames, width in sizes:
            if (frames - 1) % self.model.temporal_factor:
                raise ConfigError(f"{frames} frames are not {self.model.temporal_factor}k + 1")
            if width % self.model.spatial_factor:
                raise ConfigError(f"{width} columns are not a multiple of {self.model.spatial_factor}")
        if self.latest_start < 0 or self.statistics_clips < 1:
            raise ConfigError("latest_start must be at least 0, and statistics_clips at least 1")

    @property
    def result(self) -> Path:
        """The folder that stands when the run is done, and not before."""
        return self.out / "vae"

    @property
    def train_folder(self) -> Path:
        """Checkpoints and metrics."""
        return self.out / "train-vae"

    def check_result(self) -> None:
        if self.result.exists():
            raise RehyatError(f"{self.out} holds a trained VAE already; choose another --out")

    def stage(self) -> VAEStage:
        return VAEStage(self) if self.encoder is None else DecoderStage(self)


class _Videos(Data):
    """A batch of every bucket, side by side, and a key for the posterior's noise."""

    def __init__(self, training: VAETraining) -> None:
        self.training = training

    def host(self, index: int) -> Key[Array, ""]:
        return round_key(self.training.seed, index)

    def host_shapes(self) -> PyTree:
        return jax.eval_shape(lambda: round_key(0, 0))

    def draw(self, models: Models, carried: PyTree, host: PyTree, frozen: PyTree) -> tuple[PyTree, Any]:
        training = self.training
        steps = jax.random.split(host, training.steps_per_round)

        def batch(step: Array) -> Batch:
            noise_key, *keys = jax.random.split(steps[step], 1 + len(training.buckets))
            clips = zip(training.buckets, keys, strict=True)
            video = jnp.concatenate([bucket.draw(key, latest_start=training.latest_start) for bucket, key in clips])
            return constrain_sharding(video, "batch", *[None] * 4), noise_key

        return None, batch


class VAEStage(Stage):
    """A VAE learns to reconstruct."""

    learner = "vae"

    def __init__(self, training: VAETraining) -> None:
        self.training, self.steps_per_round = training, training.steps_per_round
        self.updates = (Update(role=self.learner, loss=self.loss),)

    @functools.cached_property
    def devices(self) -> Devices:
        clips = sum(bucket.batch for bucket in self.training.buckets)
        devices = Devices.of(self.training.mesh, batch=clips)
        if clips % (pieces := devices.batch_pieces):
            raise ConfigError(f"{clips} clips of a batch do not divide by data x fsdp = {pieces} of the mesh")
        return devices

    @property
    def networks(self) -> dict[str, Network]:
        return {"vae": Network(make=self._vae, optimizer=self.training.optimizer)}

    def _vae(self) -> WanVAE:
        training = self.training
        model = WanVAE(training.model, dtype=jnp.dtype(training.dtype), rngs=nnx.Rngs(training.seed))
        bias = model.quant_conv.bias
        bias.set_value(bias.get_value().at[training.model.z_dim :].set(training.initial_logvar))
        return model

    def data(self) -> list[_Videos]:
        return [_Videos(self.training)]

    def loss(self, models: Models, batch: Batch) -> dict[str, Mean]:
        training, vae, (video, key) = self.training, models["vae"], batch
        moments = vae.encode_moments(video)
        distance, values = self.distance(vae, moments, video, key)
        mean, logvar = moments.mean.astype(jnp.float32), moments.logvar.astype(jnp.float32)
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1 - logvar)
        return {
            "loss": Mean.of(distance + training.kl_weight * kl),
            **values,
            "kl": Mean.of(kl, weight=0.0),
        }

    def distance(
        self, vae: WanVAE, moments: Moments, video: Float[Array, "B F H W 3"], key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Mean]]:
        """From a video to what a sample of its posterior is decoded to, and values to log."""
        mean, logvar = moments.mean.astype(jnp.float32), moments.logvar.astype(jnp.float32)
        sample = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, mean.dtype)
        error = vae.decode(sample, clip=False).astype(jnp.float32) - video
        square = jnp.mean(jnp.square(error))
        distance = jnp.mean(jnp.abs(error)) + self.training.square_weight * square
        return distance, {"psnr": Mean.of(10 * jnp.log10(4 / square), weight=0.0)}

    def export(self, averages: Mapping[str, Any], folder: Path) -> None:
        vae = averages["vae"]
        mean, std = self._statistics(vae)
        vae.config = dataclasses.replace(self.training.model, latents_mean=mean, latents_std=std)
        save_vae(vae, folder, dtype=jnp.bfloat16)

    def _statistics(self, vae: WanVAE) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation a channel of the posterior's samples over clips of training.

        Of samples, not of means: a channel that the divergence has emptied then stays near 0 when it is normalised,
        where its means alone would be blown up to a variance of 1 that no decoder looks at.
        """
        graph, params = nnx.split(vae)
        bucket = self.training.buckets[0]

        @jax.jit
        def sums(params: PyTree, key: Array) -> tuple[Array, Array]:
            video = bucket.render(bucket.sample(key, bucket.batch))
            moments = nnx.merge(graph, params).encode_moments(video)
            mean, logvar = (x.astype(jnp.float32).reshape(-1, x.shape[-1]) for x in (moments.mean, moments.logvar))
            return jnp.mean(mean, axis=0), jnp.mean(jnp.square(mean) + jnp.exp(logvar), axis=0)

        count = -(-self.training.statistics_clips // bucket.batch)
        drawn = [sums(params, round_key(self.training.seed + 1, index)) for index in range(count)]
        mean = sum(m for m, _ in drawn) / count
        std = jnp.sqrt(sum(s for _, s in drawn) / count - jnp.square(mean))
        return tuple(map(float, mean)), tuple(map(float, std))


class DecoderHalf(nnx.Module):
    """What of a VAE makes video of latents."""

    def __init__(self, vae: WanVAE) -> None:
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def put_into(self, vae: WanVAE) -> WanVAE:
        """The VAE, with this decoder."""
        vae.post_quant_conv, vae.decoder = self.post_quant_conv, self.decoder
        return vae


class DecoderStage(VAEStage):
    """A decoder learns to make the video of latents that an encoder, which does not learn, made of it."""

    learner = "decoder"

    @functools.cached_property
    def _source(self) -> WanVAE:
        """
        Raises:
            ConfigError: its latents are not those of the configuration's model.
        """
        training = self.training
        vae = self._loaded(jnp.dtype(training.dtype))
        same = dataclasses.replace(
            training.model,
            decoder_base_dim=vae.config.decoder_base_dim,
            latents_mean=vae.config.latents_mean,
            latents_std=vae.config.latents_std,
        )
        if vae.config != same:
            raise ConfigError(
                f"the encoder of {training.encoder} is of other sizes than the configuration's model: a decoder may "
                "differ by its decoder_base_dim alone"
            )
        return vae

    def _loaded(self, dtype: jnp.dtype) -> WanVAE:
        """It computes in ``dtype``; its parameters are in float32."""
        assert self.training.encoder is not None
        vae = load_vae(find_model(self.training.encoder))
        computing = nnx.eval_shape(lambda: WanVAE(vae.config, dtype=dtype, rngs=nnx.Rngs(0)))
        return nnx.merge(nnx.graphdef(computing), nnx.state(vae))

    @property
    def networks(self) -> dict[str, Network]:
        return {
            "encoder": Network(make=lambda: self._source),
            "decoder": Network(make=self._decoder, optimizer=self.training.optimizer),
        }

    def _decoder(self) -> DecoderHalf:
        config, training = self._source.config, self.training
        if config.decoder_dim == training.model.decoder_dim:
            return DecoderHalf(self._loaded(self._source.dtype))
        config = dataclasses.replace(config, decoder_base_dim=training.model.decoder_dim)
        return DecoderHalf(WanVAE(config, dtype=self._source.dtype, rngs=nnx.Rngs(training.seed)))

    def loss(self, models: Models, batch: Batch) -> dict[str, Mean]:
        vae, (video, key) = models["encoder"], batch
        moments = jax.tree.map(jax.lax.stop_gradient, vae.encode_moments(video))
        distance, values = self.distance(models["decoder"].put_into(vae), moments, video, key)
        return {"loss": Mean.of(distance), **values}

    def export(self, averages: Mapping[str, Any], folder: Path) -> None:
        vae = averages["decoder"].put_into(self._loaded(jnp.dtype(jnp.float32)))
        width = self.training.model.decoder_dim
        vae.config = dataclasses.replace(vae.config, decoder_base_dim=None if width == vae.config.base_dim else width)
        save_vae(vae, folder, dtype=jnp.bfloat16)

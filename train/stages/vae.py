"""Train a VAE of Wan's architecture on MovingSprites: reconstruction and a mild pull of the posterior to the normal."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.models.checkpoints import save_vae
from rehyat_jax.models.wan.config import VAEConfig
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.runtime.mesh import laid_out
from rehyat_jax.runtime.record import Phases
from train.data.clips import Bucket, check_rounds, round_key
from train.engine.loop import run
from train.engine.optimizer import OptimizerConfig, TrainState
from train.parallel.devices import Devices, Processes, first_process, wait_for_all
from train.parallel.sharding import MeshConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAETraining:
    """One run. The result is a ``vae/`` folder in the diffusers layout under ``out``."""

    out: Path
    model: VAEConfig = VAEConfig.mini_sprites()
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
    seed: int = 0
    #: Between two checkpoints; 0 saves after every round.
    checkpoint_seconds: float = 60.0
    #: Devices along each axis, of which data and fsdp share the clips; by default one device is used.
    mesh: MeshConfig = MeshConfig(fsdp=1)
    processes: Processes = Processes()

    def __post_init__(self) -> None:
        check_rounds(self.buckets, steps=self.steps, steps_per_round=self.steps_per_round)
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

    def run(self, phases: Phases | None = None) -> None:
        """Train, or continue a run that was stopped; ``phases`` takes times and memory.

        Raises:
            RehyatError: ``out`` holds a finished VAE, or training diverged.
            ConfigError: the mesh does not divide the devices or the clips.
            CheckpointError: ``out`` has checkpoints of another model, or cannot be written.
            Stopped: by a signal; see `train.engine.loop.run`.
        """
        if self.result.exists():
            raise RehyatError(f"{self.out} holds a trained VAE already; choose another --out")
        phases, devices = phases or Phases(), self._devices()
        model = WanVAE(self.model, dtype=jnp.dtype(self.dtype), rngs=nnx.Rngs(self.seed))
        bias = model.quant_conv.bias
        bias.set_value(bias.get_value().at[self.model.z_dim :].set(self.initial_logvar))
        graph, params = nnx.split(model, nnx.Param)

        def loss(params: PyTree, video: Float[Array, "B F H W 3"], key: Array) -> tuple[Array, dict[str, Array]]:
            vae = nnx.merge(graph, params)
            moments = vae.encode_moments(video)
            mean, logvar = moments.mean.astype(jnp.float32), moments.logvar.astype(jnp.float32)
            sample = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, mean.dtype)
            error = vae.decode(sample, clip=False).astype(jnp.float32) - video
            square = jnp.mean(jnp.square(error))
            kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1 - logvar)
            total = jnp.mean(jnp.abs(error)) + self.square_weight * square + self.kl_weight * kl
            return total, {"loss": total, "psnr": 10 * jnp.log10(4 / square), "kl": kl}

        def advance(state: TrainState, key: Array, rate: Array) -> tuple[TrainState, dict[str, Array]]:
            def step(state: TrainState, key: Array) -> tuple[TrainState, dict[str, Array]]:
                noise_key, *keys = jax.random.split(key, 1 + len(self.buckets))
                clips = zip(self.buckets, keys, strict=True)
                video = jnp.concatenate([bucket.draw(key, latest_start=self.latest_start) for bucket, key in clips])
                video = laid_out(video, "batch", *[None] * 4)
                gradients, metrics = jax.grad(loss, has_aux=True)(state.params, video, noise_key)
                return self.optimizer.apply(state, gradients, rate), metrics

            return jax.lax.scan(step, state, jax.random.split(key, self.steps_per_round))

        with phases.measure("compile"):
            state = devices.made(self.optimizer.init, devices.parameters(params))
            cut, nothing = devices.parameter_shardings(state), devices.everywhere((round_key(0, 0), jnp.float32(0)))
            program = devices.lower(advance, state, *nothing, donate=(0,), out=(cut, devices.whole)).compile()

        def advance_round(state: TrainState, step: int) -> tuple[TrainState, dict[str, Array]]:
            rate = jnp.float32(self.optimizer.rate(step, self.steps))
            return program(state, *devices.everywhere((round_key(self.seed, step // self.steps_per_round), rate)))

        with phases.measure("train"):
            state = run(
                state,
                advance_round,
                steps=self.steps,
                steps_per_advance=self.steps_per_round,
                folder=self.train_folder,
                checkpoint_seconds=self.checkpoint_seconds,
                devices=devices.count,
            )
        with phases.measure("save"):
            averaged = devices.on_host(state.ema)
            if first_process():
                vae = nnx.merge(graph, averaged)
                mean, std = self._statistics(vae)
                vae.config = dataclasses.replace(self.model, latents_mean=mean, latents_std=std)
                save_vae(vae, self.result, dtype=jnp.bfloat16)
            wait_for_all("result")

    def _devices(self) -> Devices:
        clips = sum(bucket.batch for bucket in self.buckets)
        devices = Devices.of(self.mesh, batch=clips)
        if clips % (pieces := devices.batch_pieces):
            raise ConfigError(f"{clips} clips of a batch do not divide by data x fsdp = {pieces} of the mesh")
        return devices

    def _statistics(self, vae: WanVAE) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation a channel of the posterior's samples over clips of training.

        Of samples, not of means: a channel that the divergence has emptied then stays near 0 when it is normalised,
        where its means alone would be blown up to a variance of 1 that no decoder looks at.
        """
        graph, params = nnx.split(vae)
        bucket = self.buckets[0]

        @jax.jit
        def sums(params: PyTree, key: Array) -> tuple[Array, Array]:
            video = bucket.render(bucket.sample(key, bucket.batch))
            moments = nnx.merge(graph, params).encode_moments(video)
            mean, logvar = (x.astype(jnp.float32).reshape(-1, x.shape[-1]) for x in (moments.mean, moments.logvar))
            return jnp.mean(mean, axis=0), jnp.mean(jnp.square(mean) + jnp.exp(logvar), axis=0)

        count = -(-self.statistics_clips // bucket.batch)
        drawn = [sums(params, round_key(self.seed + 1, index)) for index in range(count)]
        mean = sum(m for m, _ in drawn) / count
        std = jnp.sqrt(sum(s for _, s in drawn) / count - jnp.square(mean))
        return tuple(map(float, mean)), tuple(map(float, std))

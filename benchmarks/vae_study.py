"""How fast a small VAE of Wan's architecture learns the sprites, by optimiser and by spatial factor, on a CPU.

    python -m benchmarks.vae_study --factor 4 --optimizer.method muon --optimizer.learning-rate 2e-2

Six to eight minutes on two cores.

Batches of 4 plain clips of 5 frames: enough to compare, not to train. Prints the mean PSNR and Kullback-Leibler
divergence of every 50 steps.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from rehyat_jax.models.wan.config import VAEConfig
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.sprites import world
from train.engine.optimizer import OptimizerConfig, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """One run."""

    #: Pixels a latent pixel stands for, along each side.
    factor: Literal[4, 8] = 8
    steps: int = 300
    batch: int = 4
    frames: int = 5
    kl_weight: float = 1e-4
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-3, warmup_steps=30, weight_decay=0.0)

    def run(self) -> None:
        config = VAEConfig.mini_sprites()
        if self.factor == 8:
            config = dataclasses.replace(config, dim_mult=(1, 2, 3, 3), temperal_downsample=(False, True, True))
        graph, params = nnx.split(WanVAE(config, rngs=nnx.Rngs(0)), nnx.Param)

        @jax.jit
        def step(state: TrainState, key: jax.Array, rate: jax.Array) -> tuple[TrainState, jax.Array]:
            scene_key, noise_key = jax.random.split(key)
            video = world.render(world.sample_scenes(scene_key, self.batch), num_frames=self.frames)

            def loss(params: nnx.State) -> tuple[jax.Array, jax.Array]:
                vae = nnx.merge(graph, params)
                moments = vae.encode_moments(video)
                noise = jax.random.normal(noise_key, moments.mean.shape)
                error = vae.decode(moments.mean + jnp.exp(0.5 * moments.logvar) * noise, clip=False) - video
                square = jnp.mean(jnp.square(error))
                kl = 0.5 * jnp.mean(jnp.square(moments.mean) + jnp.exp(moments.logvar) - 1 - moments.logvar)
                seen = jnp.stack([10 * jnp.log10(4 / square), kl])
                return jnp.mean(jnp.abs(error)) + square + self.kl_weight * kl, seen

            gradients, seen = jax.grad(loss, has_aux=True)(state.params)
            return self.optimizer.apply(state, gradients, rate), seen

        state, seen = self.optimizer.init(params), []
        for index in range(self.steps):
            rate = jnp.float32(self.optimizer.rate(index, self.steps))
            state, values = step(state, jax.random.key(index), rate)
            seen.append(np.asarray(values))
            if (index + 1) % 50 == 0:
                psnr, kl = np.mean(seen[-50:], axis=0)
                print(f"step {index + 1}: {psnr:.2f} dB, {kl:.1f} nats a latent value", flush=True)


if __name__ == "__main__":
    tyro.cli(Study).run()

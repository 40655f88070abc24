"""The bundled model's VAE: Wan's architecture at a quarter of its width, trained on MovingSprites made on the fly.

    rehyat pretrain sprites_vae                        # then sprites_dit, which reads its result
    rehyat pretrain sprites_vae --out out/other --steps 800

Cost: one H200, 2.5 minutes: 54 s of steps (30 a second), the rest compiling (less when the cache has the programs).

Result: out/mini-sprites/vae, 5 MB. Clips of training are decoded from the posterior to 31.7 dB; 256 true clips of 65
frames that went through it keep an identity recall of 0.993.
"""

from pathlib import Path

from rehyat_jax.models.wan.config import VAEConfig
from train.data.clips import Bucket
from train.engine.optimizer import OptimizerConfig
from train.stages.vae import VAETraining

config = VAETraining(
    out=Path("out/mini-sprites"),
    model=VAEConfig.mini_sprites(),
    buckets=(
        Bucket(kind="plain", frames=17, batch=24),
        Bucket(kind="occlusion", frames=17, batch=8, longest_wait=8, columns=64),
    ),
    steps=1600,
    optimizer=OptimizerConfig(method="muon", learning_rate=2e-2, weight_decay=0.0),
)

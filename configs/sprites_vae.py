"""The bundled model's VAE: Wan's architecture at a quarter of its width, trained on MovingSprites made on the fly.

    rehyat pretrain sprites_vae                        # then sprites_dit, which reads its result
    rehyat pretrain sprites_vae --out out/other --steps 800

Cost: one H200, 2 minutes at 27 steps a second, after 2.5 minutes of compiling (less when the cache has the programs).

Result: out/mini-sprites/vae, 7 MB. Clips of training are decoded from the posterior to 23.7 dB, and true clips of 65
frames that went through it keep an identity recall of 0.33: enough to prove the program, and not enough for a good
model, which wants 0.99. That was with --initial-logvar 0; a posterior that starts narrow has been tried at a tiny size
alone (a loss of 0.85 against 1.10 after 32 steps).
"""

from pathlib import Path

from rehyat_jax.config import VAEConfig
from train.clips import Bucket
from train.optimizer import OptimizerConfig
from train.vae import VAETraining

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

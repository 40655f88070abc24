"""The bundled model's decoder, trained again for the latents that there are: on long clips, and narrower.

    rehyat pretrain sprites_decoder                    # reads the bundled mini-sprites
    rehyat pretrain sprites_decoder --model.decoder-base-dim 24    # as wide as before, from the decoder before

The encoder stays, and with it the latents and the transformers that make them.

Cost: one H200, 114 s of 1,000 steps beside other programs.

Result: out/sprites-decoder/vae, two thirds as wide as the one that ships, about twice as fast on two cores, and not as
good: after 1,000 steps 29.7 dB on plain clips of 129 frames where the shipped one has 30.4, an identity recall of
0.965 where that has 0.993, and 17 of 255 on the pillar where that has 5. So it does not ship
(docs/notebook/fewstep.md).
"""

import dataclasses
from pathlib import Path

from rehyat_jax.models.wan.config import VAEConfig
from train.data.clips import Bucket
from train.engine.optimizer import OptimizerConfig
from train.stages.vae import VAETraining

config = VAETraining(
    out=Path("out/sprites-decoder"),
    encoder=Path("mini-sprites"),
    model=dataclasses.replace(VAEConfig.mini_sprites(), decoder_base_dim=16),
    buckets=(
        Bucket(kind="plain", frames=129, batch=8, pairs=0.8),
        Bucket(kind="occlusion", frames=129, batch=8, longest_wait=48, columns=64),
    ),
    latest_start=48,
    steps=1000,
    optimizer=OptimizerConfig(method="muon", learning_rate=2e-2, schedule="linear", weight_decay=0.0),
)

"""The bundled model's decoder, trained again for the latents that there are: on long clips, and narrower.

    rehyat pretrain sprites_decoder                    # reads the bundled mini-sprites
    rehyat pretrain sprites_decoder --model.decoder-base-dim 24    # as wide as before, from the decoder before

The encoder stays, and with it the latents and the transformers that make them.

Result: out/sprites-decoder/vae.
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
    steps=1200,
    optimizer=OptimizerConfig(method="muon", learning_rate=2e-2, schedule="linear", weight_decay=0.0),
)

"""The bundled model's transformer and text encoder: a softmax Wan DiT of ten layers, and a small UMT5 trained with it.

    rehyat pretrain sprites_vae                        # first: this run reads out/mini-sprites/vae
    rehyat pretrain sprites_dit
    rehyat generate "a lemon moving down slowly on a blue background" --model out/mini-sprites

Clips of 33 to 129 frames, a quarter of the rounds from the occlusion split.

Cost: one H200, 11 steps a second (70,000 tokens each), 17 minutes and 160 s of compiling four programs side by side.

Result: the folder out/mini-sprites, complete in the diffusers layout, 29 MB: recall 0.824, directions 0.620, speed
1.08 of the caption's, grounds 1.000 on 256 prompts never seen (docs/results.md).
"""

from pathlib import Path

from rehyat_jax.config import TextEncoderConfig, WanConfig
from train.clips import Bucket
from train.diffusion import DiffusionTraining
from train.optimizer import OptimizerConfig

config = DiffusionTraining(
    out=Path("out/mini-sprites"),
    model=WanConfig.mini_sprites(),
    text_encoder=TextEncoderConfig.mini_sprites(),
    buckets=(
        Bucket(kind="plain", frames=65, batch=64, share=0.5),
        Bucket(kind="plain", frames=33, batch=128, share=0.1),
        Bucket(kind="plain", frames=129, batch=32, share=0.15),
        Bucket(kind="occlusion", frames=129, batch=24, share=0.25, longest_wait=48),
    ),
    steps=10_928,
    optimizer=OptimizerConfig(method="muon", learning_rate=1e-2),
)

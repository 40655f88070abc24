"""The bundled model's transformer and text encoder: a softmax Wan DiT of ten layers, and a small UMT5 trained with it.

    rehyat pretrain sprites_vae                        # first: this run reads out/mini-sprites/vae
    rehyat pretrain sprites_dit
    rehyat generate "a lemon moving down slowly on a blue background" --model out/mini-sprites

Clips of 33 frames for the first third, many captions a second; then 65 to 129 frames, some from the occlusion split.
Four of five plain clips have two objects, for with one there is nothing to confuse.

Cost: one H200 made 10 to 11 steps a second (70,000 tokens each) with a loop over layers (--no-unroll), two without it
(--mesh.data 2 --mesh.fsdp 1) make 26 to 27, after some two minutes of compiling. It was run with the loop, on four
H100s in 824 s: 225 s until the first steps, then 15 to 21 a second, other programs beside it.

Result: the folder out/mini-sprites, complete in the diffusers layout, 29 MB: on 256 prompts never seen at guidance 5,
recall 0.953, directions 0.933, speed 0.998 of the caption's, grounds 1.000. The model that ships was trained further,
by sprites_dit_longer (docs/notebook/results.md).
"""

from pathlib import Path

from rehyat_jax.models.umt5.config import TextEncoderConfig
from rehyat_jax.models.wan.config import WanConfig
from train.data.clips import Bucket
from train.engine.optimizer import OptimizerConfig
from train.stages.diffusion import DiffusionTraining

config = DiffusionTraining(
    out=Path("out/mini-sprites"),
    model=WanConfig.mini_sprites(),
    text_encoder=TextEncoderConfig.mini_sprites(),
    buckets=(
        Bucket(kind="plain", frames=33, batch=128, during=(0.0, 0.35), pairs=0.8),
        Bucket(kind="plain", frames=65, batch=64, share=0.4, during=(0.2, 1.0), pairs=0.8),
        Bucket(kind="plain", frames=129, batch=32, share=0.2, during=(0.35, 1.0), pairs=0.8),
        Bucket(kind="occlusion", frames=129, batch=24, share=0.3, longest_wait=48, during=(0.2, 1.0)),
    ),
    shift=5.0,
    steps=11_600,
    unroll=True,
    optimizer=OptimizerConfig(method="muon", learning_rate=1e-2),
)

"""The bundled model's transformer and text encoder, trained further: sprites_dit's result is where it begins.

    rehyat pretrain sprites_dit                        # first: this run reads out/mini-sprites
    rehyat pretrain sprites_dit_longer
    rehyat generate "a lemon moving down slowly on a blue background" --model out/mini-sprites-longer

Clips of 65 to 129 frames, as in the last two thirds of sprites_dit, at a rate that begins high again. Half of the
occlusions end soon after the object comes out: in a longer clip the frames after that tell who it is as well as those
before the pillar do.

Cost: two H200s (--mesh.data 2 --mesh.fsdp 1) took 292 s for 7,360 steps, 25 to 27 a second, after two and a half
minutes of compiling.

Result: the folder out/mini-sprites-longer, complete in the diffusers layout, 29 MB. The model that ships went through
it twice: first with occlusions of 129 frames alone, then as it is here with --steps 7360 --optimizer.learning-rate 7e-3
--init and the first one's result (docs/notebook/results.md).
"""

from pathlib import Path

from rehyat_jax.models.umt5.config import TextEncoderConfig
from rehyat_jax.models.wan.config import WanConfig
from train.data.clips import Bucket
from train.engine.optimizer import OptimizerConfig
from train.stages.diffusion import DiffusionTraining

config = DiffusionTraining(
    out=Path("out/mini-sprites-longer"),
    init=Path("out/mini-sprites"),
    model=WanConfig.mini_sprites(),
    text_encoder=TextEncoderConfig.mini_sprites(),
    buckets=(
        Bucket(kind="plain", frames=65, batch=64, share=0.45, pairs=0.8),
        Bucket(kind="plain", frames=129, batch=32, share=0.15, pairs=0.8),
        Bucket(kind="occlusion", frames=97, batch=32, share=0.2, longest_wait=40),
        Bucket(kind="occlusion", frames=129, batch=24, share=0.2, longest_wait=48),
    ),
    shift=5.0,
    steps=9_280,
    unroll=True,
    optimizer=OptimizerConfig(method="muon", learning_rate=8e-3, warmup_steps=100),
)

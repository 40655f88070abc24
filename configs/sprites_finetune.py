"""The bundled model's student: every parameter of the distilled transformer learns, on clips of 65 to 257 frames.

    rehyat finetune sprites_finetune                   # reads out/sprites-distilled, the result of distillation
    rehyat finetune sprites_finetune --source mini-sprites --anew --out out/undistilled    # converted, not distilled
    rehyat finetune sprites_finetune --teacher mini-sprites --teacher-weight 0.5     # its velocity as a second aim
    rehyat generate "a lemon moving down slowly on a blue background" --model out/sprites-student

All ten blocks are hybrids of chunks of three frames and an overlap of one. Clips twice as long as the teacher's
longest, so that the past's share of the normaliser is learned where it is large: by its length's power, a number a
head that starts at 0 (no change). --hybrid.decay lets the state fade as well, and so forget.

Cost: not measured yet. 70,000 tokens a step; at 4 steps a second, one H200 takes 160 s and compiles five programs.

Result: the folder out/sprites-student, in the diffusers layout with its rehyat part. No figures of this run yet. Tried
on two cores without distillation (float32, Muon 2e-3, --teacher-weight 0.5, 96 steps of 4,700 tokens, 22 minutes), the
loss stayed finite and fell from 0.92 to 0.50 (step 64) on clips of 65 frames and from 0.54 to 0.38 on clips of 33.
After 48 more steps on clips of 65 and 129 frames, same seed and data, the loss at 129 was 0.270 with length_norm and
0.320 without (decay on in both). The share of the past at a clip's last chunks, of 257 frames, was 0.63 before.
"""

from pathlib import Path

from rehyat_jax.hybrid_config import HybridConfig
from train.clips import Bucket
from train.finetune import FinetuneTraining
from train.optimizer import OptimizerConfig

config = FinetuneTraining(
    out=Path("out/sprites-student"),
    source=Path("out/sprites-distilled"),
    hybrid=HybridConfig(length_norm=True),
    buckets=(
        Bucket(kind="plain", frames=65, batch=64, share=0.35),
        Bucket(kind="plain", frames=129, batch=32, share=0.2),
        Bucket(kind="plain", frames=257, batch=16, share=0.15),
        Bucket(kind="occlusion", frames=129, batch=24, share=0.15, longest_wait=48),
        Bucket(kind="occlusion", frames=257, batch=8, share=0.15, longest_wait=48),
    ),
    steps=640,
    optimizer=OptimizerConfig(method="muon", learning_rate=2e-3, warmup_steps=50, ema_decay=0.99),
)

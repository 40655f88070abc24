"""The bundled model's student: every parameter of the distilled transformer learns, on clips of 65 to 257 frames.

    rehyat finetune sprites_finetune                   # reads out/sprites-distilled, the result of distillation
    rehyat finetune sprites_finetune --source mini-sprites --anew --out out/undistilled    # converted, not distilled
    rehyat finetune sprites_finetune --teacher mini-sprites --teacher-weight 0.5     # its velocity as a second aim
    rehyat convert out/sprites-student out/both --teacher mini-sprites               # as the package has it
    rehyat generate "a lemon moving down slowly on a blue background" --model out/sprites-student

All ten blocks are hybrids of chunks of three frames and an overlap of one. They are causal, so that a long clip is a
short one as well; clips twice as long as the teacher's longest, so that the past's share of the normaliser is learned
where it is large: by its length's power, a number a head that starts at 0 (no change). --hybrid.decay lets the state
fade as well, and so forget.

Cost: one H200, 138 s for 1,456 steps, 12 a second (66,560 to 76,800 tokens each); compiling took three minutes beside
other programs. The student that ships was finetuned so.

Result: the folder out/sprites-student, in the diffusers layout with its rehyat part. Its figures: docs/results.md.
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
        Bucket(kind="plain", frames=65, batch=64, share=0.35, pairs=0.8),
        Bucket(kind="plain", frames=257, batch=16, share=0.2, pairs=0.8),
        Bucket(kind="occlusion", frames=97, batch=32, share=0.2, longest_wait=40),
        Bucket(kind="occlusion", frames=129, batch=24, share=0.25, longest_wait=48),
    ),
    steps=1_456,
    unroll=True,
    shift=5.0,
    optimizer=OptimizerConfig(method="muon", learning_rate=3e-3, warmup_steps=30, schedule="linear", ema_decay=0.98),
)

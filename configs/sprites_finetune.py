"""The bundled model's student: every parameter of the distilled transformer learns, on clips of 65 to 257 frames.

    rehyat finetune sprites_finetune                   # reads out/sprites-distilled, the result of distillation
    rehyat finetune sprites_finetune --source mini-sprites --out out/undistilled     # converted, not distilled
    rehyat finetune sprites_finetune --teacher mini-sprites --teacher-weight 0.5     # its velocity as a second aim
    rehyat generate "a lemon moving down slowly on a blue background" --model out/sprites-student

All ten blocks are hybrids of chunks of three frames and an overlap of one. Twice as long as the teacher's longest
clips, so that the past's share in the normaliser is learned where it is large: the state decays by a learned factor a
head, and its weight falls by a learned power of its length; both start as if they were not there.

Cost: PENDING
"""

from pathlib import Path

from rehyat_jax.hybrid_config import HybridConfig
from train.clips import Bucket
from train.finetune import FinetuneTraining
from train.optimizer import OptimizerConfig

config = FinetuneTraining(
    out=Path("out/sprites-student"),
    source=Path("out/sprites-distilled"),
    hybrid=HybridConfig(decay=True, length_norm=True),
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

"""The bundled model's student: all of it learns, on clips of 65 to 257 frames, to go on from finished chunks.

    rehyat finetune sprites_finetune                   # reads out/sprites-distilled, the result of distillation
    rehyat finetune sprites_finetune --source mini-sprites --anew --out out/undistilled    # converted, not distilled
    rehyat finetune sprites_finetune --history.share 0 --remember steps --out out/by-steps    # a state for each step
    rehyat finetune sprites_finetune --history.share 0 --teacher mini-sprites --teacher-weight 0.5    # a second aim
    rehyat convert out/sprites-student out/both --teacher mini-sprites               # as the package has it
    rehyat generate "a lemon moving down slowly on a blue background" --model out/sprites-student

All ten blocks are hybrids of chunks of three frames and an overlap of one. They are causal, so that a long clip is a
short one as well; clips twice as long as the teacher's longest, so that the past's share of the normaliser is learned
where it is large: by its length's power, a number a head that starts at 0 (no change). --hybrid.decay lets the state
fade as well, and so forget. In three clips of four each chunk has a noise level of its own, so that a stream remembers
what it made and needs one state for all steps; in the others all have one, so that the per-step sweep works as well.

Cost: one H200, 5.6 minutes of steps for 4,048 at 12 a second (66,560 to 76,800 tokens each), and three to four minutes
of compiling beside other programs. The student that ships was finetuned so in two runs, 1,200 steps and, from their
result, 2,848.

Result: the folder out/sprites-student, in the diffusers layout with its rehyat part. Its figures:
docs/notebook/results.md.
"""

from pathlib import Path

from rehyat_jax.mixers.config import HybridConfig
from train.data.clips import Bucket
from train.engine.optimizer import OptimizerConfig
from train.stages.finetune import FinetuneTraining
from train.stages.history import History

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
    history=History(share=0.75, clean=0.5, noise=0.1),
    remember=0.0,
    steps=4_048,
    unroll=True,
    shift=5.0,
    optimizer=OptimizerConfig(method="muon", learning_rate=3e-3, warmup_steps=30, schedule="linear", ema_decay=0.98),
)

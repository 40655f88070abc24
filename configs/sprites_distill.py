"""The bundled model's feature maps: all ten blocks as hybrids, distilled from the teacher's own trajectories.

    rehyat distill sprites_distill                     # reads the bundled model; then sprites_finetune
    rehyat distill sprites_distill --hybrid.chunk-frames 1 --out out/chunk-1
    rehyat distill sprites_distill --loss score --out out/by-score
    rehyat distill sprites_distill --best 5 --out out/half

Cost: PENDING

Result: PENDING
"""

from pathlib import Path

from rehyat_jax.hybrid_config import HybridConfig
from train.distill import DistillTraining
from train.optimizer import OptimizerConfig
from train.sources import Source

config = DistillTraining(
    out=Path("out/sprites-distilled"),
    hybrid=HybridConfig(),
    sources=(
        Source(frames=65, batch=40, share=0.5),
        Source(frames=129, batch=20, share=0.25),
        Source(prompts="occlusion", frames=129, width=96, batch=20, share=0.25),
    ),
    steps=2000,
    minibatches=4,
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50, weight_decay=0.0),
)

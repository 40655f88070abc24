"""The bundled model's feature maps: all ten blocks as hybrids, distilled from the teacher's own trajectories.

    rehyat distill sprites_distill --dtype float32     # two CPU cores; then sprites_finetune
    rehyat distill sprites_distill --sources.0.batch 40 --sources.1.batch 20 --steps 2000       # an accelerator
    rehyat distill sprites_distill --hybrid.chunk-frames 1 --out out/chunk-1
    rehyat distill sprites_distill --loss score --out out/by-score
    rehyat distill sprites_distill --best 5 --out out/half

Cost: the first of these, 23 minutes on two CPU cores that did other things as well (0.6 to 1.0 steps a second).

Result: the folder out/sprites-distilled. On captions held out, over whole trajectories, what the blocks make is off by
0.17 of their teacher's attention (the window alone: 0.31 of it on the first clips), from 0.08 in the last block to 0.26
in the fourth; the past has a quarter of the normaliser.
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
        Source(frames=65, batch=32, share=0.5),
        Source(prompts="occlusion", frames=129, width=96, batch=16, share=0.5),
    ),
    steps=1000,
    minibatches=4,
    held_out=4,
    measure_rounds=0,
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50, weight_decay=0.0),
)

"""The bundled model's feature maps: all ten blocks as hybrids, distilled from the teacher's own trajectories.

    rehyat distill sprites_distill                     # then sprites_finetune
    rehyat distill sprites_distill --sources.0.batch 4 --sources.1.batch 2 --dtype float32          # two CPU cores
    rehyat distill sprites_distill --hybrid.chunk-frames 1 --out out/chunk-1
    rehyat distill sprites_distill --loss score --out out/by-score
    rehyat distill sprites_distill --best 5 --out out/half

Cost: one H200, some 20 s for 800 steps, 30 to 50 a second; 90 s in all beside other programs.

Result: the folder out/sprites-distilled. The loss (of the blocks' attention, relative) goes to 0.16; an earlier run on
two CPU cores took 23 minutes for 1,000 smaller steps.
"""

from pathlib import Path

from rehyat_jax.mixers.config import HybridConfig
from train.data.sources import Source
from train.engine.optimizer import OptimizerConfig
from train.stages.distill import DistillTraining

config = DistillTraining(
    out=Path("out/sprites-distilled"),
    hybrid=HybridConfig(),
    sources=(
        Source(frames=65, batch=32, share=0.5),
        Source(prompts="occlusion", frames=129, width=96, batch=16, share=0.5),
    ),
    steps=800,
    minibatches=4,
    held_out=4,
    measure_rounds=0,
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50, weight_decay=0.0),
)

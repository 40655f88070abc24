"""The bundled student's memory: it learns through its state, by teacher forcing on true clips.

    rehyat finetune sprites_forced                     # reads the bundled mini-sprites-20-steps
    rehyat finetune sprites_forced --stop 1 --out out/detached    # gradients stop at the state: φ_k learns nothing
    rehyat generate "a lemon moving down slowly on a blue background" --model out/sprites-forced

Every chunk of a clip is made from noise, given the clip's own chunks before it, as a stream makes it from finished
ones; seven of ten batches are occlusions, in which only the state tells who is behind the pillar.

Cost: one H200, 302 s, of them 95 s of steps; 209 s were loading and compiling, another program beside it.

Result: the folder out/sprites-forced, in the diffusers layout with its rehyat part; 20 steps, guidance 4. From an
experiment of 229 steps without the longest clips (docs/notebook/fewstep.md): of true clips that a stream goes on with,
the same object comes out after 48 hidden frames in 0.89 (before, 0.71), after 96 in 0.83 (0.64).
"""

from pathlib import Path

from rehyat_jax.mixers.config import HybridConfig
from train.data.clips import Bucket
from train.engine.optimizer import OptimizerConfig
from train.stages.forced import ForcedTraining

config = ForcedTraining(
    out=Path("out/sprites-forced"),
    source=Path("mini-sprites-20-steps"),
    hybrid=HybridConfig(length_norm=True),
    aim="flow",
    buckets=(
        Bucket(kind="plain", frames=69, batch=64, share=0.3, pairs=0.8),
        Bucket(kind="occlusion", frames=129, batch=24, share=0.35, longest_wait=48),
        Bucket(kind="occlusion", frames=337, batch=8, share=0.35, longest_wait=256, hidden="given"),
    ),
    steps=288,
    remat=True,
    steps_per_round=4,
    reuse=1,
    shift=5.0,
    optimizer=OptimizerConfig(
        method="muon", learning_rate=2e-3, warmup_steps=20, schedule="linear", ema_decay=0.98, weight_decay=0.0
    ),
)

"""The bundled student in four steps without guidance, two or one: consistency distillation through the state.

    rehyat finetune sprites_forced                     # first: this run reads out/sprites-forced
    rehyat finetune sprites_consistency
    rehyat generate "a lemon moving down slowly on a blue background" --model out/sprites-four-steps
    rehyat eval sprites --model out/sprites-four-steps

The guide is the source itself, at guidance 4: one of its Euler steps, of 48, at each chunk of a true clip, whose guess
by the moving average one level below is what the student's is drawn to. The result carries its defaults: four steps,
no guidance, fresh noise between steps, finished chunks committed.

Cost: one H200, 497 ms a step of 64 clips of 69 frames and 520 ms of 24 occlusions (the guide without guidance there):
320 steps are under three minutes, after two to three minutes of compiling.

Result: the folder out/sprites-four-steps, in the diffusers layout with its rehyat part. From an experiment of 330 steps
with these settings, no guidance for occlusions (docs/notebook/fewstep.md), 256 prompts never seen, four steps: recall
0.981, directions 0.946, speed 1.003.
"""

from pathlib import Path

from rehyat_jax.mixers.config import HybridConfig
from train.data.clips import Bucket
from train.engine.optimizer import OptimizerConfig
from train.stages.forced import ForcedTraining

config = ForcedTraining(
    out=Path("out/sprites-four-steps"),
    source=Path("out/sprites-forced"),
    hybrid=HybridConfig(length_norm=True),
    aim="consistency",
    buckets=(
        Bucket(kind="plain", frames=69, batch=64, share=0.35, pairs=0.8),
        Bucket(kind="plain", frames=21, batch=192, share=0.2, pairs=0.8),
        Bucket(kind="occlusion", frames=129, batch=24, share=0.2, longest_wait=48),
        Bucket(kind="occlusion", frames=337, batch=12, share=0.25, longest_wait=256, hidden="given"),
    ),
    steps=368,
    remat=True,
    shift=5.0,
    guidance_scale=4.0,
    optimizer=OptimizerConfig(
        method="muon", learning_rate=1e-3, warmup_steps=20, schedule="linear", ema_decay=0.98, weight_decay=0.0
    ),
)

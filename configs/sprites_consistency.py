"""The bundled student in four steps without guidance, two or one: consistency distillation through the state.

    rehyat finetune sprites_forced                     # first: this run reads out/sprites-forced
    rehyat finetune sprites_consistency
    rehyat generate "a lemon moving down slowly on a blue background" --model out/sprites-four-steps
    rehyat eval sprites --model out/sprites-four-steps

The guide is the source itself, at guidance 4: one of its Euler steps, of 48, at each chunk of a true clip, whose guess
by the moving average one level below is what the student's is drawn to. The result carries its defaults: four steps,
no guidance, fresh noise between steps, finished chunks committed.

Cost: one H200, 230 s, of them 169 s of steps, its programs compiled before.

Result: the folder out/sprites-four-steps, in the diffusers layout with its rehyat part: the student that ships in
mini-sprites, after `rehyat convert out/sprites-four-steps out/both --teacher mini-sprites`. 256 prompts never seen:
four steps recall 0.980, directions 0.955, speed 1.000; the same object comes out after 48, 96 and 256 hidden frames in
0.95, 0.86 and 0.89 (docs/notebook/fewstep.md).
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
        Bucket(kind="occlusion", frames=337, batch=8, share=0.25, longest_wait=256, hidden="given"),
    ),
    steps=368,
    remat=True,
    steps_per_round=4,
    reuse=1,
    shift=5.0,
    guidance_scale=4.0,
    optimizer=OptimizerConfig(
        method="muon", learning_rate=1e-3, warmup_steps=20, schedule="linear", ema_decay=0.98, weight_decay=0.0
    ),
)

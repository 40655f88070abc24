"""The bundled student in four steps, trained on its own videos: distribution matching through its state.

    rehyat finetune sprites_consistency                # first: this run reads out/sprites-four-steps
    rehyat forcing sprites_forcing
    rehyat forcing sprites_forcing --stop 1 --out out/detached    # gradients stop at the state
    rehyat generate "a lemon moving down slowly on a blue background" --model out/sprites-matched
    rehyat eval sprites --model out/sprites-matched

A cycle makes 64 videos of 69 frames, or 24 of 129 frames that begin with 45 frames of a true clip, in which the object
has just gone behind the pillar. The critic, which began as the teacher, learns five steps on them, the student one.

Cost: one H200, 5.9 of the critic's steps a second beside another program, 0.85 s a cycle: 900 steps are 153 s after
compiling.

Result: the folder out/sprites-matched, in the diffusers layout with its rehyat part. After 900 steps, 256 prompts never
seen: four steps 0.994 / 0.971 (recall, directions), two 0.981 / 0.957, one with four in the first chunk 0.992 / 0.968;
but it remembers less, 0.64, 0.56 and 0.50 after 48, 96 and 256 hidden frames, and begins nearly everywhere at the same
height. So it does not ship (docs/notebook/fewstep.md).
"""

from pathlib import Path

from rehyat_jax.mixers.config import HybridConfig
from train.data.clips import Bucket
from train.data.rollouts import Rollouts
from train.stages.forcing import ForcingTraining

config = ForcingTraining(
    out=Path("out/sprites-matched"),
    source=Path("out/sprites-four-steps"),
    teacher=Path("mini-sprites"),
    hybrid=HybridConfig(length_norm=True),
    buckets=(
        Rollouts(clips=Bucket(kind="plain", frames=69, batch=64, share=0.75, pairs=0.8)),
        Rollouts(clips=Bucket(kind="occlusion", frames=129, batch=24, share=0.25, longest_wait=48), given=4),
    ),
    steps=900,
    steps_per_round=5,
    every=5,
    num_inference_steps=4,
    first_chunk_steps=4,
    guidance_scale=4.0,
    shift=5.0,
)

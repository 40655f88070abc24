"""Wan2.1 14B in four steps, trained on its own videos: distribution matching through its state.

    rehyat forcing wan_14b_forcing                     # the same command on every host
    rehyat plan wan_14b_forcing --topology v5p:4x4x4            # what a cycle takes, without a chip

It reads out/wan-14b-four-steps, which wan_1_3b_consistency makes of a student of 14B: --source and --out,
--model.num-layers 40 --model.num-attention-heads 40 --model.ffn-dim 13824. A smaller teacher is smaller numbers of
--teacher-model, and its folder as --teacher.

Captions are those of prepared clips, whose pictures are not looked at. A cycle is one rollout of 21 latent frames a row
(seven chunks of four steps and a commit each), five steps of the critic on it, one of the student.

Cost: not run on chips yet; docs/how-to/scale.md has what a plan says.

Result: the folder out/wan-14b-matched, in the diffusers layout with its rehyat part. No figures yet.
"""

from pathlib import Path

from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.runtime.mesh_config import MeshConfig
from train.data.prepared import PreparedClips
from train.data.rollouts import Rollouts
from train.engine.optimizer import OptimizerConfig
from train.stages.forcing import ForcingTraining

config = ForcingTraining(
    out=Path("out/wan-14b-matched"),
    source=Path("out/wan-14b-four-steps"),
    teacher=Path("Wan2.1-T2V-14B-Diffusers"),
    model=WanConfig.t2v_14b(),
    teacher_model=WanConfig.t2v_14b(),
    hybrid=HybridConfig(),
    buckets=(Rollouts(clips=PreparedClips(folder=Path("wan-14b-clips"), frames=81, batch=64)),),
    steps=600,
    steps_per_round=5,
    every=5,
    guidance_scale=4.0,
    optimizer=OptimizerConfig(
        learning_rate=2e-6, schedule="constant", warmup_steps=10, beta1=0.0, beta2=0.999, ema_decay=0.99
    ),
    critic_optimizer=OptimizerConfig(
        learning_rate=4e-7, schedule="constant", warmup_steps=0, beta1=0.0, beta2=0.999, ema_decay=0.0
    ),
    checkpoint_seconds=600.0,
    mesh=MeshConfig(fsdp=None),
)

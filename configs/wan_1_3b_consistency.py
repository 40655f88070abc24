"""Wan2.1 1.3B in four steps without guidance: consistency distillation on prepared clips, through the state.

    rehyat prepare VIDEOS wan-1.3b-clips --model Wan2.1-T2V-1.3B-Diffusers --frames 81 --size 832x480   # once
    rehyat finetune wan_1_3b_finetune --history.share 0.75 --remember 0      # first: a student of finished chunks
    rehyat finetune wan_1_3b_consistency                                # the same command on every host
    rehyat plan wan_1_3b_consistency --topology v5p:4x4x4              # what it takes, without a chip

The guide is the source itself, at guidance 5: one of its Euler steps, of 48, at each chunk. Then, on its own videos:
wan_1_3b_forcing. A student of 14B is --source and --out, --model.num-layers 40 --model.num-attention-heads 40
--model.ffn-dim 13824.

Cost: not run on chips yet. A step on a clip is three passes of the guide and the average and one with its gradient,
each of twice the clip's tokens.

Result: the folder out/wan-1.3b-four-steps, in the diffusers layout with its rehyat part. No figures yet.
"""

from pathlib import Path

from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.runtime.mesh_config import MeshConfig
from train.data.prepared import PreparedClips
from train.engine.optimizer import OptimizerConfig
from train.stages.forced import ForcedTraining

config = ForcedTraining(
    out=Path("out/wan-1.3b-four-steps"),
    source=Path("out/wan-1.3b-student"),
    model=WanConfig.t2v_1_3b(),
    hybrid=HybridConfig(),
    aim="consistency",
    buckets=(PreparedClips(folder=Path("wan-1.3b-clips"), frames=81, batch=64),),
    steps=1000,
    steps_per_round=1,
    reuse=1,
    shift=5.0,
    guidance_scale=5.0,
    optimizer=OptimizerConfig(
        method="adamw", learning_rate=1e-5, warmup_steps=50, beta2=0.999, weight_decay=0.01, ema_decay=0.99
    ),
    remat=True,
    checkpoint_seconds=600.0,
    mesh=MeshConfig(fsdp=None),
)

"""Wan2.2 TI2V-5B, distilled before, finetuned whole on prepared clips of 121 frames at 1280x704: ReHyAt's second stage.

    rehyat prepare VIDEOS wan-5b-clips --model Wan2.2-TI2V-5B-Diffusers --frames 121 --size 1280x704 --fps 24   # once
    rehyat finetune wan_5b_finetune                                   # the same command on every host
    rehyat finetune wan_5b_finetune --source MODEL --accumulate 8     # 8 chips; of 16 GB, 16
    rehyat finetune wan_5b_finetune --history.share 0.75 --remember 0    # streams with one state for all steps
    rehyat plan wan_5b_finetune --topology v5e:16x16           # what it takes, without a chip

The mesh follows from the chips that there are.

Cost: rehyat plan says it; not run on chips yet.

Result: the folder out/wan-5b-student, in the diffusers layout with its rehyat part. No figures yet.
"""

from pathlib import Path

from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.runtime.mesh_config import MeshConfig
from train.data.prepared import PreparedClips
from train.engine.optimizer import OptimizerConfig
from train.stages.finetune import FinetuneTraining

config = FinetuneTraining(
    out=Path("out/wan-5b-student"),
    source=Path("out/wan-5b-distilled"),
    model=WanConfig.ti2v_5b(),
    hybrid=HybridConfig(),
    buckets=(PreparedClips(folder=Path("wan-5b-clips"), frames=121, batch=64),),
    steps=1000,
    steps_per_round=1,
    reuse=1,
    shift=5.0,
    optimizer=OptimizerConfig(
        method="adamw", learning_rate=1e-5, warmup_steps=50, beta2=0.999, weight_decay=0.01, ema_decay=0.99
    ),
    remat=True,
    checkpoint_seconds=600.0,
    mesh=MeshConfig(automatic=True),
)

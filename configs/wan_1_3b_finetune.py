"""Wan2.1 1.3B, distilled before, finetuned whole on prepared clips of 81 frames at 832x480: ReHyAt's second stage.

    rehyat prepare VIDEOS wan-1.3b-clips --model Wan2.1-T2V-1.3B-Diffusers --frames 81 --size 832x480   # once
    rehyat finetune wan_1_3b_finetune                                   # the same command on every host
    rehyat finetune wan_1_3b_finetune --source MODEL --accumulate 8     # 8 chips; of 16 GB, 16
    rehyat finetune wan_1_3b_finetune --history.share 0.75 --remember 0    # streams with one state for all steps
    rehyat plan wan_1_3b_finetune --topology v5e:16x16           # what it takes, without a chip

The mesh follows from the chips that there are: 64 clips a step are one a chip on 64; on 256 a clip's time is cut in
four; 512 take --buckets.0.batch 128, and time in four. docs/how-to/scale.md has the plans.

Cost: see docs/how-to/scale.md; not run on chips yet.

Result: the folder out/wan-1.3b-student, in the diffusers layout with its rehyat part. No figures yet.
"""

from pathlib import Path

from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.runtime.mesh_config import MeshConfig
from train.data.prepared import PreparedClips
from train.engine.optimizer import OptimizerConfig
from train.stages.finetune import FinetuneTraining

config = FinetuneTraining(
    out=Path("out/wan-1.3b-student"),
    source=Path("out/wan-1.3b-distilled"),
    model=WanConfig.t2v_1_3b(),
    hybrid=HybridConfig(),
    buckets=(PreparedClips(folder=Path("wan-1.3b-clips"), frames=81, batch=64),),
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

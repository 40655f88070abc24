"""Wan2.1 I2V-14B, converted and finetuned whole on prepared clips of 81 frames at 832x480, beside its softmax teacher.

    rehyat prepare VIDEOS wan-i2v-clips --model Wan2.1-I2V-14B-480P-Diffusers --frames 81 --size 832x480   # once
    rehyat finetune wan_i2v_14b_finetune                                # the same command on every host
    rehyat plan wan_i2v_14b_finetune --topology v5p:4x4x8       # what it takes, without a chip

Each clip is shown its own first frame. wan_i2v_14b_distill may be before it: --source out/wan-i2v-14b-distilled.

Cost: rehyat plan says it; not run on chips yet.

Result: the folder out/wan-i2v-14b-student, in the diffusers layout with its rehyat part. No figures yet.
"""

from pathlib import Path

from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.runtime.mesh_config import MeshConfig
from train.data.prepared import PreparedClips
from train.engine.optimizer import OptimizerConfig
from train.stages.finetune import FinetuneTraining

config = FinetuneTraining(
    out=Path("out/wan-i2v-14b-student"),
    source=Path("Wan2.1-I2V-14B-480P-Diffusers"),
    teacher=Path("Wan2.1-I2V-14B-480P-Diffusers"),
    teacher_weight=1.0,
    model=WanConfig.i2v_14b(),
    hybrid=HybridConfig(),
    buckets=(PreparedClips(folder=Path("wan-i2v-clips"), frames=81, batch=64),),
    steps=2000,
    steps_per_round=1,
    reuse=1,
    shift=3.0,
    optimizer=OptimizerConfig(
        method="adamw", learning_rate=1e-5, warmup_steps=50, beta2=0.999, weight_decay=0.01, ema_decay=0.99
    ),
    hybrid_rate=10.0,
    remat=True,
    checkpoint_seconds=600.0,
    mesh=MeshConfig(automatic=True),
)

"""An expert of Wan2.2 T2V-A14B, converted and finetuned on prepared clips of 81 frames at 832x480; then the other one.

    rehyat prepare VIDEOS wan-a14b-clips --model Wan2.2-T2V-A14B-Diffusers --frames 81 --size 832x480   # once
    rehyat finetune wan_a14b_finetune --expert high --out out/wan-a14b-high
    rehyat finetune wan_a14b_finetune --expert low --source out/wan-a14b-high
    rehyat plan wan_a14b_finetune --topology v5p:4x4x8          # what it takes, without a chip

Each learns at the noise levels that it is for, its own softmax beside it. The same command on every host.

Cost: rehyat plan says it; not run on chips yet.

Result: the folder out/wan-a14b-student, in the diffusers layout with a rehyat part in each expert. No figures yet.
"""

from pathlib import Path

from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.runtime.mesh_config import MeshConfig
from train.data.prepared import PreparedClips
from train.engine.optimizer import OptimizerConfig
from train.stages.finetune import FinetuneTraining

config = FinetuneTraining(
    out=Path("out/wan-a14b-student"),
    source=Path("Wan2.2-T2V-A14B-Diffusers"),
    teacher=Path("Wan2.2-T2V-A14B-Diffusers"),
    teacher_weight=1.0,
    model=WanConfig.t2v_14b(),
    hybrid=HybridConfig(),
    expert="high",
    buckets=(PreparedClips(folder=Path("wan-a14b-clips"), frames=81, batch=64),),
    steps=2000,
    steps_per_round=1,
    reuse=1,
    shift=12.0,
    optimizer=OptimizerConfig(
        method="adamw", learning_rate=1e-5, warmup_steps=50, beta2=0.999, weight_decay=0.01, ema_decay=0.99
    ),
    hybrid_rate=10.0,
    remat=True,
    checkpoint_seconds=600.0,
    mesh=MeshConfig(automatic=True),
)

"""The feature maps of all blocks of Wan2.1 I2V-14B, distilled on prepared clips of 81 frames at 832x480.

    rehyat prepare VIDEOS wan-i2v-clips --model Wan2.1-I2V-14B-480P-Diffusers --frames 81 --size 832x480   # once
    rehyat distill wan_i2v_14b_distill                          # the same command on every host
    rehyat plan wan_i2v_14b_distill --topology v5p:4x4x4        # what it takes, without a chip

Each clip, with noise, is a point of the teacher, which is shown the clip's own first frame. What measures are the
teacher's whole trajectories from the first frames of clips that are held out.

Cost: rehyat plan says it; not run on chips yet.

Result: the folder out/wan-i2v-14b-distilled, the teacher's with a rehyat part. No figures yet.
"""

from pathlib import Path

from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.runtime.mesh_config import MeshConfig
from train.data.sources import Source
from train.engine.optimizer import OptimizerConfig
from train.stages.distill import DistillTraining

config = DistillTraining(
    out=Path("out/wan-i2v-14b-distilled"),
    teacher=Path("Wan2.1-I2V-14B-480P-Diffusers"),
    model=WanConfig.i2v_14b(),
    hybrid=HybridConfig(),
    sources=(Source(prepared=Path("wan-i2v-clips"), frames=81, height=480, width=832, batch=64),),
    num_inference_steps=40,
    guidance_scale=5.0,
    updates_per_point=4,
    steps=2000,
    shifts=(3.0,),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50, weight_decay=0.0),
    held_out=64,
    measure_rounds=0,
    checkpoint_seconds=600.0,
    mesh=MeshConfig(automatic=True),
)

"""The feature maps of an expert of Wan2.2 T2V-A14B, distilled on prepared clips at 832x480; then the other one's.

    rehyat prepare VIDEOS wan-a14b-clips --model Wan2.2-T2V-A14B-Diffusers --frames 81 --size 832x480   # once
    rehyat distill wan_a14b_distill --expert high --out out/wan-a14b-high
    rehyat distill wan_a14b_distill --expert low --teacher out/wan-a14b-high
    rehyat plan wan_a14b_distill --topology v5p:4x4x4           # what it takes, without a chip

Each learns at the noise levels that it is for. The high one can be had from prompts alone, on its own trajectories
(--sources.0.prepared None --sources.0.prompts prompts.txt); the low one's begin with clips. The same command on every
host.

Cost: rehyat plan says it; not run on chips yet.

Result: the folder out/wan-a14b-distilled, the teacher's with a rehyat part in each expert. No figures yet.
"""

from pathlib import Path

from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.runtime.mesh_config import MeshConfig
from train.data.sources import Source
from train.engine.optimizer import OptimizerConfig
from train.stages.distill import DistillTraining

config = DistillTraining(
    out=Path("out/wan-a14b-distilled"),
    teacher=Path("Wan2.2-T2V-A14B-Diffusers"),
    model=WanConfig.t2v_14b(),
    hybrid=HybridConfig(),
    expert="high",
    sources=(Source(prepared=Path("wan-a14b-clips"), frames=81, height=480, width=832, batch=64),),
    num_inference_steps=40,
    guidance_scale=4.0,
    updates_per_point=4,
    steps=2000,
    shifts=(12.0,),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50, weight_decay=0.0),
    held_out=64,
    measure_rounds=0,
    checkpoint_seconds=600.0,
    mesh=MeshConfig(automatic=True),
)

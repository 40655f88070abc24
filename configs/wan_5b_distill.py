"""The feature maps of all blocks of Wan2.2's TI2V-5B, distilled from its own trajectories at 1280x704: the first stage.

    rehyat distill wan_5b_distill                               # the same command on every host
    rehyat distill wan_5b_distill --sources.0.batch 8 --held-out 8                # 8 chips
    rehyat plan wan_5b_distill --topology v5e:16x16      # what it takes, without a chip

It reads prompts from prompts.txt, a prompt a line, and no videos. A chip has one trajectory, with guidance two points
of the teacher, and each serves four updates. The mesh follows from the chips that there are, as for finetuning.

Cost: rehyat plan says it; not run on chips yet.

Result: the folder out/wan-5b-distilled, the teacher's with a rehyat part. No figures yet.
"""

from pathlib import Path

from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.runtime.mesh_config import MeshConfig
from train.data.sources import Source
from train.engine.optimizer import OptimizerConfig
from train.stages.distill import DistillTraining

config = DistillTraining(
    out=Path("out/wan-5b-distilled"),
    teacher=Path("Wan2.2-TI2V-5B-Diffusers"),
    model=WanConfig.ti2v_5b(),
    hybrid=HybridConfig(),
    sources=(Source(prompts="prompts.txt", frames=121, height=704, width=1280, batch=64),),
    num_inference_steps=50,
    guidance_scale=5.0,
    updates_per_point=4,
    steps=2000,
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50, weight_decay=0.0),
    held_out=64,
    measure_rounds=0,
    checkpoint_seconds=600.0,
    mesh=MeshConfig(automatic=True),
)

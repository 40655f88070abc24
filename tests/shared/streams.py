"""A student whose window is shorter than its past, and a stream of it that takes moments."""

from rehyat_jax import HybridConfig

HYBRID = HybridConfig(chunk_frames=2, overlap_frames=1)
SMALL = {"height": 32, "width": 48, "num_inference_steps": 3, "guidance_scale": 3.0, "negative_prompt": "dull"}
FILE = "stream.safetensors"

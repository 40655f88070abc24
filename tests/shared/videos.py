"""The same small video by diffusers' pipelines and by ours, as latents, from the same noise."""

import numpy as np
import pytest
import torch

#: Sides that every model's token divides.
SIZE = {"num_frames": 9, "height": 64, "width": 96, "num_inference_steps": 3}
PROMPT = "a lemon moving down"


def noise_of(frames=3, height=4, width=6, channels=48):
    return np.random.default_rng(0).standard_normal((1, frames, height, width, channels), dtype=np.float32)


def image_of(height=64, width=96, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def latents_by_diffusers(pipeline, noise, **more):
    latents = torch.from_numpy(noise).permute(0, 4, 1, 2, 3).contiguous()
    settings = {"guidance_scale": 4.0} | SIZE | more
    out = pipeline(prompt=PROMPT, latents=latents, output_type="latent", **settings).frames
    return out.permute(0, 2, 3, 4, 1).numpy()


def latents_by_us(pipe, noise, **more):
    seen = []

    def keep(self, latents, *args, **kwargs):
        seen.append(np.asarray(latents))
        return iter([(np.zeros((1, 1, 2, 2, 3), np.uint8), None)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rehyat_jax.sampling.codec.Codec.decode", keep)
        pipe(PROMPT, noise=noise, **{"guidance_scale": 4.0} | SIZE | more)
    return seen[0]

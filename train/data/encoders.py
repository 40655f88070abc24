"""The networks that `train.data.encoding` is done with: a caption to its embedding, a video to its clips' latents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PyTree, UInt8

from rehyat_jax.errors import RehyatError
from rehyat_jax.models.checkpoints import load_vae
from rehyat_jax.models.wan.config import VAEConfig
from rehyat_jax.runtime.files import reason
from rehyat_jax.runtime.platform import precision
from rehyat_jax.text.prompt_encoder import TEXT_LENGTH, PromptEncoder
from train.data.footage import Footage, size_and_time
from train.data.frames import clips
from train.data.prepared import EncodePlan

#: Pixels of a step of the VAE: about a second of 480p would fill a small device, a latent frame of it does not.
_STEP_PIXELS = 1 << 21


def latent_frames_per_step(vae: VAEConfig, *, height: int, width: int) -> int:
    return max(_STEP_PIXELS // (height * width * vae.temporal_factor), 1)


class TextEncoder:
    """The text encoder, read when it is first needed."""

    def __init__(self, model: Path, plan: EncodePlan) -> None:
        self._dtype = jnp.dtype(plan.dtype)
        self._prompts = PromptEncoder(model, dtype=self._dtype, warn=False, repair=plan.repair_prompts)

    def __call__(self, caption: str) -> tuple[Float[np.ndarray, "L D"], bool]:
        """The caption's embedding, its tokens alone, and whether all of the caption is in it."""
        tokens = int(self._prompts.tokenizer.encode(caption, TEXT_LENGTH + 1).mask.sum())
        with precision(self._dtype):
            text = self._prompts(caption)[0, : min(tokens, TEXT_LENGTH)]
            return np.asarray(text.astype(self._dtype)), tokens <= TEXT_LENGTH


class VideoEncoder:
    """The VAE's encoder, compiled for one clip."""

    def __init__(self, model: Path, plan: EncodePlan) -> None:
        self._plan, vae = plan, load_vae(model)
        graph, self._params = nnx.split(vae)
        step = latent_frames_per_step(vae.config, height=plan.height, width=plan.width)

        @jax.jit
        def encode(params: PyTree, clip: UInt8[Array, "F H W 3"]) -> Float[Array, "T h w z"]:
            vae = nnx.merge(graph, params)
            video = clip[None].astype(jnp.float32) / 127.5 - 1.0
            return vae.normalize(vae.encode(video, frames_per_step=step))[0].astype(jnp.dtype(plan.dtype))

        self._encode = encode

    def __call__(self, video: Footage) -> Iterator[Float[np.ndarray, "T h w z"]]:
        """Normalised latents of its clips.

        Raises:
            RehyatError: it is damaged, has changed since it was checked, or has latents that are not finite.
        """
        plan = self._plan
        shots = clips(video.path, frames=plan.frames, fps=plan.fps, height=plan.height, width=plan.width)
        for number, clip in enumerate(shots, 1):
            with precision(jnp.float32):
                latents = np.asarray(self._encode(self._params, clip))
            if not np.isfinite(latents).all():
                raise RehyatError(f"{video.path}: the latents of clip {number} are not finite")
            yield latents
        try:
            same = size_and_time(video.path) == (video.size, video.modified)
        except OSError as error:
            raise RehyatError(f"cannot read {video.path}: {reason(error)}") from error
        if not same:
            raise RehyatError(f"{video.path} was changed while it was encoded")

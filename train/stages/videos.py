"""Videos of a model in training: the same prompts and the same noise each time, so that they can be compared."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp

from rehyat_jax.models.checkpoints import load_vae
from rehyat_jax.models.folder import read_defaults, read_scheduler
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.pipeline import TextToVideo
from rehyat_jax.runtime.compilation import cache_folder
from rehyat_jax.text.prompt_encoder import PromptEncoder
from rehyat_jax.video.io import write_video
from train.stages.flow import Show


def showing(prompts: tuple[str, ...], *, folder: Path, dtype: jnp.dtype) -> Show:
    """Writes ``0.mp4`` … in a folder, a video a prompt, from the transformer.

    The prompts are embedded now; where there is a folder for embeddings, the text encoder is not kept in memory.

    Args:
        folder: a whole model's, whose other parts and defaults are used.

    Raises:
        CheckpointError, ConfigError: it has no such parts.
    """
    (schedule, solver), defaults, vae = read_scheduler(folder), read_defaults(folder), load_vae(folder)
    cache = cache_folder()
    text = PromptEncoder(folder, dtype=dtype, cache=cache and cache / "prompts")
    for prompt in (*prompts, ""):
        text(prompt)
    if cache:
        text = PromptEncoder(folder, dtype=dtype, cache=cache / "prompts")

    def show(transformer: WanTransformer, out: Path) -> None:
        pipeline = TextToVideo(
            transformer=transformer,
            vae=vae,
            text=text,
            schedule=schedule,
            solver=solver,
            defaults=defaults,
        )
        for number, prompt in enumerate(prompts):
            write_video(out / f"{number}.mp4", pipeline(prompt, seed=number))

    return show

"""Videos of a model in training: the same prompts and the same noise each time, so that they can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from rehyat_jax.models.checkpoints import load_vae
from rehyat_jax.models.folder import Defaults, read_defaults, read_scheduler
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.pipeline import TextToVideo
from rehyat_jax.runtime.compilation import cache_folder
from rehyat_jax.sampling.settings import SOLVERS
from rehyat_jax.text.prompt_encoder import PromptEncoder
from rehyat_jax.video.io import write_video
from train.stages.flow import Show


def showing(prompts: tuple[str, ...], *, folder: Path, dtype: jnp.dtype, defaults: Mapping[str, Any]) -> Show:
    """Writes ``0.mp4`` … in a folder, a video a prompt, from the transformer.

    The prompts are embedded now; where there is a folder for embeddings, the text encoder is not kept in memory.

    Args:
        folder: a whole model's, whose other parts are used.
        defaults: what the model in training is sampled with, as its folder will say; the rest is as for the teacher.

    Raises:
        CheckpointError, ConfigError: it has no such parts.
    """
    schedule, solver = read_scheduler(folder, student=False)
    settings = Defaults.from_dict(defaults, otherwise=read_defaults(folder, student=False))
    if settings.solver is not None:
        solver = SOLVERS[settings.solver]()
    vae = load_vae(folder)
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
            defaults=settings,
        )
        for number, prompt in enumerate(prompts):
            write_video(out / f"{number}.mp4", pipeline(prompt, seed=number))

    return show

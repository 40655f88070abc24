"""What a checkpoint holds, without its tensors."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from rehyat_jax.adapters.inspect import LoraInfo, describe_lora, holds_lora
from rehyat_jax.adapters.lora import open_lora
from rehyat_jax.models.checkpoints.converting import few_step_of
from rehyat_jax.models.folder import (
    SCHEDULER_FILE,
    defaults_files,
    find_checkpoint,
    read_defaults,
    read_scheduler,
    read_traits,
)
from rehyat_jax.models.networks import components_in
from rehyat_jax.models.wan.conversion_file import ConversionInfo, describe_conversion
from rehyat_jax.weights.inspect import CheckpointInfo, describe_weights
from rehyat_jax.weights.registry import component


def describe(path: str | os.PathLike[str]) -> CheckpointInfo | LoraInfo | ConversionInfo:
    """Dialect, sizes, parameters and number formats of what would be loaded; no tensor is read.

    Args:
        path: a whole checkpoint's folder, a network's folder or a weights file, in any dialect; or a LoRA, or
            a conversion in one file.

    Raises:
        CheckpointError: missing, damaged, incomplete, or not of a network that this program knows.
        ConfigError: a configuration is impossible or another architecture's.
    """
    path = find_checkpoint(path)
    if path.is_file() and (conversion := describe_conversion(path)) is not None:
        return conversion
    if holds_lora(path):
        return describe_lora(open_lora(path), component("transformer"))
    if path.is_dir():
        read_traits(path)  # says which expert is missing
    info = describe_weights(path)
    whole = path.is_dir() and {"transformer", "vae"} <= set(components_in(path))
    if whole:
        return dataclasses.replace(info, notes=_settings(path))
    family = few_step_of(path)
    return info if family is None else dataclasses.replace(info, notes=(f"few steps   {family}",))


def _settings(folder: Path) -> tuple[str, ...]:
    """How a whole checkpoint is run when nothing else is asked for, in lines."""
    defaults, (schedule, solver) = read_defaults(folder), read_scheduler(folder)
    second = "" if defaults.guidance_scale_2 is None else f" and {defaults.guidance_scale_2:g}"
    files = [*defaults_files(folder), folder / SCHEDULER_FILE]
    own = [file.relative_to(folder).as_posix() for file in files if file.is_file()]
    return (
        "run with",
        f"  size        {defaults.width}x{defaults.height}, {defaults.num_frames} frames, {defaults.fps} a second",
        f"  steps       {defaults.num_inference_steps} of {type(solver).__name__}, guidance "
        f"{defaults.guidance_scale:g}{second}, shift {schedule.shift:g} on the grid {schedule.grid!r}",
        f"  negative    {defaults.negative_prompt or 'none'}",
        f"  by          {', '.join([*own, 'the advice for'])} {defaults.advice}",
    )

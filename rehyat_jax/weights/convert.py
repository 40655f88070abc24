"""Any dialect in, the diffusers layout out: tensor by tensor from disk to disk, without a model in memory."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rehyat_jax.errors import CheckpointError
from rehyat_jax.sampling.schedule import FlowSchedule
from rehyat_jax.sampling.scheduler_config import scheduler_to_config
from rehyat_jax.sampling.solvers import UniPC
from rehyat_jax.weights.component import COMPONENTS, narrow
from rehyat_jax.weights.hybrid import HybridPlan, converting, find_hybrid, make_hybrid_plan, write_hybrid
from rehyat_jax.weights.inspect import components_of
from rehyat_jax.weights.layout import components_in
from rehyat_jax.weights.plan import Plan, Slot, make_plan
from rehyat_jax.weights.writing import MAX_SHARD_BYTES, Outgoing, whole_folder, write_json, write_tensors

#: Called with the bytes written so far and in all.
Progress = Callable[[int, int], None]

#: diffusers' ``WanPipeline`` with the parts that the original release stands for.
_MODEL_INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": "0.36.0",
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    dtype: Any = None,
    teacher: str | os.PathLike[str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint anew in the diffusers layout: a whole one, or one network's folder or file.

    A whole checkpoint takes its tokenizer along, and its scheduler and ``model_index.json``, or Wan2.1's own for the
    original release (UniPC, shift 3, as the published 480p models have it).

    A student's ``rehyat/`` part goes with its transformer.

    Args:
        dst: new or empty; it appears whole or not at all.
        dtype: None keeps each tensor's; otherwise float32, bfloat16 or float16, by the rule of `load_transformer`.
        teacher: a checkpoint whose transformer is kept beside a student's: ``dst`` is then the teacher for diffusers
            and for ``hybrid=None``, and the student, finetuned weights and all, is in its ``rehyat/`` part.

    Raises:
        CheckpointError: the source is missing, damaged, incomplete or foreign; the destination is not empty or cannot
            be written; with ``teacher``, the source is no student or of other sizes.
        ConfigError: a configuration is impossible or another architecture's.
    """
    src, dst = Path(src), Path(dst)
    whole = (src / "model_index.json").is_file() or len(components_in(src)) > 1
    plans = {name: make_plan(src, name) for name in components_of(src)}
    if whole and (missing := [name for name in COMPONENTS if name not in plans]):
        raise CheckpointError(f"{src} has no {' and no '.join(missing)}: name one network to convert it alone")
    student = _student(plans["transformer"], dtype) if "transformer" in plans else None
    if teacher is not None:
        if student is None:
            raise CheckpointError(f"{src} is no student: there is nothing to keep a teacher beside")
        around = make_plan(Path(teacher), "transformer")
        if around.config != plans["transformer"].config:
            raise CheckpointError(f"{teacher} is no teacher of {src}: they are of different sizes")
        student = dataclasses.replace(student, softmax=student.softmax or plans["transformer"])
        plans["transformer"] = around
    written = _Counter(progress)
    own = None if student is None else student.softmax
    tensors = {
        plan.weights: [_outgoing(plan, slot, dtype, written) for slot in plan.slots]
        for plan in (*plans.values(), own)
        if plan is not None
    }
    written.total = sum(tensor.nbytes for each in tensors.values() for tensor in each)

    def write(plan: Plan, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        write_json(folder / "config.json", plan.config.to_dict())
        write_tensors(folder, plan.component.stem, tensors[plan.weights], max_shard_bytes=max_shard_bytes)

    with whole_folder(dst) as partial:
        for name, plan in plans.items():
            folder = partial / name if whole else partial
            write(plan, folder)
            if student is not None and name == "transformer":
                place = write_hybrid(folder, student.config, converting(student, dtype))
                if own is not None:
                    write(own, place)
        if whole:
            _copy_the_rest(src, partial)


def _student(plan: Plan, dtype: Any) -> HybridPlan | None:
    """The ``rehyat/`` part that belongs to a transformer, where there is one."""
    folder = find_hybrid(plan.weights)
    return (
        None if folder is None else make_hybrid_plan(folder, plan.config, dtype=jnp.float32 if dtype is None else dtype)
    )


class _Counter:
    """Bytes done, told to whoever asked."""

    def __init__(self, progress: Progress | None) -> None:
        self.done = self.total = 0
        self._progress = progress

    def passing(self, source: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for block in source:
            yield block
            self.done += block.nbytes
            if self._progress is not None:
                self._progress(self.done, self.total)


def _outgoing(plan: Plan, slot: Slot, dtype: Any, written: _Counter) -> Outgoing:
    stored = plan.tensors.infos[slot.source].dtype
    target = stored if dtype is None else narrow(slot.row, jnp.dtype(dtype))
    name = slot.row.name("diffusers", slot.layer)
    numbers = functools.partial(_numbers, plan, slot, target, written)
    return Outgoing(name=name, dtype=target, shape=slot.shape, blocks=numbers)


def _numbers(plan: Plan, slot: Slot, dtype: np.dtype, written: _Counter) -> Iterator[np.ndarray]:
    return written.passing(plan.read(slot, dtype))


def _copy_the_rest(src: Path, dst: Path) -> None:
    """What is not weights: tokenizer, scheduler, index."""
    tokenizer = next((folder for folder in (src / "tokenizer", src / "google" / "umt5-xxl") if folder.is_dir()), None)
    if tokenizer is None:
        raise CheckpointError(f"{src} has no tokenizer (tokenizer/ or google/umt5-xxl/)")
    shutil.copytree(tokenizer, dst / "tokenizer")
    scheduler = src / "scheduler" / "scheduler_config.json"
    (dst / "scheduler").mkdir()
    if scheduler.is_file():
        shutil.copyfile(scheduler, dst / "scheduler" / scheduler.name)
    else:
        schedule = FlowSchedule(grid="diffusers", shift=3.0)
        write_json(dst / "scheduler" / scheduler.name, scheduler_to_config(schedule, UniPC()))
    if (src / "rehyat_defaults.json").is_file():
        shutil.copyfile(src / "rehyat_defaults.json", dst / "rehyat_defaults.json")
    if (src / "model_index.json").is_file():
        shutil.copyfile(src / "model_index.json", dst / "model_index.json")
    else:
        write_json(dst / "model_index.json", _MODEL_INDEX)

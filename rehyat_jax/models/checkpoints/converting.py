"""Checkpoints written anew: a whole one, one network, a student's own part."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from rehyat_jax.adapters.linear import stacked_layers
from rehyat_jax.adapters.lora import Into, loras_of, of_expert
from rehyat_jax.adapters.merging import with_lora, with_loras
from rehyat_jax.errors import CheckpointError
from rehyat_jax.models.checkpoints.loading import EXPERTS, Quantize
from rehyat_jax.models.clip.config import Preparation
from rehyat_jax.models.clip.features import PROCESSOR_FILE
from rehyat_jax.models.folder import (
    DEFAULTS_FILE,
    SCHEDULER_FILE,
    STUDENTS_DEFAULTS,
    defaults_files,
    find_checkpoint,
    read_defaults,
    read_scheduler,
    read_traits,
)
from rehyat_jax.models.networks import components_in, make_plan, open_component
from rehyat_jax.models.umt5.rows import carried_tokenizer
from rehyat_jax.models.wan.conversion_file import open_conversion, write_parts
from rehyat_jax.models.wan.fewstep import FewStep, few_step_family
from rehyat_jax.models.wan.student import STUDENT, plan_without_tensors
from rehyat_jax.runtime.arguments import user_path
from rehyat_jax.runtime.eight_bits import eight_bits_of
from rehyat_jax.sampling.schedule import FlowSchedule
from rehyat_jax.sampling.scheduler_config import scheduler_to_config
from rehyat_jax.weights.convert import Changes, Progress, attached_to, convert_weights
from rehyat_jax.weights.files import EIGHT_BITS, read_json
from rehyat_jax.weights.plan import LoadPlan, check_same
from rehyat_jax.weights.registry import Attached
from rehyat_jax.weights.save import of_plan
from rehyat_jax.weights.writing import MAX_SHARD_BYTES, write_json

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
    loras: Iterable[Any] = (),
    conversion: str | os.PathLike[str] | None = None,
    quantize: Quantize | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint anew in the diffusers layout: a whole one, or one network's folder or file.

    A whole checkpoint takes its tokenizer along, its scheduler, its settings and ``model_index.json``; a release gets
    those that say how it is run here without them, which is as its authors advise (`models.wan.advice`).

    A student's ``rehyat/`` part goes with its transformer. A file of a causal few-step model, as its authors publish it
    (`models.wan.fewstep`), gets one that says how it attends and how it is run; one that makes all frames
    at once, a file that says how it is run.

    Args:
        dst: new or empty; it appears whole or not at all.
        dtype: None keeps each tensor's; otherwise float32, bfloat16 or float16, by the rule of `load_transformer`.
        teacher: a checkpoint whose transformer is kept beside a student's: ``dst`` is then the teacher for diffusers
            and for ``hybrid=None``, and the student, finetuned weights and all, is in its ``rehyat/`` part.
        loras: merged into the transformer's weights (a student's own), as `load_transformer` takes them.
        conversion: a file of `save_conversion`'s, over ``src`` as its base: ``dst`` is then the student.
        quantize: "fp8" or "int8": of the matrices of the transformer's and the text encoder's blocks, each with
            ``weight_scale``, a number for each row; an `EightBits` also says which of the transformer's are left out.

    Raises:
        CheckpointError: the source is missing, damaged, incomplete or foreign; the destination is not empty or cannot
            be written; with ``teacher``, the source is no student or of other sizes.
        ConfigError: a configuration is impossible or another architecture's.
    """
    chosen = loras_of(loras)
    file = None if conversion is None else user_path("conversion", conversion)

    def changed(plan: LoadPlan, expert: Into | None) -> LoadPlan:
        if file is not None and (lora := open_conversion(file, plan, dtype=np.float32)[1]) is not None:
            plan = with_lora(plan, lora)
        return with_loras(plan, of_expert(chosen, expert))

    two = "transformer_2" in components_in(user_path("src", src))
    plans: dict[str, Callable[[LoadPlan], LoadPlan]] = {}
    if chosen or file is not None:
        for name, expert in EXPERTS.items() if two else [("transformer", None)]:
            plans[name] = functools.partial(changed, expert=expert)

    def part(plan: LoadPlan) -> Attached:
        assert file is not None
        return open_conversion(file, plan, dtype=np.float32 if dtype is None else dtype)[0]

    family = few_step_of(user_path("src", src))
    published = family is not None and file is None
    causal = published and family is not None and family.conversion is not None

    def windows(plan: LoadPlan) -> Attached:
        assert family is not None
        assert family.conversion is not None
        return Attached(plan=plan_without_tensors(plan, family.conversion))

    def say_how(folder: Path) -> None:
        assert family is not None
        part = folder / STUDENT.folder if causal else folder
        write_json(part / DEFAULTS_FILE, dict(family.defaults))

    parts = {} if file is None else {"transformer": part}
    eight_bits = eight_bits_of(quantize)

    def kept(name: str, path: str) -> np.dtype | None:
        if eight_bits is None or ("transformer" in name and eight_bits.leaves_out(path)):
            return None
        return EIGHT_BITS[eight_bits.file_kind]

    if eight_bits is not None and eight_bits.leave_out and "transformer" in components_in(user_path("src", src)):
        eight_bits.check(stacked_layers(make_plan(find_checkpoint(src), "transformer").abstract))
    convert_weights(
        user_path("src", src),
        user_path("dst", dst),
        write_rest=functools.partial(_copy_the_rest, teacher=None if teacher is None else Path(teacher)),
        write_beside=say_how if published else None,
        changes=Changes(
            dtype=dtype,
            around=None if teacher is None else user_path("teacher", teacher),
            plans=plans,
            parts={"transformer": windows} if causal else parts,
            kept=kept,
        ),
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )


def few_step_of(path: Path) -> FewStep | None:
    """The published few-step family that a transformer's file is of; None: of none, or it is no such file.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not path.is_file() or "transformer" not in components_in(path):
        return None
    return few_step_family(path, open_component(path, "transformer").tensors.infos)


def save_conversion(src: str | os.PathLike[str], file: str | os.PathLike[str], *, base: str | os.PathLike[str]) -> None:
    """A student's own part as one small file, from which `convert` makes the student of its base again.

    Args:
        src: a student whose softmax weights are those of its base: distilled, not finetuned as a whole. (A finetuning
            of adapters writes such a file itself, with its LoRA.)
        file: to write.
        base: what it was converted from.

    Raises:
        CheckpointError: there is no student, or a weight of it is not its base's; the file cannot be written.
    """
    plan = make_plan(find_checkpoint(src), "transformer")
    student = attached_to("transformer", plan, dtype=None)
    if student is None:
        raise CheckpointError(f"{src} is no student: it has no conversion to be kept")
    check_same(student.instead or plan, make_plan(find_checkpoint(base), "transformer"))
    own = of_plan(student.plan, dialect=student.plan.dialect, dtype=None, passing=lambda blocks: blocks)
    write_parts(user_path("file", file), student.plan.config, own)


def _index_of(src: Path) -> dict[str, Any]:
    """``model_index.json`` of a release."""
    index = _MODEL_INDEX | read_traits(src).to_index()
    config = open_component(src, "transformer").config
    if config.in_channels != config.out_channels:
        index["_class_name"] = "WanImageToVideoPipeline"
    if "image_encoder" in components_in(src):
        index["image_encoder"] = ["transformers", "CLIPVisionModel"]
        index["image_processor"] = ["transformers", "CLIPImageProcessor"]
    return index


def _own_defaults(folder: Path, *, student: bool = True) -> dict[str, Any]:
    """What the files of a folder say, without what they leave to advice."""
    said: dict[str, Any] = {}
    for file in defaults_files(folder, student=student):
        said |= read_json(file)
    return said


def _copy_the_rest(src: Path, dst: Path, *, teacher: Path | None) -> None:
    """What is not weights: tokenizer, scheduler, settings, index. What the source is run with, the result is; with a
    teacher, the settings of the source are those of the student in it."""
    tokenizer = next((folder for folder in (src / "tokenizer", src / "google" / "umt5-xxl") if folder.is_dir()), None)
    if tokenizer is not None:
        shutil.copytree(tokenizer, dst / "tokenizer")
    elif carried := carried_tokenizer(open_component(src, "text_encoder")):
        (dst / "tokenizer").mkdir()
        (dst / "tokenizer" / "spiece.model").write_bytes(carried)
    else:
        raise CheckpointError(f"{src} has no tokenizer (tokenizer/ or google/umt5-xxl/)")
    (dst / SCHEDULER_FILE).parent.mkdir()
    own, students = _own_defaults(src, student=False), _own_defaults(src)
    if teacher is not None:
        own = _own_defaults(teacher, student=False)
    if (src / SCHEDULER_FILE).is_file():
        shutil.copyfile(src / SCHEDULER_FILE, dst / SCHEDULER_FILE)
    else:
        # For diffusers the shift at the model's own size; the grid, and shifts at other sizes, are for our own file.
        defaults, (schedule, solver) = read_defaults(src), read_scheduler(src)
        write_json(
            dst / SCHEDULER_FILE, scheduler_to_config(FlowSchedule(grid="diffusers", shift=schedule.shift), solver)
        )
        own = {"schedule": defaults.schedule, "negative_prompt": defaults.negative_prompt} | own
    if own:
        write_json(dst / DEFAULTS_FILE, own)
    if own | students != own:
        write_json(dst / STUDENTS_DEFAULTS, students)
    if (src / PROCESSOR_FILE).is_file():
        shutil.copytree(src / PROCESSOR_FILE.parent, dst / PROCESSOR_FILE.parent)
    elif "image_encoder" in components_in(src):
        config = open_component(src, "image_encoder").config
        (dst / PROCESSOR_FILE.parent).mkdir()
        write_json(dst / PROCESSOR_FILE, Preparation.of(config).to_dict())
    if (src / "model_index.json").is_file():
        shutil.copyfile(src / "model_index.json", dst / "model_index.json")
    else:
        write_json(dst / "model_index.json", _index_of(src))

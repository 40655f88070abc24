"""Checkpoints of the networks that this program has: loaded, saved, converted and described.

The engine in `rehyat_jax.weights` knows no network; `models.networks` makes them known to it.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, cast

import jax.numpy as jnp
import numpy as np
from flax import nnx

from rehyat_jax.adapters.inspect import LoraInfo, describe_lora, holds_lora
from rehyat_jax.adapters.linear import keep_in_eight_bits, linear_layers
from rehyat_jax.adapters.lora import Into, Lora, loras_of, of_expert, open_lora
from rehyat_jax.adapters.merging import Merged, with_lora, with_loras
from rehyat_jax.errors import CheckpointError
from rehyat_jax.mixers.config import Conversion
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
from rehyat_jax.models.umt5.encoder import UMT5Encoder
from rehyat_jax.models.umt5.rows import carried_tokenizer
from rehyat_jax.models.wan.conversion_file import ConversionInfo, describe_conversion, open_conversion, write_parts
from rehyat_jax.models.wan.fewstep import FewStep, few_step_family
from rehyat_jax.models.wan.student import STUDENT, plan_without_tensors, write_student
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.runtime.arguments import choice, user_path
from rehyat_jax.sampling.experts import Expert, Experts
from rehyat_jax.sampling.schedule import FlowSchedule
from rehyat_jax.sampling.scheduler_config import scheduler_to_config
from rehyat_jax.weights.convert import Progress, attached_to, convert_weights
from rehyat_jax.weights.files import EIGHT_BITS, read_json
from rehyat_jax.weights.inspect import CheckpointInfo, describe_weights
from rehyat_jax.weights.load import filled, known_dtype
from rehyat_jax.weights.plan import LoadPlan, check_same, parameters
from rehyat_jax.weights.registry import WRITTEN, Attached, component
from rehyat_jax.weights.save import of_module, of_plan, write_network
from rehyat_jax.weights.writing import MAX_SHARD_BYTES, whole_folder, write_json

__all__ = [
    "convert",
    "describe",
    "load_text_encoder",
    "load_transformer",
    "load_vae",
    "save_conversion",
    "save_text_encoder",
    "save_transformer",
    "save_vae",
]

#: In which eight bits the matrices of blocks are kept.
Quantize = Literal["fp8", "int8"]

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


def load_transformer(
    path: str | os.PathLike[str],
    *,
    dtype: Any = jnp.float32,
    hybrid: Conversion | Literal["auto"] | None = "auto",
    loras: Iterable[Any] = (),
    quantize: Quantize | None = None,
) -> WanTransformer:
    """A Wan text-to-video transformer: the softmax teacher, or the student where the folder has a ``rehyat`` part.

    Args:
        path: a bundled model's name, a whole checkpoint's folder, the transformer's own, a weights file, or
            ``hf:OWNER/NAME``; diffusers or original layout,
            whichever prefixes. A file without ``config.json`` beside it is taken to have heads of 128, as all of Wan's.
        dtype: of computation and storage: float32, bfloat16 or float16. What diffusers keeps in float32 (the time
            embedder, the modulation tables, the affine norms) stays float32; so does the hybrid blocks' decay.
        hybrid: ``"auto"``: as the folder is. None: the teacher alone. A configuration: the teacher with these blocks
            converted and newly initialised (from seed 0; `WanTransformer.with_hybrid` takes another), where a
            conversion begins.
        loras: LoRA files or folders of any dialect, merged into the weights in this order: each a path, a path and a
            strength, or a text ``FILE[:strength]``.
        quantize: "fp8" or "int8": the blocks' matrices are kept so on the device, with a scale for each output: half of
            what bfloat16 takes. A file of the same kind is kept as it is; other weights, and those with a LoRA, are
            rounded.

    Raises:
        CheckpointError: missing, truncated, foreign, incomplete, misshapen or not finite, in either part.
        ConfigError: a configuration is impossible or another architecture's, or ``hybrid`` names a block too many.
    """
    return open_transformer(path, dtype=dtype, hybrid=hybrid, loras=loras, quantize=quantize)[0]


def open_transformer(
    path: str | os.PathLike[str],
    name: Literal["transformer", "transformer_2"] = "transformer",
    *,
    expert: Into | None = None,
    dtype: Any = jnp.float32,
    hybrid: Conversion | Literal["auto"] | None = "auto",
    loras: Iterable[Any] = (),
    quantize: Quantize | None = None,
) -> tuple[WanTransformer, Merged]:
    """As `load_transformer`, and the weights on disk, from which it can be had with other LoRAs; ``name`` and
    ``expert`` are which of two experts."""
    dtype = known_dtype(dtype)
    plan = make_plan(find_checkpoint(path), name, dtype=dtype)
    student = attached_to(name, plan, dtype=dtype) if hybrid == "auto" else None
    base = (student and student.instead) or plan
    if (kind := kept_as(quantize)) is not None:
        keep_in_eight_bits(base.abstract, kind)
    chosen = of_expert(loras_of(loras), expert)
    merged = Merged(base=dataclasses.replace(base, abstract=None), dtype=dtype, loras=chosen)
    module = cast(WanTransformer, filled(with_loras(base, merged.loras), dtype=dtype))
    if isinstance(hybrid, Conversion):
        return module.with_hybrid(hybrid, rngs=nnx.Rngs(0)), merged
    if student is None:
        return module, merged
    blocks = cast(Any, filled(student.plan, dtype=dtype))
    return module.with_hybrid(student.plan.config, blocks=blocks), merged


_EXPERTS: dict[Literal["transformer", "transformer_2"], Into] = {"transformer": "high", "transformer_2": "low"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergedExperts:
    """As `Merged`, of two experts, each of which is read when a step asks for it."""

    open: Callable[[tuple[Lora, ...]], Experts]
    loras: tuple[Lora, ...]

    def changed(self, experts: Experts, loras: tuple[Lora, ...]) -> tuple[Experts, MergedExperts]:
        """The experts with other LoRAs; those that are on the device are read again.

        Raises:
            CheckpointError: as `with_loras`.
        """
        return self.open(loras), dataclasses.replace(self, loras=loras)


def open_experts(
    path: str | os.PathLike[str],
    *,
    boundary_ratio: float,
    dtype: Any,
    hybrid: Conversion | Literal["auto"] | None,
    loras: Iterable[Any] = (),
    quantize: Quantize | None = None,
) -> tuple[Experts, MergedExperts]:
    """Two transformers by noise level, each read when a step first asks for it. Arguments as `open_transformer`.

    Raises:
        CheckpointError: their files are incomplete or damaged, or the two are of different sizes; a LoRA that does not
            fit.
        ConfigError: as `load_transformer`.
    """
    folder = find_checkpoint(path)
    plans = {name: make_plan(folder, name) for name in _EXPERTS}
    if plans["transformer"].config != plans["transformer_2"].config:
        raise CheckpointError(f"the two experts in {folder} are of different sizes")

    def opened(chosen: tuple[Lora, ...]) -> Experts:
        def member(name: Literal["transformer", "transformer_2"], least: float) -> Expert:
            own = of_expert(chosen, _EXPERTS[name])
            with_loras(plans[name], own)  # now, not when a step asks for it
            how = {"expert": _EXPERTS[name], "dtype": dtype, "hybrid": hybrid, "loras": own, "quantize": quantize}
            return Expert(name=name, least=least, load=lambda: open_transformer(folder, name, **how)[0])

        members = member("transformer", 1000 * boundary_ratio), member("transformer_2", 0.0)
        return Experts(*members, config=plans["transformer"].config, dtype=jnp.dtype(dtype))

    chosen = loras_of(loras)
    return opened(chosen), MergedExperts(open=opened, loras=chosen)


def kept_as(quantize: Any) -> np.dtype | None:
    """
    Raises:
        RehyatError: it is neither the name of eight bits nor None.
    """
    return None if quantize is None else EIGHT_BITS[choice("quantize", quantize, tuple(EIGHT_BITS))]


def load_vae(path: str | os.PathLike[str], *, dtype: Any = jnp.float32) -> WanVAE:
    """A Wan2.1 or Wan2.2 VAE. Arguments and errors as `load_transformer`; an original file has its release's latent
    statistics."""
    dtype = known_dtype(dtype)
    return cast(WanVAE, filled(make_plan(find_checkpoint(path), "vae", dtype=dtype), dtype=dtype))


def load_text_encoder(
    path: str | os.PathLike[str], *, dtype: Any = jnp.float32, quantize: Quantize | None = None
) -> UMT5Encoder:
    """A UMT5 encoder. Arguments and errors as `load_transformer`; an embedding of zeros alone is refused as well."""
    dtype = known_dtype(dtype)
    plan = make_plan(find_checkpoint(path), "text_encoder", dtype=dtype)
    if (kind := kept_as(quantize)) is not None:
        keep_in_eight_bits(plan.abstract, kind)
    return cast(UMT5Encoder, filled(plan, dtype=dtype))


def save_transformer(
    module: WanTransformer, folder: str | os.PathLike[str], *, dtype: Any = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write ``config.json`` and ``diffusion_pytorch_model.safetensors`` (or shards and an index), and ``rehyat/``.

    The last is the student's part; without it the folder is the teacher, as diffusers reads it.

    Args:
        folder: new or empty; it appears whole or not at all.
        dtype: None keeps each parameter's own; otherwise as in `load_transformer`, float32 parts staying float32.
        max_shard_bytes: more than this is split into shards.

    Raises:
        CheckpointError: the folder is not empty or cannot be written, or a parameter is not finite.
    """
    _check_wide(module)
    with whole_folder(user_path("folder", folder)) as partial:
        _write(module.with_hybrid(None), partial, "transformer", dtype, max_shard_bytes)
        if module.hybrid is not None:
            write_student(partial, module.config, module.hybrid, module.hybrid_blocks, dtype=dtype)


def save_vae(
    module: WanVAE, folder: str | os.PathLike[str], *, dtype: Any = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write a VAE's folder; see `save_transformer`."""
    with whole_folder(user_path("folder", folder)) as partial:
        _write(module, partial, "vae", dtype, max_shard_bytes)


def save_text_encoder(
    module: UMT5Encoder, folder: str | os.PathLike[str], *, dtype: Any = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write ``config.json`` and ``model.safetensors``, the embedding as ``shared.weight``; see `save_transformer`."""
    _check_wide(module)
    with whole_folder(user_path("folder", folder)) as partial:
        _write(module, partial, "text_encoder", dtype, max_shard_bytes)


def _check_wide(module: Any) -> None:
    if any(layer.scale is not None for layer in linear_layers(module).values()):
        raise CheckpointError(
            "this network is kept in eight bits: convert its checkpoint with quantize in place of this"
        )


def _write(module: Any, folder: Path, name: str, dtype: Any, max_shard_bytes: int) -> None:
    kind = component(name)
    variables = parameters(nnx.state(module))
    tensors = of_module(kind.table(module.config), variables, dialect=WRITTEN, dtype=dtype)
    write_network(folder, module.config, tensors, stem=kind.stem, max_shard_bytes=max_shard_bytes)


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
    (`models.wan.fewstep`), gets one that says how it attends and how it is run.

    Args:
        dst: new or empty; it appears whole or not at all.
        dtype: None keeps each tensor's; otherwise float32, bfloat16 or float16, by the rule of `load_transformer`.
        teacher: a checkpoint whose transformer is kept beside a student's: ``dst`` is then the teacher for diffusers
            and for ``hybrid=None``, and the student, finetuned weights and all, is in its ``rehyat/`` part.
        loras: merged into the transformer's weights (a student's own), as `load_transformer` takes them.
        conversion: a file of `save_conversion`'s, over ``src`` as its base: ``dst`` is then the student.
        quantize: "fp8" or "int8": of the matrices of the transformer's and the text encoder's blocks, each with
            ``weight_scale``, a number for each row.

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
    changes: dict[str, Callable[[LoadPlan], LoadPlan]] = {}
    if chosen or file is not None:
        for name, expert in _EXPERTS.items() if two else [("transformer", None)]:
            changes[name] = functools.partial(changed, expert=expert)

    def part(plan: LoadPlan) -> Attached:
        assert file is not None
        return open_conversion(file, plan, dtype=np.float32 if dtype is None else dtype)[0]

    family = few_step_of(user_path("src", src))
    causal = family is not None and family.conversion is not None and file is None

    def windows(plan: LoadPlan) -> Attached:
        assert family is not None
        assert family.conversion is not None
        return Attached(plan=plan_without_tensors(plan, family.conversion))

    def say_how(folder: Path) -> None:
        assert family is not None
        write_json(folder / STUDENT.folder / DEFAULTS_FILE, dict(family.defaults))

    parts = {} if file is None else {"transformer": part}
    convert_weights(
        user_path("src", src),
        user_path("dst", dst),
        write_rest=functools.partial(_copy_the_rest, teacher=None if teacher is None else Path(teacher)),
        dtype=dtype,
        around=None if teacher is None else user_path("teacher", teacher),
        changed=changes,
        kept=kept_as(quantize),
        parts={"transformer": windows} if causal else parts,
        write_beside=say_how if causal else None,
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

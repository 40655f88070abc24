"""A student: what a training of it begins with, and the folder that it becomes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from rehyat_jax.adapters.training import Form, LoraConfig, folded, header_of, lora_tensors
from rehyat_jax.errors import ConfigError
from rehyat_jax.mixers.config import Conversion
from rehyat_jax.models.checkpoints import save_transformer
from rehyat_jax.models.folder import DEFAULTS_FILE
from rehyat_jax.models.wan.conversion_file import write_conversion
from rehyat_jax.models.wan.rows import TRANSFORMER
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.weights.files import read_json
from rehyat_jax.weights.writing import whole_folder, write_file, write_json

#: What a result has from its source, as it is there.
_KEPT = (
    *("vae", "text_encoder", "tokenizer", "scheduler", "image_encoder", "image_processor"),
    *("transformer", "transformer_2", "model_index.json", DEFAULTS_FILE),
)


def write_adapters(folder: Path, student: WanTransformer, config: LoraConfig, *, base: str) -> None:
    """A student's adapters in ComfyUI's and in diffusers' form, and with what its conversion adds as one file."""
    form: Form
    for form in ("comfyui", "diffusers"):
        tensors = lora_tensors(student, TRANSFORMER, form=form, dtype=jnp.bfloat16)
        header = header_of(config, base=base, form=form)
        write_file(folder / f"lora_{form}.safetensors", tensors, metadata=header)
    if student.hybrid is not None:
        write_conversion(
            folder / "conversion.safetensors",
            student.config,
            student.hybrid,
            student.hybrid_blocks,
            lora=lora_tensors(student, TRANSFORMER, form="comfyui", dtype=jnp.bfloat16),
            header=header_of(config, base=base, form="comfyui"),
            dtype=jnp.bfloat16,
        )


def student_of(model: WanTransformer, hybrid: Conversion | None, *, where: Path) -> WanTransformer:
    """The student that finetuning begins with: the model itself, or with its blocks converted as ``hybrid`` says.

    A student keeps its hybrid blocks' parameters; those that ``hybrid`` adds are at their start.

    Raises:
        ConfigError: ``model`` (which is at ``where``) is a teacher and there is no ``hybrid``, or its parameters are
            not such a student's.
    """
    if hybrid is None:
        if model.hybrid is None:
            raise ConfigError(f"{where} is a softmax model: distil it first, or say by hybrid how it is converted")
        return model
    student = model.with_hybrid(hybrid, rngs=nnx.Rngs(0))
    if model.hybrid is None:
        return student
    ours, theirs = (dict(nnx.to_flat_state(nnx.state(x.hybrid_blocks))) for x in (student, model))
    if model.mixing.pattern != student.mixing.pattern or any(
        path not in ours or ours[path].get_value().shape != leaf.get_value().shape for path, leaf in theirs.items()
    ):
        raise ConfigError(f"{where} has other hybrid blocks than this run's hybrid: their parameters do not fit")
    nnx.update(student.hybrid_blocks, nnx.from_flat_state(list(theirs.items())))
    return student


def write_student(
    folder: Path,
    source: Path,
    student: WanTransformer,
    *,
    defaults: Mapping[str, Any],
    lora: LoraConfig | None = None,
    part: str = "transformer",
) -> None:
    """A student's whole folder, or nothing: its transformer, the rest from the source's.

    Args:
        defaults: what it is sampled with unless a user says otherwise, where that is not the source's.
        lora: of a student with adapters, which are folded in, and written as files of their own in it.
        part: the folder that the student stands in; of two experts the other one stays as it is.
    """
    with whole_folder(folder) as partial:
        for name in _KEPT:
            if name != part and (source / name).is_dir():
                shutil.copytree(source / name, partial / name)
            elif (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
        theirs = dict(read_json(file)) if (file := source / DEFAULTS_FILE).is_file() else {}
        if (ours := theirs | dict(defaults)) != {"remember": "steps"} | theirs:
            write_json(partial / DEFAULTS_FILE, ours)
        if lora is not None and lora.rank:
            write_adapters(partial, student, lora, base=str(source))
        save_transformer(folded(student), partial / part, dtype=jnp.bfloat16)


def computing(model: WanTransformer, dtype: jnp.dtype) -> WanTransformer:
    """The same variables in a model that computes in ``dtype``."""
    computing = nnx.eval_shape(lambda: WanTransformer(model.config, hybrid=model.hybrid, dtype=dtype, rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.graphdef(computing), nnx.state(model))

"""A conversion as one small file: a student's own part, and the LoRA that it wants, over an untouched public base.

One safetensors file. Tensors ``rehyat.blocks.<i>.<parameter>`` are those of `rehyat_jax.models.wan.student`, their
configuration stands in the header; other tensors are a LoRA in ComfyUI's names, where the base is to be changed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flax import nnx

from rehyat_jax.adapters.inspect import LoraInfo, describe_lora, shown
from rehyat_jax.adapters.lora import LoraFile, open_lora
from rehyat_jax.errors import CheckpointError
from rehyat_jax.mixers.config import Conversion, read_conversion
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.student import DIALECT, part_plan, student_rows
from rehyat_jax.runtime.files import whole_file
from rehyat_jax.weights.files import TensorSource, parse_object
from rehyat_jax.weights.opening import open_tensors
from rehyat_jax.weights.plan import LoadPlan, parameters
from rehyat_jax.weights.registry import Attached, component
from rehyat_jax.weights.save import of_module
from rehyat_jax.weights.writing import Outgoing, write_file

PREFIX = "rehyat."
_CONFIG = "rehyat_config"


def write_conversion(
    file: Path,
    config: WanConfig,
    hybrid: Conversion,
    blocks: nnx.Module,
    *,
    lora: Iterable[Outgoing] = (),
    header: Mapping[str, str] = MappingProxyType({}),
    dtype: Any = None,
) -> None:
    """From a module's converted blocks; ``dtype`` None: each parameter keeps its own.

    Raises:
        CheckpointError: a parameter is not finite.
    """
    own = of_module(student_rows(config, hybrid), parameters(nnx.state(blocks)), dialect=DIALECT, dtype=dtype)
    write_parts(file, hybrid, own, lora=lora, header=header)


def write_parts(
    file: Path,
    hybrid: Conversion,
    own: Iterable[Outgoing],
    *,
    lora: Iterable[Outgoing] = (),
    header: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """As `write_conversion`, of tensors."""
    named = [
        Outgoing(name=PREFIX + tensor.name, dtype=tensor.dtype, shape=tensor.shape, blocks=tensor.blocks)
        for tensor in own
    ]
    words = {"format": "pt", _CONFIG: json.dumps(hybrid.to_dict()), **header}
    with whole_file(file) as partial:
        write_file(partial, [*named, *lora], metadata=words)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversionInfo:
    """Such a file, by its header."""

    file: Path
    hybrid: Conversion
    parameters: int
    #: What it says of its base.
    base: str | None
    lora: LoraInfo | None

    def __str__(self) -> str:
        lines = [
            str(self.file),
            "conversion: a student's own part, for `rehyat convert BASE DST --with` it",
            f"  blocks      {json.dumps(self.hybrid.to_dict())}",
            f"  parameters  {self.parameters:,}",
            *([f"  base        {self.base}"] if self.base else []),
            *([f"  with a LoRA\n{self.lora}"] if self.lora else []),
        ]
        return "\n".join(lines)


def describe_conversion(file: Path) -> ConversionInfo | None:
    """None: it is no conversion.

    Raises:
        CheckpointError, ConfigError: it is one, and damaged.
    """
    tensors = open_tensors(file)
    if _CONFIG not in tensors.metadata:
        return None
    own = [info for name, info in tensors.infos.items() if name.startswith(PREFIX)]
    more = len(own) < len(tensors.infos)
    return ConversionInfo(
        file=file,
        hybrid=_conversion_of(tensors, file),
        parameters=sum(info.size for info in own),
        base=shown(tensors.metadata.get("base_model")),
        lora=describe_lora(open_lora(file, beside=PREFIX), component("transformer")) if more else None,
    )


def _conversion_of(tensors: TensorSource, file: Path) -> Conversion:
    if (words := tensors.metadata.get(_CONFIG)) is None:
        raise CheckpointError(f"{file} is no conversion: its header has no {_CONFIG}")
    return read_conversion(parse_object(words.encode("utf-8", "replace"), f"{_CONFIG} of {file}"))


def open_conversion(file: Path, base: LoadPlan, *, dtype: Any) -> tuple[Attached, LoraFile | None]:
    """A conversion for this base: the student's part, and the LoRA for the base's weights.

    Raises:
        CheckpointError: missing, damaged, no conversion, or for a model of other sizes.
        ConfigError: its configuration is impossible, or not of this model.
    """
    tensors = open_tensors(file)
    hybrid = _conversion_of(tensors, file)
    names = {name.removeprefix(PREFIX): name for name in tensors.infos if name.startswith(PREFIX)}
    plan = part_plan(base.config, hybrid, tensors=tensors, names=names, where=file, dtype=dtype, user="its header")
    more = len(names) < len(tensors.infos)
    return Attached(plan=plan), open_lora(file, beside=PREFIX) if more else None

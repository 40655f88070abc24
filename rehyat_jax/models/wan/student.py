"""A student's own part of a checkpoint: ``rehyat/config.json`` and ``rehyat/features.safetensors``.

The folder around it stays a plain diffusers checkpoint of the softmax teacher. ``rehyat/`` is written into the
transformer's own folder; it is also found beside ``model_index.json``. A converted block's tensors are named
``blocks.<i>.<parameter>``, i counting all the model's blocks, and lie as the module keeps them.

A student that was finetuned has other weights than its teacher throughout. Where both are in one checkpoint, the
student's are in ``rehyat/transformer/``, again as diffusers would have them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rehyat_jax.errors import CheckpointError
from rehyat_jax.mixers.base import Mixer, MixerConfig
from rehyat_jax.mixers.config import Conversion, read_conversion
from rehyat_jax.models.wan.config import VAEConfig, WanConfig
from rehyat_jax.models.wan.mixing import Mixing, listed
from rehyat_jax.runtime.variables import abstract_module
from rehyat_jax.weights.files import TensorSource, read_json
from rehyat_jax.weights.opening import open_tensors
from rehyat_jax.weights.plan import LoadPlan, make_plan, pair_tensors, parameters
from rehyat_jax.weights.registry import Attached, component
from rehyat_jax.weights.rows import Row
from rehyat_jax.weights.save import of_module, write_network

#: The names of a student's own tensors.
DIALECT = "rehyat"
#: The file's name without ending.
STEM = "features"


def student_rows(config: WanConfig, hybrid: Conversion) -> tuple[Row, ...]:
    """The table of the converted blocks' parameters, made from the modules: a converted block keeps its own number."""
    mixing = Mixing.of(hybrid, config.num_layers)
    modules = mixing.parted(_abstract(config, hybrid, jnp.bfloat16))
    return tuple(
        Row(
            mixing.prefix(group) + path,
            {DIALECT: f"blocks.{{}}.{path}"},
            float32=variable.get_value().dtype == jnp.float32,
            layers=mixing.blocks(mixer),
        )
        for group, (mixer, module) in enumerate(zip(mixing.converted_groups, modules, strict=True))
        for path, variable in parameters(nnx.state(module)).items()
    )


def write_student(
    folder: Path, config: WanConfig, hybrid: Conversion, blocks: nnx.Module, *, dtype: Any = None
) -> None:
    """The ``rehyat`` part of a student into its transformer's folder; ``dtype`` None: each parameter keeps its own.

    Raises:
        CheckpointError: a parameter is not finite.
    """
    tensors = of_module(student_rows(config, hybrid), parameters(nnx.state(blocks)), dialect=DIALECT, dtype=dtype)
    # One file whatever its size: it is a tenth of the model at most.
    write_network(folder / STUDENT.folder, hybrid, tensors, stem=STEM, max_shard_bytes=None)


def part_plan(
    config: WanConfig,
    hybrid: Conversion,
    *,
    tensors: TensorSource,
    names: Mapping[str, str],
    where: Path,
    dtype: Any,
    user: str,
) -> LoadPlan:
    """Pair a student's tensors with the parameters of the converted blocks, or fail.

    Args:
        names: the file's by clean name, of all that must find a place.
        where, user: the file and what has use for its tensors, for messages.

    Raises:
        CheckpointError: tensors are missing, unused or misshapen.
    """
    abstract = _abstract(config, hybrid, dtype)
    slots = pair_tensors(
        student_rows(config, hybrid),
        abstract,
        dialect=DIALECT,
        names=names,
        tensors=tensors,
        where=where,
        user=user,
    )
    return LoadPlan(
        component=component("transformer"),
        title="converted blocks",
        stem=STEM,
        dialect=DIALECT,
        config=hybrid,
        weights=where,
        tensors=tensors,
        slots=slots,
        beside=(),
        abstract=abstract,
    )


class _NoTensors(TensorSource):
    """Of mixers without parameters."""

    def __init__(self) -> None:
        self.infos, self.files = {}, ()

    def pieces(self, name: str, *, rows: int | None = None) -> Iterator[np.ndarray]:
        raise KeyError(name)


def plan_without_tensors(base: LoadPlan, hybrid: Conversion) -> LoadPlan:
    """The part of a student whose mixers have no parameters, over the transformer of a plan."""
    return part_plan(
        base.config,
        hybrid,
        tensors=_NoTensors(),
        names={},
        where=base.weights,
        dtype=np.float32,
        user="its configuration",
    )


class StudentPart:
    """How a student's part is found, checked and described."""

    folder = "rehyat"
    instead = "transformer"

    def plan(self, folder: Path, config: WanConfig, *, dtype: Any) -> Attached:
        """Pair every tensor of a ``rehyat`` folder with a parameter of the model's hybrid blocks, or fail.

        Raises:
            CheckpointError: a file is missing or damaged; tensors are missing, unused or misshapen; it has a
                transformer of other sizes than ``config``.
            ConfigError: its configuration is impossible, or not of this model.
        """
        hybrid = read_conversion(read_json(folder / "config.json"))
        weights = folder / f"{STEM}.safetensors"
        tensors = open_tensors(weights)
        plan = part_plan(
            config,
            hybrid,
            tensors=tensors,
            names={name: name for name in tensors.infos},
            where=weights,
            dtype=dtype,
            user=f"its {folder / 'config.json'}",
        )
        own = folder / self.instead
        instead = make_plan(own, "transformer", dtype=dtype) if own.exists() else None
        if instead is not None and instead.config != config:
            raise CheckpointError(
                f"{instead.weights} is of other sizes than the transformer that it takes the place of"
            )
        return Attached(plan=plan, instead=instead)

    def describe(self, attached: Attached, config: WanConfig, *, root: Path, others: Mapping[str, Any]) -> StudentInfo:
        """What its blocks have and carry."""
        hybrid: Conversion = attached.plan.config
        mixing, vae = Mixing.of(hybrid, config.num_layers), others.get("vae")
        modules = mixing.parted(_abstract(config, hybrid, jnp.bfloat16))
        return StudentInfo(
            weights=attached.plan.weights,
            softmax=None if attached.instead is None else attached.instead.weights,
            mixing=mixing,
            mixers=tuple(
                MixerInfo(mixer=mixer, blocks=mixing.blocks(mixer), **_state(mixer, module))
                for mixer, module in zip(mixing.converted_groups, modules, strict=True)
            ),
            parameters=sum(info.size for info in attached.plan.tensors.infos.values()),
            size=_size(root, config, vae) if isinstance(vae, VAEConfig) else None,
        )


STUDENT = StudentPart()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerInfo:
    """The blocks of one mixer, and the state that each carries from chunk to chunk: of one video, at one step and
    guidance branch."""

    mixer: MixerConfig
    blocks: tuple[int, ...]
    #: Bytes of one block's state whatever a frame's size: the linear state s and z.
    linear_nbytes: int
    #: Bytes of one block's kept tokens (overlap, sinks), in bfloat16: for each token of a frame.
    kept_nbytes: int

    def nbytes(self, tokens: int) -> int:
        """Of all its blocks, with so many tokens a frame."""
        return len(self.blocks) * (self.linear_nbytes + self.kept_nbytes * tokens)

    def lines(self, tokens: int) -> list[str]:
        options = ", ".join(f"{key} {value}" for key, value in self.mixer.to_dict().items() if key != "mixer")
        linear, kept = self.linear_nbytes, self.kept_nbytes * tokens
        return [
            f"mixer       {self.mixer.name} in {listed(self.blocks)}: {options}",
            f"            state of a block: {linear:,} bytes of float32 linear state, {kept:,} of bfloat16 tokens",
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentInfo:
    """A student's own part on disk, and what its blocks carry from chunk to chunk."""

    weights: Path
    #: Its own weights in the place of those around it, where it has them.
    softmax: Path | None
    mixing: Mixing
    #: Of the converted blocks.
    mixers: tuple[MixerInfo, ...]
    parameters: int
    #: Of the model's own videos, where known: what they are called, and their tokens a frame.
    size: tuple[str, int] | None

    @property
    def converted(self) -> tuple[bool, ...]:
        """For each block of the model: is it converted?"""
        return self.mixing.converted

    def __str__(self) -> str:
        blocks = [i for i, converted in enumerate(self.converted) if converted]
        where, tokens = self.size or ("one token a frame", 1)
        lines = [
            f"hybrid      {listed(blocks)} of {len(self.converted)}",
            *(line for info in self.mixers for line in info.lines(tokens)),
            f"state       all {len(blocks)}: {sum(info.nbytes(tokens) for info in self.mixers):,} bytes a chunk",
            f"            ({where}; for each guidance branch, and each step unless finished chunks are remembered)",
            f"features    {self.parameters:,} parameters in {self.weights}",
            *([f"finetuned   {self.softmax}"] if self.softmax else []),
        ]
        if why := self.mixing.why_not_stream():
            lines.append(f"            {why}")
        return "\n".join(f"  {line}" for line in lines)


def _abstract(config: WanConfig, hybrid: Conversion, dtype: Any) -> Any:
    """The converted blocks' mixers without memory: shapes only."""
    kinds = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
    return abstract_module(Mixing.of(hybrid, config.num_layers).make, config, **kinds)


def _state(mixer: MixerConfig, module: Mixer) -> dict[str, int]:
    """The bytes of a block's mixer state, of which a frame without tokens leaves the sums."""
    if mixer.why_not_stream() is not None:
        return {"linear_nbytes": 0, "kept_nbytes": 0}
    sums, state = (
        _nbytes(jax.eval_shape(lambda frame=frame: module.init_state(batch=1, frame=frame, dtype=jnp.bfloat16)))
        for frame in (0, 1)
    )
    return {"linear_nbytes": sums, "kept_nbytes": state - sums}


def _nbytes(state: Any) -> int:
    """Of its arrays; a count of tokens is none."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim)


def _size(root: Path, transformer: WanConfig, vae: VAEConfig) -> tuple[str, int]:
    """A whole checkpoint's own size of video, and the tokens of its frames."""
    from rehyat_jax.models.folder import read_defaults

    defaults = read_defaults(root)
    rows, columns = (
        size // (vae.spatial_factor * patch)
        for size, patch in zip((defaults.height, defaults.width), transformer.patch_size[1:], strict=True)
    )
    return f"{defaults.width}x{defaults.height}", rows * columns

"""A student's own part of a checkpoint: ``rehyat/config.json`` and ``rehyat/features.safetensors``.

The folder around it stays a plain diffusers checkpoint of the softmax teacher. ``rehyat/`` is written into the
transformer's own folder; it is also found beside ``model_index.json``. A converted block's tensors are named
``blocks.<i>.<parameter>``, i counting all the model's blocks, and lie as the module keeps them.

A student that was finetuned has other weights than its teacher throughout. Where both are in one checkpoint, the
student's are in ``rehyat/transformer/``, again as diffusers would have them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rehyat_jax.errors import CheckpointError
from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.mixers.hybrid import BlockState, empty_state, hybrid_blocks, listed, why_not_stream
from rehyat_jax.models.wan.config import VAEConfig, WanConfig
from rehyat_jax.weights.files import read_json
from rehyat_jax.weights.opening import open_tensors
from rehyat_jax.weights.plan import LoadPlan, make_plan, pair_tensors, parameters
from rehyat_jax.weights.registry import Attached
from rehyat_jax.weights.rows import Row
from rehyat_jax.weights.save import of_module, write_network

#: The names of a student's own tensors.
DIALECT = "rehyat"
#: The file's name without ending.
STEM = "features"


def student_rows(config: WanConfig, hybrid: HybridConfig) -> tuple[Row, ...]:
    """The table of the converted blocks' parameters, made from the module: a converted block keeps its own number."""
    converted = tuple(i for i, is_hybrid in enumerate(hybrid.converted(config.num_layers)) if is_hybrid)
    narrow = _abstract(config, hybrid, jnp.bfloat16)
    return tuple(
        Row(
            path,
            {DIALECT: f"blocks.{{}}.{path}"},
            float32=variable.get_value().dtype == jnp.float32,
            layers=converted,
        )
        for path, variable in parameters(nnx.state(narrow)).items()
    )


def write_student(
    folder: Path, config: WanConfig, hybrid: HybridConfig, blocks: nnx.Module, *, dtype: Any = None
) -> None:
    """The ``rehyat`` part of a student into its transformer's folder; ``dtype`` None: each parameter keeps its own.

    Raises:
        CheckpointError: a parameter is not finite.
    """
    tensors = of_module(student_rows(config, hybrid), parameters(nnx.state(blocks)), dialect=DIALECT, dtype=dtype)
    # One file whatever its size: it is a tenth of the model at most.
    write_network(folder / STUDENT.folder, hybrid, tensors, stem=STEM, max_shard_bytes=None)


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
        hybrid = HybridConfig.from_dict(read_json(folder / "config.json"))
        weights = folder / f"{STEM}.safetensors"
        tensors, abstract = open_tensors(weights), _abstract(config, hybrid, dtype)
        slots = pair_tensors(
            student_rows(config, hybrid),
            abstract,
            dialect=DIALECT,
            names={name: name for name in tensors.infos},
            tensors=tensors,
            where=weights,
            user=f"its {folder / 'config.json'}",
        )
        plan = LoadPlan(
            title="converted blocks",
            stem=STEM,
            dialect=DIALECT,
            config=hybrid,
            weights=weights,
            tensors=tensors,
            slots=slots,
            beside=(),
            abstract=abstract,
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
        hybrid: HybridConfig = attached.plan.config
        # Of frames without tokens: the sums alone.
        sums, state = (
            jax.eval_shape(lambda frame=frame: empty_state(config, hybrid, batch=1, frame=frame, dtype=jnp.bfloat16))
            for frame in (0, 1)
        )
        vae = others.get("vae")
        return StudentInfo(
            weights=attached.plan.weights,
            config=hybrid,
            softmax=None if attached.instead is None else attached.instead.weights,
            converted=hybrid.converted(config.num_layers),
            parameters=sum(info.size for info in attached.plan.tensors.infos.values()),
            sums_nbytes=_nbytes(sums),
            kept_nbytes=_nbytes(state) - _nbytes(sums),
            size=_size(root, config, vae) if isinstance(vae, VAEConfig) else None,
        )


STUDENT = StudentPart()


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentInfo:
    """A student's own part on disk, and what its blocks carry from chunk to chunk."""

    weights: Path
    config: HybridConfig
    #: Its own weights in the place of those around it, where it has them.
    softmax: Path | None
    #: Per block of the model.
    converted: tuple[bool, ...]
    parameters: int
    #: Bytes of the sums s and z, of one block; as the next, of one video at one step and guidance branch.
    sums_nbytes: int
    #: Bytes of the tokens kept (overlap, sinks), of one block, in bfloat16: for each token of a frame.
    kept_nbytes: int
    #: Of the model's own videos, where known: what they are called, and their tokens a frame.
    size: tuple[str, int] | None

    def __str__(self) -> str:
        blocks = [i for i, converted in enumerate(self.converted) if converted]
        options = ", ".join(f"{key} {value}" for key, value in self.config.to_dict().items() if key != "blocks")
        where, tokens = self.size or ("one token a frame", 1)
        kept = self.kept_nbytes * tokens
        lines = [
            f"hybrid      {listed(blocks)} of {len(self.converted)}",
            f"options     {options}",
            f"features    {self.parameters:,} parameters in {self.weights}",
            *([f"finetuned   {self.softmax}"] if self.softmax else []),
            f"state       a block: {self.sums_nbytes:,} bytes of sums in float32, {kept:,} of kept tokens in bfloat16",
            f"            all {len(blocks)}: {len(blocks) * (self.sums_nbytes + kept):,} bytes a chunk",
            f"            ({where}; for each guidance branch, and each step unless finished chunks are remembered)",
        ]
        if why := why_not_stream(self.config, self.converted):
            lines.append(f"            {why}")
        return "\n".join(f"  {line}" for line in lines)


def _abstract(config: WanConfig, hybrid: HybridConfig, dtype: Any) -> Any:
    """The hybrid blocks without memory: shapes only."""
    kinds = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
    return nnx.eval_shape(lambda: hybrid_blocks(config, hybrid, **kinds, rngs=nnx.Rngs(0)))


def _nbytes(state: BlockState) -> int:
    """Of its arrays; a count of tokens is none."""
    return sum(x.size * x.dtype.itemsize for x in state if x.ndim)


def _size(root: Path, transformer: WanConfig, vae: VAEConfig) -> tuple[str, int]:
    """A whole checkpoint's own size of video, and the tokens of its frames."""
    from rehyat_jax.models.folder import read_defaults

    defaults = read_defaults(root)
    rows, columns = (
        size // (vae.spatial_factor * patch)
        for size, patch in zip((defaults.height, defaults.width), transformer.patch_size[1:], strict=True)
    )
    return f"{defaults.width}x{defaults.height}", rows * columns

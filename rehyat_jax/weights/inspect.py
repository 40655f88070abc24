"""What a checkpoint holds, from its headers and configurations alone."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp

from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.mixers.hybrid import BlockState, empty_state, listed, why_not_stream
from rehyat_jax.models.config import VAEConfig, WanConfig
from rehyat_jax.weights.component import BY_NAME, ComponentName, Config
from rehyat_jax.weights.files import TensorInfo
from rehyat_jax.weights.hybrid import find_hybrid, make_hybrid_plan
from rehyat_jax.weights.layout import components_in, locate
from rehyat_jax.weights.names import Dialect
from rehyat_jax.weights.plan import open_component, sole_component


@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridInfo:
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComponentInfo:
    """One network on disk."""

    name: ComponentName
    dialect: Dialect
    weights: Path
    config: Config
    tensors: int
    parameters: int
    nbytes: int
    #: Parameters by number format, most first.
    dtypes: tuple[tuple[str, int], ...]
    #: Of a transformer that is a student.
    hybrid: HybridInfo | None = None

    def __str__(self) -> str:
        formats = ", ".join(f"{count:,} in {dtype}" for dtype, count in self.dtypes)
        sizes = ", ".join(f"{key} {value}" for key, value in self._sizes().items())
        return (
            f"{self.name}: {BY_NAME[self.name].title}, {self.dialect} names\n"
            f"  file        {self.weights}\n"
            f"  parameters  {self.parameters:,} in {self.tensors} tensors, {self.nbytes / 1e6:,.1f} MB\n"
            f"  stored as   {formats}\n"
            f"  sizes       {sizes}" + (f"\n{self.hybrid}" if self.hybrid else "")
        )

    def _sizes(self) -> dict[str, object]:
        values = dataclasses.asdict(self.config)
        return {key: value for key, value in values.items() if not key.startswith("latents_")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """A checkpoint on disk: one network, or all that a whole checkpoint's folder holds."""

    path: Path
    components: tuple[ComponentInfo, ...]

    def __str__(self) -> str:
        return "\n".join([str(self.path), *map(str, self.components)])


def describe(path: str | os.PathLike[str]) -> CheckpointInfo:
    """Dialect, sizes, parameters and number formats; no tensor is read, and none is compared with the configuration.

    Args:
        path: a whole checkpoint's folder, a component's folder or a weights file, in any dialect.

    Raises:
        CheckpointError: missing, damaged, or not of a network that this program knows.
        ConfigError: a configuration is impossible or another architecture's.
    """
    path = Path(path)
    components = {name: _describe(path, name) for name in components_of(path)}
    if "transformer" in components:
        vae = components["vae"].config if "vae" in components else None
        hybrid = _describe_hybrid(path, components["transformer"], vae)
        components["transformer"] = dataclasses.replace(components["transformer"], hybrid=hybrid)
    return CheckpointInfo(path=path, components=tuple(components.values()))


def components_of(path: Path) -> tuple[ComponentName, ...]:
    """The networks of a whole checkpoint, or the one of a component's folder or a file."""
    return components_in(path) or (sole_component(path),)


def _describe(path: Path, name: ComponentName) -> ComponentInfo:
    opened = open_component(locate(path, name))
    counts: Counter[str] = Counter()
    infos: dict[str, TensorInfo] = opened.infos
    aliases = {row.alias: row.diffusers for row in opened.component.rows(opened.config) if row.alias}
    for tensor, info in infos.items():
        # A tied tensor that the file holds twice is one set of parameters.
        if aliases.get(tensor) not in infos:
            counts[info.dtype.name] += info.size
    return ComponentInfo(
        name=name,
        dialect=opened.dialect,
        weights=opened.weights,
        config=opened.config,
        tensors=len(infos),
        parameters=sum(counts.values()),
        nbytes=sum(info.nbytes for info in infos.values()),
        dtypes=tuple(counts.most_common()),
    )


def _describe_hybrid(path: Path, transformer: ComponentInfo, vae: Config | None) -> HybridInfo | None:
    folder, config = find_hybrid(transformer.weights), transformer.config
    if folder is None:
        return None
    assert isinstance(config, WanConfig)
    plan = make_hybrid_plan(folder, config, dtype=jnp.float32)
    # Of frames without tokens: the sums alone.
    sums, state = (
        jax.eval_shape(lambda frame=frame: empty_state(config, plan.config, batch=1, frame=frame, dtype=jnp.bfloat16))
        for frame in (0, 1)
    )
    return HybridInfo(
        weights=plan.weights,
        config=plan.config,
        softmax=None if plan.softmax is None else plan.softmax.weights,
        converted=plan.config.converted(config.num_layers),
        parameters=sum(info.size for info in plan.tensors.infos.values()),
        sums_nbytes=_nbytes(sums),
        kept_nbytes=_nbytes(state) - _nbytes(sums),
        size=_size(path, config, vae) if isinstance(vae, VAEConfig) else None,
    )


def _nbytes(state: BlockState) -> int:
    """Of its arrays; a count of tokens is none."""
    return sum(x.size * x.dtype.itemsize for x in state if x.ndim)


def _size(path: Path, transformer: WanConfig, vae: VAEConfig) -> tuple[str, int]:
    """A whole checkpoint's own size of video, and the tokens of its frames."""
    # A checkpoint's settings are read by a module that itself reads weights.
    from rehyat_jax.models.folder import read_defaults

    defaults = read_defaults(path)
    rows, columns = (
        size // (vae.spatial_factor * patch)
        for size, patch in zip((defaults.height, defaults.width), transformer.patch_size[1:], strict=True)
    )
    return f"{defaults.width}x{defaults.height}", rows * columns

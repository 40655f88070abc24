"""What a checkpoint holds, from its headers and configurations alone."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from pathlib import Path

from rehyat_jax.weights.component import BY_NAME, ComponentName, Config
from rehyat_jax.weights.files import TensorInfo
from rehyat_jax.weights.layout import components_in, locate
from rehyat_jax.weights.names import Dialect
from rehyat_jax.weights.plan import open_component, sole_component


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

    def __str__(self) -> str:
        formats = ", ".join(f"{count:,} in {dtype}" for dtype, count in self.dtypes)
        sizes = ", ".join(f"{key} {value}" for key, value in self._sizes().items())
        return (
            f"{self.name}: {BY_NAME[self.name].title}, {self.dialect} names\n"
            f"  file        {self.weights}\n"
            f"  parameters  {self.parameters:,} in {self.tensors} tensors, {self.nbytes / 1e6:,.1f} MB\n"
            f"  stored as   {formats}\n"
            f"  sizes       {sizes}"
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
    return CheckpointInfo(path=path, components=tuple(_describe(path, name) for name in components_of(path)))


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

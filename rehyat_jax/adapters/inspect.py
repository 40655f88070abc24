"""What a LoRA file is, by its header: dialect, ranks, the model it fits, the words that call it up."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rehyat_jax.adapters.lora import ADAPTER_CONFIG, LoraFile, located
from rehyat_jax.adapters.merging import changed_shape, fitting
from rehyat_jax.adapters.names import is_lora
from rehyat_jax.errors import CheckpointError
from rehyat_jax.weights.layout import INDEX
from rehyat_jax.weights.opening import open_tensors
from rehyat_jax.weights.registry import Component, holdings

_LONGEST_WORDS = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraInfo:
    """A LoRA on disk."""

    file: Path
    dialect: str
    #: The different ranks, largest first, and how many modules have a pair.
    ranks: tuple[int, ...]
    pairs: int
    #: Tensors that are added as they are.
    differences: int
    parameters: int
    #: alpha / rank where it is one number for all.
    alpha: str
    #: A published size; None: of none.
    fits: str | None
    #: Of the first module's weight.
    shape: tuple[int, ...]
    trigger: str | None

    def __str__(self) -> str:
        ranks = ", ".join(map(str, self.ranks[:6])) + (", …" if len(self.ranks) > 6 else "")
        more = f", and {self.differences} differences" if self.differences else ""
        fits = self.fits or f"no published size; its first module's weight is {list(self.shape)}"
        lines = [
            str(self.file),
            f"lora: {self.dialect}",
            f"  pairs       {self.pairs} of rank {ranks or 'none'}{more}",
            f"  parameters  {self.parameters:,}",
            f"  alpha       {self.alpha}",
            f"  fits        {fits}",
            *([f"  trigger     {self.trigger}"] if self.trigger else []),
        ]
        return "\n".join(lines)


def holds_lora(path: Path) -> bool:
    """Is there a LoRA at this path, and no network? What cannot be read is none; whoever opens it says why."""
    try:
        if path.is_dir():
            if (path / INDEX).is_file() or ((path / "config.json").is_file() and not (path / ADAPTER_CONFIG).is_file()):
                return False
            path = located(path)[0]
        if not path.is_file():
            return False
        names = open_tensors(path).infos
        return is_lora(names) and not holdings(names)
    except (CheckpointError, OSError, ValueError):
        return False


def describe_lora(file: LoraFile, component: Component) -> LoraInfo:
    """No tensor is read for it."""
    pairs = [part for part in file.parts if "down" in part.names]
    kinds = [(part, kind) for part in file.parts for kind in part.names]
    differences = [kind for _, kind in kinds if kind.startswith("diff")]
    shapes = (changed_shape(file, part, kind) for part, kind in kinds)
    infos = file.tensors.infos
    return LoraInfo(
        file=file.path,
        dialect=file.dialect,
        ranks=file.ranks,
        pairs=len(pairs),
        differences=len(differences),
        parameters=sum(infos[name].size for part in file.parts for kind, name in part.names.items() if kind != "alpha"),
        alpha=_alpha(file),
        fits=fitting(file, component),
        shape=next((shape for shape in shapes if shape is not None), ()),
        trigger=shown(file.trigger),
    )


def _alpha(file: LoraFile) -> str:
    """In words; no tensor is read for it."""
    if any("alpha" in part.names for part in file.parts):
        return "a number for each module, in the file"
    if (alpha := file.config.get("lora_alpha")) is None:
        return "none: as it is"
    return f"{alpha:g}" + (", over the rank's root" if file.config.get("use_rslora") else "")


def shown(text: str | None) -> str | None:
    """A stranger's words for a terminal."""
    return None if text is None else "".join(c if c.isprintable() else " " for c in text[:_LONGEST_WORDS])

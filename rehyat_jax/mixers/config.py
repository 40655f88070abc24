"""Which blocks of a Wan transformer attend as hybrids, and how: a frozen dataclass, to and from ``rehyat/config.json``.

Sources: ReHyAt (arXiv 2601.04342) for the hybrid; Attention Surgery (arXiv 2509.24899) for the uniform choice of
blocks. Defaults are ReHyAt's best published setting where it has one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, Literal, get_args

from rehyat_jax.errors import ConfigError

Kind = Literal["hybrid", "window", "linear"]
Stabilizer = Literal["row_max", "lse", "none"]
Activation = Literal["gelu", "silu", "relu"]
Positive = Literal["softplus", "exp", "none"]
Implementation = Literal["auto", "reference", "scan", "pallas"]

#: More than any model or video has; small enough that products of them stay meaningful.
_MOST_FRAMES = 1 << 16
_MOST_BLOCKS = 1 << 12
_CHOICES = {
    "kind": Kind,
    "stabilizer": Stabilizer,
    "activation": Activation,
    "positive": Positive,
    "implementation": Implementation,
}
#: Least and most.
_RANGES = {
    "chunk_frames": (1, _MOST_FRAMES),
    "overlap_frames": (0, _MOST_FRAMES),
    "sink_frames": (0, _MOST_FRAMES),
    "degree": (1, 8),
    "layers": (1, 8),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridConfig:
    """How the converted blocks' self-attention works; the other blocks keep full softmax attention.

    A frame is a frame of the transformer's grid: a latent frame, since every Wan has patches of one frame.
    """

    #: Frames of a chunk: those that attend to each other by softmax. At least the video's: the block is the teacher's.
    chunk_frames: int = 3
    #: Frames before the chunk that its queries see by softmax too.
    overlap_frames: int = 1
    #: Converted blocks, by index, ascending.
    blocks: Literal["all"] | tuple[int, ...] = "all"
    #: ``window`` drops everything outside the softmax window (and the sinks), ``linear`` has no softmax at all.
    kind: Kind = "hybrid"
    #: First frames of the video that a ``window`` always sees (LongLive, StreamingLLM).
    sink_frames: int = 0
    #: False: the linear part sees the frames after the window as well. Such a model cannot stream.
    causal: bool = True
    stabilizer: Stabilizer = "row_max"
    #: φ's highest power; it makes ``degree × head_dim`` features.
    degree: int = 2
    #: φ's linear layers.
    layers: int = 2
    #: φ's non-linearity between layers.
    activation: Activation = "gelu"
    #: What keeps φ's output positive before the powers.
    positive: Positive = "softplus"
    #: The state fades by a learned factor a head, 1 at the start.
    decay: bool = False
    #: The past's weight falls by a learned power a head, 0 at the start, of how many chunks long it is.
    length_norm: bool = False
    #: How it is computed, not what: not written to files.
    implementation: Implementation = "auto"

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if not _is_whole(value, least, most):
                raise ConfigError(f"HybridConfig.{name} must be a whole number from {least} to {most}, not {value!r}")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in get_args(choices) or not isinstance(value, str):
                raise ConfigError(f"HybridConfig.{name} must be one of {get_args(choices)}, not {value!r}")
        for name in ("causal", "decay", "length_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"HybridConfig.{name} must be true or false, not {getattr(self, name)!r}")
        self._check_blocks()
        if self.length_norm and (self.kind != "hybrid" or not self.causal):
            raise ConfigError(
                "HybridConfig.length_norm is for causal blocks of kind 'hybrid': others weigh no past against a window"
            )
        if self.sink_frames and self.kind != "window":
            raise ConfigError(f"HybridConfig.sink_frames is for kind 'window', and the kind is {self.kind!r}")
        if self.kind == "window" and not self.causal:
            raise ConfigError("HybridConfig.causal is for linear parts, and a window has none: leave it true")
        if self.decay and (self.kind == "window" or not self.causal):
            raise ConfigError(
                "HybridConfig.decay is for causal blocks of kind 'hybrid' or 'linear': no others have a state to fade"
            )

    def _check_blocks(self) -> None:
        blocks = self.blocks
        if blocks == "all":
            return
        if not isinstance(blocks, tuple) or not all(_is_whole(block, 0, _MOST_BLOCKS) for block in blocks):
            raise ConfigError(
                f"HybridConfig.blocks must be 'all' or whole numbers up to {_MOST_BLOCKS}, not {blocks!r}"
            )
        if not blocks or any(later <= earlier for earlier, later in itertools.pairwise(blocks)):
            raise ConfigError(f"HybridConfig.blocks must be ascending, without repeats and not empty, not {blocks!r}")

    @classmethod
    def uniform(cls, *, every: int, num_layers: int, **options: Any) -> HybridConfig:
        """Attention Surgery's choice: block i keeps softmax where ``i mod every = 0``, the others are converted."""
        if not _is_whole(every, 2, _MOST_BLOCKS):
            raise ConfigError(f"every must be a whole number from 2 to {_MOST_BLOCKS}, not {every!r}")
        return cls(blocks=tuple(i for i in range(num_layers) if i % every), **options)

    def converted(self, num_layers: int) -> tuple[bool, ...]:
        """Per block of a model of this depth: is it converted?

        Raises:
            ConfigError: a block is named that the model does not have.
        """
        if self.blocks == "all":
            return (True,) * num_layers
        if self.blocks[-1] >= num_layers:
            raise ConfigError(f"HybridConfig.blocks names block {self.blocks[-1]} of a model of {num_layers} blocks")
        return tuple(i in self.blocks for i in range(num_layers))

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> HybridConfig:
        """From ``rehyat/config.json``.

        Raises:
            ConfigError: a value is impossible or a name unknown.
        """
        known = {field.name for field in dataclasses.fields(cls)} - {"implementation"}
        if unknown := sorted(set(source) - known):
            raise ConfigError(f"HybridConfig has no {str(unknown[0])[:80]!r}; it has {', '.join(sorted(known))}")
        values = dict(source)
        if isinstance(values.get("blocks"), list):
            values["blocks"] = tuple(values["blocks"])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All but ``implementation``."""
        values = dataclasses.asdict(self)
        del values["implementation"]
        return values | {"blocks": self.blocks if self.blocks == "all" else list(self.blocks)}


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

"""Which mixer each block of a transformer has: to and from ``rehyat/config.json``.

Two forms. `HybridConfig`: some blocks by one mixer, the others as the teacher has them; a flat file, which every
version reads. `BlockMixers`: any mixer for any block; a file with a version, of mixers by name and a number a block.

Sources: ReHyAt (arXiv 2601.04342) for the hybrid; Attention Surgery (arXiv 2509.24899) for the uniform choice of
blocks and for mixers that differ. Defaults are ReHyAt's best published setting where it has one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any, Literal

from pallas_kernels.options import Positive, Stabilizer
from rehyat_jax.attention.api import Implementation
from rehyat_jax.attention.features import Activation
from rehyat_jax.errors import ConfigError
from rehyat_jax.mixers import hybrid, linear, softmax, window  # noqa: F401  each registers its mixer
from rehyat_jax.mixers.base import (
    MOST_FRAMES,
    MixerConfig,
    check_fields,
    is_whole,
    mixer_named,
    read_mixer,
    unwritten,
    whole,
)

#: The mixers that `HybridConfig` can name.
Kind = Literal["hybrid", "window", "linear"]

#: More than any model has.
_MOST_BLOCKS = 1 << 12
#: Of files that say a mixer for each block; files of one mixer alone have none.
_VERSION = 2


class Conversion:
    """How a teacher's blocks are converted: the base of `HybridConfig` and `BlockMixers`."""

    @property
    def chunk_frames(self) -> int:
        """Frames that are whole chunks of every converted block: the least of them."""
        return math.lcm(*(mixer.chunk_frames for mixer in self.distinct()))

    def distinct(self) -> tuple[MixerConfig, ...]:
        """The mixers of converted blocks, each once."""
        raise NotImplementedError

    def mixers(self, num_layers: int) -> tuple[MixerConfig, ...]:
        """Each block's, of a model of this depth.

        Raises:
            ConfigError: a block is named that the model does not have.
        """
        raise NotImplementedError

    def converted(self, num_layers: int) -> tuple[bool, ...]:
        """For each block of a model of this depth: is it converted? Errors as of `mixers`."""
        return tuple(mixer.converts for mixer in self.mixers(num_layers))

    def only(self, blocks: tuple[int, ...]) -> Conversion:
        """The same with no other blocks converted than these, which are ascending."""
        raise NotImplementedError

    def implemented(self, by: Literal["reference", "scan", "pallas"]) -> Conversion:
        """The same computed by a named implementation, where that had been left to ``"auto"``."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """For ``rehyat/config.json``: all but the implementation."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridConfig(Conversion):
    """How the converted blocks' self-attention works; the other blocks keep full softmax attention.

    A frame is a frame of the transformer's grid: a latent frame, since every Wan has patches of one frame.
    """

    #: Frames of a chunk: those that attend to each other by softmax. At least the video's: the block is the teacher's.
    chunk_frames: int = whole(3, 1, MOST_FRAMES)
    #: Frames before the chunk that its queries see by softmax too.
    overlap_frames: int = whole(1, 0, MOST_FRAMES)
    #: Converted blocks, by index, ascending.
    blocks: Literal["all"] | tuple[int, ...] = "all"
    #: ``window`` drops everything outside the softmax window (and the sinks), ``linear`` has no softmax at all.
    kind: Kind = "hybrid"
    #: First frames of the video that a ``window`` always sees (LongLive, StreamingLLM).
    sink_frames: int = whole(0, 0, MOST_FRAMES)
    #: False: the linear part sees the frames after the window as well. Such a model cannot stream.
    causal: bool = True
    stabilizer: Stabilizer = "row_max"
    #: φ's highest power; it makes ``degree × head_dim`` features.
    degree: int = whole(2, 1, 8)
    #: φ's linear layers.
    layers: int = whole(2, 1, 8)
    #: φ's non-linearity between layers.
    activation: Activation = "gelu"
    #: What keeps φ's output positive before the powers.
    positive: Positive = "softplus"
    #: The state fades by a learned factor a head, 1 at the start.
    decay: bool = False
    #: The past's weight falls by a learned power a head, 0 at the start, of how many chunks long it is.
    length_norm: bool = False
    #: How it is computed, not what: not written to files.
    implementation: Implementation = unwritten("auto")

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_blocks()
        used = mixer_named(self.kind).fields()
        for name, without in {"sink_frames": 0, "causal": True, "decay": False, "length_norm": False}.items():
            if name not in used and getattr(self, name) != without:
                raise ConfigError(
                    f"HybridConfig.{name} must be {without!r} for kind {self.kind!r}, whose blocks have no use for it"
                )
        _ = self.mixer

    @property
    def mixer(self) -> MixerConfig:
        """The mixer of the converted blocks."""
        kind = mixer_named(self.kind)
        return kind(**{name: getattr(self, name) for name in kind.fields()})

    def _check_blocks(self) -> None:
        blocks = self.blocks
        if blocks == "all":
            return
        if not isinstance(blocks, tuple) or not all(is_whole(block, 0, _MOST_BLOCKS) for block in blocks):
            raise ConfigError(
                f"HybridConfig.blocks must be 'all' or whole numbers up to {_MOST_BLOCKS}, not {blocks!r}"
            )
        if not blocks or any(later <= earlier for earlier, later in itertools.pairwise(blocks)):
            raise ConfigError(f"HybridConfig.blocks must be ascending, without repeats and not empty, not {blocks!r}")

    @classmethod
    def uniform(cls, *, every: int, num_layers: int, **options: Any) -> HybridConfig:
        """Attention Surgery's choice: block i keeps softmax where ``i mod every = 0``, the others are converted."""
        if not is_whole(every, 2, _MOST_BLOCKS):
            raise ConfigError(f"every must be a whole number from 2 to {_MOST_BLOCKS}, not {every!r}")
        return cls(blocks=tuple(i for i in range(num_layers) if i % every), **options)

    def distinct(self) -> tuple[MixerConfig, ...]:
        return (self.mixer,)

    def mixers(self, num_layers: int) -> tuple[MixerConfig, ...]:
        mixer, kept = self.mixer, softmax.Softmax()
        if self.blocks == "all":
            return (mixer,) * num_layers
        if self.blocks[-1] >= num_layers:
            raise ConfigError(f"HybridConfig.blocks names block {self.blocks[-1]} of a model of {num_layers} blocks")
        return tuple(mixer if i in self.blocks else kept for i in range(num_layers))

    def only(self, blocks: tuple[int, ...]) -> HybridConfig:
        return dataclasses.replace(self, blocks=blocks)

    def implemented(self, by: Literal["reference", "scan", "pallas"]) -> HybridConfig:
        return dataclasses.replace(self, implementation=by) if self.implementation == "auto" else self

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> HybridConfig:
        """From a flat ``rehyat/config.json``.

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
        values = dataclasses.asdict(self)
        del values["implementation"]
        return values | {"blocks": self.blocks if self.blocks == "all" else list(self.blocks)}


@dataclasses.dataclass(frozen=True)
class BlockMixers(Conversion):
    """A mixer for each block of a model, in order; `Softmax` where a block stays the teacher's."""

    blocks: tuple[MixerConfig, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, tuple) or not all(isinstance(block, MixerConfig) for block in self.blocks):
            raise ConfigError("BlockMixers takes a tuple of mixers' configurations, one for each block of the model")
        if not any(block.converts for block in self.blocks):
            raise ConfigError("BlockMixers converts no block: a model without a hybrid part is the teacher")

    def distinct(self) -> tuple[MixerConfig, ...]:
        return tuple(dict.fromkeys(block for block in self.blocks if block.converts))

    def mixers(self, num_layers: int) -> tuple[MixerConfig, ...]:
        if num_layers != len(self.blocks):
            raise ConfigError(f"BlockMixers is of {len(self.blocks)} blocks, and the model has {num_layers}")
        return self.blocks

    def only(self, blocks: tuple[int, ...]) -> BlockMixers:
        return BlockMixers(tuple(mixer if i in blocks else softmax.Softmax() for i, mixer in enumerate(self.blocks)))

    def implemented(self, by: Literal["reference", "scan", "pallas"]) -> BlockMixers:
        return BlockMixers(tuple(block.implemented(by) for block in self.blocks))

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> BlockMixers:
        """From a ``rehyat/config.json`` that has a version.

        Raises:
            ConfigError: of a later version, a mixer is unknown or impossible, or an entry is missing or unknown.
        """
        version = source.get("version")
        if not is_whole(version, _VERSION, _VERSION):
            raise ConfigError(
                f"a hybrid configuration of version {str(version)[:80]} is not known here: {_VERSION}, or none, are"
            )
        if sorted(source) != ["blocks", "mixers", "version"]:
            raise ConfigError("a hybrid configuration of version 2 has version, mixers and blocks, and nothing else")
        mixers, blocks = source["mixers"], source["blocks"]
        if not isinstance(mixers, list) or not isinstance(blocks, list) or len(blocks) > _MOST_BLOCKS:
            raise ConfigError(f"mixers and blocks of a hybrid configuration must be lists, of {_MOST_BLOCKS} at most")
        if not all(is_whole(block, 0, len(mixers) - 1) for block in blocks):
            raise ConfigError(f"blocks of a hybrid configuration must be numbers of its {len(mixers)} mixers")
        read = [read_mixer(mixer) for mixer in mixers]
        return cls(tuple(read[block] for block in blocks))

    def to_dict(self) -> dict[str, Any]:
        mixers = list(dict.fromkeys(self.blocks))
        return {
            "version": _VERSION,
            "mixers": [mixer.to_dict() for mixer in mixers],
            "blocks": [mixers.index(block) for block in self.blocks],
        }


def read_conversion(source: Mapping[str, Any]) -> Conversion:
    """From a ``rehyat/config.json`` of either form.

    Raises:
        ConfigError: a value is impossible, or a name or the version unknown.
    """
    return BlockMixers.from_dict(source) if "version" in source else HybridConfig.from_dict(source)

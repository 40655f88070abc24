"""Sizes of TAEHV's decoders."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from rehyat_jax.errors import ConfigError
from rehyat_jax.models.checks import check_understood, check_whole_numbers, entries, is_whole

#: What a ``config.json`` of this program calls it; the published files have none.
CLASS_NAME = "TAEHV"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyDecoderConfig:
    """A TAEHV decoder. Defaults are ``taew2_1``'s."""

    #: Channels of the latents.
    z_dim: int = 16
    #: Of each level before it doubles height and width, and after the last one.
    widths: tuple[int, ...] = (256, 128, 64, 64)
    #: Frames that each level makes of one.
    times: tuple[int, ...] = (1, 2, 2)
    #: Pixels that are folded into channels after the last layer, along each side.
    patch_size: int = 1

    def __post_init__(self) -> None:
        check_whole_numbers(self, "z_dim", "patch_size")
        if self.patch_size > 16:
            raise ConfigError(f"TinyDecoderConfig.patch_size must be at most 16, not {self.patch_size}")
        for name, count, most in (("widths", 4, 1 << 14), ("times", 3, 4)):
            values = getattr(self, name)
            if len(values) != count or not all(is_whole(value, most) for value in values):
                raise ConfigError(f"TinyDecoderConfig.{name} must be {count} numbers from 1 to {most}, not {values!r}")

    @property
    def spatial_factor(self) -> int:
        """Pixels a latent pixel stands for, along each side."""
        return self.patch_size * 2 ** len(self.times)

    @property
    def temporal_factor(self) -> int:
        """Frames a latent frame stands for (the first stands for one)."""
        return math.prod(self.times)

    @classmethod
    def wan22(cls) -> TinyDecoderConfig:
        """``taew2_2``'s, of the latents of Wan2.2's 5B."""
        return cls(z_dim=48, patch_size=2)

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> TinyDecoderConfig:
        """From what `to_dict` gives.

        Raises:
            ConfigError: a value is impossible, or the file describes another network.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        check_understood("TAEHV configuration", source, known=known, required={})
        values = {name: value for name, value in source.items() if name in known}
        return cls(**values | {name: entries(name, values[name]) for name in ("widths", "times") if name in values})

    def to_dict(self) -> dict[str, Any]:
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return {"_class_name": CLASS_NAME, **values}

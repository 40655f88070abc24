"""What configurations check of themselves when made, so that a hostile file fails before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rehyat_jax.errors import ConfigError

#: No field may exceed this: large enough for any model to come, small enough that products stay meaningful.
LARGEST = 1 << 24


def is_whole(value: Any, largest: int) -> bool:
    """A number from 1 to ``largest``; True is not one."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= largest


def check_whole_numbers(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not is_whole(value, LARGEST):
            field = f"{type(config).__name__}.{name}"
            raise ConfigError(f"{field} must be a whole number from 1 to {LARGEST}, not {value!r}")


def check_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{type(config).__name__}.{name} must be a positive number, not {value!r}")


def check_fixed(kind: str, source: Mapping[str, Any], **required: Any) -> None:
    """Refuse a file that asks for a variant of the architecture which this one is not."""
    for name, value in required.items():
        if name in source and source[name] != value:
            raise ConfigError(f"{kind}: {name} = {source[name]!r} is not supported (only {value!r})")


def entries(name: str, value: Any) -> tuple:
    if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= 64:
        raise ConfigError(f"{name} must be a list of 1 to 64 entries, not {value!r}")
    return tuple(value)

"""What configurations check of themselves when made, so that a hostile file fails before anything is allocated."""

from __future__ import annotations

import math
import warnings
from collections.abc import Container, Mapping
from typing import Any

from rehyat_jax.errors import ConfigError

#: Marks a configuration's field that an earlier version did not have, whose default is what that version did.
LATER = "later"

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


def check_understood(
    kind: str, source: Mapping[str, Any], *, known: Container[str], required: Mapping[str, Any]
) -> None:
    """One set of checks of a file that says what a network is, whoever wrote it.

    What this program has one form of must say that form. What it does not know may make another network of the same
    tensors, and is warned of by name, unless it says that something is off (null, false, empty) or begins with an
    underscore (the writer's own notes).

    Raises:
        ConfigError: the file asks for a variant of the architecture which this one is not.
    """
    for name, value in required.items():
        if name in source and _plain(source[name]) != value:
            raise ConfigError(f"{kind}: {name} = {_short(source[name])} is not supported (only {value!r})")
    for name, value in source.items():
        off = value is None or value is False or value in ([], {}, "", ())
        if name not in known and name not in required and not name.startswith("_") and not off:
            warnings.warn(
                f"{kind}: {name[:80]} = {_short(value)} is nothing that this program knows, and is not heeded: it may "
                "be another network of the same tensors",
                stacklevel=3,
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def entries(name: str, value: Any) -> tuple:
    if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= 64:
        raise ConfigError(f"{name} must be a list of 1 to 64 entries, not {value!r}")
    return tuple(value)

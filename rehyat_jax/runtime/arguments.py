"""Arguments of every door: what was given, under which name, and what is accepted, in one sentence."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rehyat_jax.errors import RehyatError

#: JAX makes a key of 32 bits of a seed, unless it is told to compute with 64.
LARGEST_SEED = (1 << 32) - 1
#: More of what was given is no help.
_SHOWN = 80


def wrong(name: str, value: object, accepted: str) -> RehyatError:
    """The one sentence of an argument error."""
    shown = repr(value)
    return RehyatError(f"{name} must be {accepted}, not {shown if len(shown) <= _SHOWN else shown[:_SHOWN] + '…'}")


def whole_number(name: str, value: object, *, least: int | None = None, most: int | None = None) -> int:
    """A whole number of any library's type, as Python's.

    Raises:
        RehyatError: it is none (True is none, 5.0 is none), or out of range.
    """
    accepted = "a whole number" + _range(least, most)
    if isinstance(value, bool | np.bool_):
        raise wrong(name, value, accepted)
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise wrong(name, value, accepted) from None
    if (least is not None and number < least) or (most is not None and number > most):
        raise wrong(name, number, accepted)
    return number


def number(name: str, value: object, *, least: float | int | None = None, most: float | int | None = None) -> float:
    """A finite number of any library's type, as Python's float.

    Raises:
        RehyatError: it is none (a text is none), is not finite, or out of range.
    """
    accepted = "a finite number" + _range(least, most)
    if isinstance(value, bool | np.bool_ | str | bytes):
        raise wrong(name, value, accepted)
    try:
        result = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise wrong(name, value, accepted) from None
    if not math.isfinite(result) or (least is not None and result < least) or (most is not None and result > most):
        raise wrong(name, result, accepted)
    return result


def seed_number(value: object, *, count: int = 1) -> int:
    """The seed of the first of ``count`` videos.

    Raises:
        RehyatError: it, or that of the last video, is out of range.
    """
    return whole_number("seed", value, least=0, most=LARGEST_SEED + 1 - count)


def text(name: str, value: object) -> str:
    """
    Raises:
        RehyatError: it is no text.
    """
    if not isinstance(value, str):
        raise wrong(name, value, "a text")
    return value


def texts(name: str, value: object) -> list[str]:
    """A text, or a list of texts that is not empty, as a list.

    Raises:
        RehyatError: it is neither.
    """
    if isinstance(value, str):
        return [value]
    if isinstance(value, Sequence | np.ndarray) and len(value) and all(isinstance(each, str) for each in value):
        return [str(each) for each in value]
    raise wrong(name, value, "a text or a list of texts that is not empty")


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """
    Raises:
        RehyatError: it is none of them.
    """
    if not isinstance(value, str) or value not in choices:
        raise wrong(name, value, " or ".join(choices))
    return value


def float_dtype(name: str, value: Any, choices: Sequence[str] = ("float32", "bfloat16")) -> np.dtype:
    """A number format by name or as NumPy's and JAX's types.

    Raises:
        RehyatError: it is none of ``choices``.
    """
    import jax.numpy as jnp  # registers bfloat16

    accepted = " or ".join(choices)
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        raise wrong(name, value, accepted) from None
    if value is None or dtype.name not in choices:
        raise wrong(name, value, accepted)
    return dtype


def user_path(name: str, value: object) -> Path:
    """A path as people write it: ``~`` is their home.

    Raises:
        RehyatError: it is no path.
    """
    if not isinstance(value, str | os.PathLike):
        raise wrong(name, value, "a path")
    try:
        return Path(os.fsdecode(value)).expanduser()
    except RuntimeError:  # there is no such home
        return Path(os.fsdecode(value))


def _range(least: float | int | None, most: float | int | None) -> str:
    if least is not None and most is not None:
        return f" from {least} to {most}"
    if least is not None:
        return f" of {least} or more"
    return "" if most is None else f" of {most} or less"

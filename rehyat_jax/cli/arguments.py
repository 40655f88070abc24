"""A command's arguments from a dataclass, with a help that says of a default only what there is to say."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import tyro

from rehyat_jax.errors import RehyatError

Options = TypeVar("Options")


def parse_options(options: type[Options], argv: Sequence[str], *, command: str) -> Options:
    """The command line of ``rehyat COMMAND`` as its dataclass.

    Raises:
        SystemExit: help was asked for (0), or an argument is unknown, missing or of another kind (2); all is said.
    """
    hide_missing_defaults(options)
    return tyro.cli(options, args=argv, prog=f"rehyat {command}")


def hide_missing_defaults(options: type) -> None:
    """Have tyro's help of a dataclass, and of those in it, leave out "(default: None)"."""
    if not dataclasses.is_dataclass(options) or "_defaults_hidden" in vars(options):
        return
    options._defaults_hidden = True  # type: ignore[attr-defined]
    hints = typing.get_type_hints(options, include_extras=True)
    for name, hint in hints.items():
        if name in vars(options).get("__annotations__", {}):
            options.__annotations__[name] = Annotated[hint, tyro.conf.arg(help_behavior_hint=_told)]
        for inner in _classes(hint):
            hide_missing_defaults(inner)


def _told(default: str) -> str:
    return "" if default in ("None", "False", "''", "") else f"(default: {default})"


def _classes(hint: Any) -> list[type]:
    if isinstance(hint, type) and not typing.get_args(hint):
        return [hint]
    return [found for part in typing.get_args(hint) for found in _classes(part)]


def parse_steps(text: str | None) -> int | Literal["auto"] | None:
    """Of ``--steps``.

    Raises:
        RehyatError: it is neither a whole number nor auto.
    """
    if text is None or text == "auto":
        return text  # type: ignore[return-value]
    if not re.fullmatch(r"0*[1-9]\d{0,6}", text, flags=re.ASCII):
        raise RehyatError(f"--steps must be a whole number above 0 or auto, not {text[:80]!r}")
    return int(text)

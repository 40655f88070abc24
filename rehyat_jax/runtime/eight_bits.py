"""Which matrices of a network are kept in eight bits, and in which of them products are made in eight bits too."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal, get_args

from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.runtime.arguments import choice, wrong

#: "int8": weights and the transformer's products; "int8-weights" and "fp8": weights alone.
Kind = Literal["fp8", "int8", "int8-weights"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclasses.dataclass(frozen=True)
class EightBits:
    """How the matrices of a network's blocks are kept.

    Args:
        kind: "int8": in int8 with a scale for each output; the transformer's products are made in int8 as well, each
            token's activations rounded with a scale of their own, sums in int32. "int8-weights" and "fp8": products are
            made in the model's own type.
        leave_out: layers of the transformer's blocks that stay as they are, in every block: "ffn.down", or all of
            "attn2".

    Raises:
        RehyatError: an argument is none of these.
    """

    kind: Kind
    leave_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        choice("quantize", self.kind, KINDS)
        if not isinstance(self.leave_out, tuple) or not all(isinstance(name, str) for name in self.leave_out):
            raise wrong("leave_out", self.leave_out, "a tuple of layers' names")

    @property
    def file_kind(self) -> Literal["fp8", "int8"]:
        return "fp8" if self.kind == "fp8" else "int8"

    @property
    def keeps_files(self) -> bool:
        """Whether a file's own eight bits stay as they are."""
        return self.kind == "fp8"

    @property
    def rounds_inputs(self) -> bool:
        """Whether activations are rounded as well, and products made in eight bits."""
        return self.kind == "int8"

    @property
    def of_text(self) -> EightBits:
        """Of a text encoder, whose activations have outliers and whose time is short: weights alone."""
        return EightBits("fp8" if self.kind == "fp8" else "int8-weights")

    def leaves_out(self, path: str) -> bool:
        """Whether a layer at this dotted path, or its kernel, stays as it is."""
        inside = path.partition(".")[2]
        return any(inside == name or inside.startswith(f"{name}.") for name in self.leave_out)

    def check(self, paths: Iterable[str]) -> None:
        """
        Args:
            paths: of all layers of blocks.

        Raises:
            ConfigError: a layer that is to be left out is none of them.
        """
        known = sorted(path.partition(".")[2] for path in paths)
        for name in self.leave_out:
            if not any(each == name or each.startswith(f"{name}.") for each in known):
                raise ConfigError(f"there is no layer {name!r} in a block to leave out: there are {', '.join(known)}")


def eight_bits_of(quantize: Any) -> EightBits | None:
    """
    Raises:
        RehyatError: it is neither the name of eight bits, an `EightBits` nor None.
    """
    return quantize if quantize is None or isinstance(quantize, EightBits) else EightBits(quantize)


def named(kind: Kind | None, leave_out: tuple[str, ...]) -> EightBits | None:
    """Of a command's two options.

    Raises:
        RehyatError: layers are to be left out of nothing.
    """
    if kind is None and leave_out:
        raise RehyatError("--quantize-except leaves layers out of --quantize, which is not given")
    return None if kind is None else EightBits(kind, leave_out)

"""Tables of block sizes beside each platform's kernels: by device, kernel, dtype and widths; defaults for the rest."""

from __future__ import annotations

import functools
import json
import pathlib
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

#: Kernel, device kind, dtype, and the kernel's widths in their order.
Key = tuple[str | int, ...]


class Table:
    """A JSON list of entries, each a kernel's dataclass by name, ``jax.Device.device_kind``, a dtype, the widths that
    blocks depend on, and ``blocks``: sizes by the names of the dataclass' fields.

    Device kinds are compared as they are: a chip that JAX knows by two names has two entries.
    """

    def __init__(self, path: pathlib.Path, kernels: Mapping[type, Sequence[str]]) -> None:
        """``kernels``: those that the table may hold, and the names of the widths of their entries."""
        self.path, self.kernels = path, kernels

    def at(self, path: pathlib.Path) -> Table:
        """Another file for the same kernels."""
        return Table(path, self.kernels)

    def key(self, kernels: type, device_kind: str, dtype: Any, **widths: int) -> Key:
        """Of an entry; widths that it does not depend on are left out."""
        return (kernels.__name__, device_kind, jnp.dtype(dtype).name, *(widths[x] for x in self.kernels[kernels]))

    def blocks(self, kernels: type, device_kind: str, dtype: Any, **widths: int) -> dict[str, Any]:
        """Keyword arguments for ``kernels``; none outside the table."""
        return dict(self.entries.get(self.key(kernels, device_kind, dtype, **widths), {}))

    @functools.cached_property
    def entries(self) -> dict[Key, dict[str, int]]:
        """All of the file, read once.

        Raises:
            ValueError: it is not such a table; says where.
        """
        try:
            listed = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.path} is not JSON: {error}") from error
        if not isinstance(listed, list):
            raise ValueError(f"{self.path} is not a list of entries")
        found: dict[Key, dict[str, int]] = {}
        for place, entry in enumerate(listed, 1):
            try:
                key = self._checked(entry)
                if key in found:
                    raise ValueError("is there twice")
            except ValueError as error:
                raise ValueError(f"{self.path}: entry {place} {error}: {json.dumps(entry)}") from None
            found[key] = entry["blocks"]
        return found

    def text(self) -> str:
        """The file of ``entries``, one a line, in order."""
        names = {kernels.__name__: (*_NAMES, *widths) for kernels, widths in self.kernels.items()}
        ordered = sorted(self.entries.items(), key=lambda each: [str(x) for x in each[0]])
        lines = [json.dumps({**dict(zip(names[str(key[0])], key, strict=True)), "blocks": x}) for key, x in ordered]
        return "[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n"

    def _checked(self, entry: Any) -> Key:
        if not isinstance(entry, dict):
            raise ValueError("is not an object")
        named = {kernels.__name__: kernels for kernels in self.kernels}
        if not isinstance(name := entry.get("kernel"), str) or name not in named:
            raise ValueError(f"is of no kernel of {', '.join(named)}")
        kernels = named[name]
        widths = self.kernels[kernels]
        if entry.keys() != {*_NAMES, *widths, "blocks"}:
            raise ValueError(f"must have {', '.join((*_NAMES, *widths))} and blocks, and nothing else")
        if not isinstance(entry["device_kind"], str) or not all(_is_size(entry[width]) for width in widths):
            raise ValueError("must name a device kind, and widths that are positive integers")
        try:
            dtype = jnp.dtype(entry["dtype"]).name
        except TypeError:
            dtype = None
        if dtype is None or entry["dtype"] != dtype:
            raise ValueError("has a dtype that there is not")
        hints = typing.get_type_hints(kernels)
        sizes = [field for field, hint in hints.items() if hint in (int, int | None)]
        if not isinstance(entry["blocks"], dict) or not entry["blocks"] or not entry["blocks"].keys() <= set(sizes):
            raise ValueError(f"must have blocks of {', '.join(sizes)}, and no others")
        if not all(map(_is_size, entry["blocks"].values())):
            raise ValueError("has a block that is not a positive integer")
        return self.key(kernels, entry["device_kind"], dtype, **{width: entry[width] for width in widths})


_NAMES = ("kernel", "device_kind", "dtype")


def _is_size(x: Any) -> bool:
    return type(x) is int and x > 0

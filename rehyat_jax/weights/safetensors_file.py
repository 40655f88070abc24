"""One safetensors file (https://huggingface.co/docs/safetensors: its layout and its rules)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rehyat_jax.errors import CheckpointError
from rehyat_jax.weights.files import KINDS, READABLE, CheckedFile, TensorInfo, TensorSource, parse_object

#: The format's own limit; Wan's largest header is a fifth of a megabyte.
_LARGEST_HEADER = 100_000_000


class SafetensorsFile(TensorSource):
    """One safetensors file whose header was checked."""

    def __init__(self, path: Path) -> None:
        self._file, self.files = CheckedFile(path), (path,)
        start = self._file.read(0, 8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > self._file.size - 8:
            raise CheckpointError(f"{path} is truncated or not a safetensors file")
        if length > _LARGEST_HEADER:
            raise CheckpointError(f"{path} has a header of {length} bytes: not a safetensors file")
        header = parse_object(self._file.read(8, length), f"the header of {path}")
        self._start = 8 + length
        words = header.get("__metadata__", {})
        pairs = words.items() if isinstance(words, dict) else ()
        self.metadata = {key: value for key, value in pairs if isinstance(value, str)}
        self.infos, self._offsets = self._checked(header, self._file.size - self._start)

    def _checked(self, header: dict[str, Any], size: int) -> tuple[dict[str, TensorInfo], dict[str, int]]:
        """Tensors and where they begin, once they are known to tile the data exactly."""
        path = self._file.path
        infos: dict[str, TensorInfo] = {}
        spans: list[tuple[int, int, str]] = []
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            match entry:
                case {"dtype": str(kind), "shape": [*shape], "data_offsets": [begin, end]} if all(
                    map(_is_count, (*shape, begin, end))
                ):
                    pass
                case _:
                    raise CheckpointError(f"{path} describes tensor {name!r} in a way that is not safetensors'")
            if kind not in KINDS:
                raise CheckpointError(f"{path}: tensor {name!r} is of type {kind}; {READABLE}")
            # numpy's limit; a fortiori torch's.
            if len(shape) > 32:
                raise CheckpointError(f"{path}: tensor {name!r} has {len(shape)} dimensions")
            infos[name] = TensorInfo(kind, tuple(shape))
            if end - begin != infos[name].nbytes:
                raise CheckpointError(f"{path}: tensor {name!r} of shape {shape} cannot lie in {begin}:{end}")
            spans.append((begin, end, name))
        position = 0
        for begin, end, name in sorted(spans):
            if begin != position:
                raise CheckpointError(f"{path}: tensor {name!r} overlaps another or leaves a gap before it")
            position = end
        if position > size:
            raise CheckpointError(f"{path} is truncated: {position} bytes of tensors announced, {size} there")
        if position < size:
            raise CheckpointError(f"{path} has {size - position} bytes after its last tensor")
        return infos, {name: begin for begin, _, name in spans}

    def pieces(self, name: str, *, rows: int | None = None) -> Iterator[np.ndarray]:
        info = self.infos[name]
        return self._file.pieces(self._start + self._offsets[name], info.dtype, info.shape, rows)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0

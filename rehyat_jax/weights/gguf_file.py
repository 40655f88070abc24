"""One GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), dequantised by the ``gguf`` package.

The header is read here: the package's own reader goes on for ever over a count that the file cannot hold.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rehyat_jax.errors import CheckpointError
from rehyat_jax.weights.files import DTYPES, CheckedFile, TensorInfo, TensorSource

#: Of a tensor that GGUF cannot shape: it has four dimensions at most.
_SHAPE = "comfy.gguf.orig_shape."
_PIECE_BYTES = 1 << 21
#: A text encoder's has its vocabulary: some megabytes.
_LARGEST_HEADER = 1 << 27
#: Types of entries; others than these are texts and arrays.
_SIZES = dict(enumerate(map(np.dtype, ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?")))) | {
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_TEXT, _ARRAY = 8, 9


class _Header:
    """What stands before the numbers; nothing is believed that the file has no bytes for."""

    def __init__(self, file: CheckedFile) -> None:
        self._path, self._data, self._at = file.path, file.read(0, _LARGEST_HEADER), 4
        version, tensors, entries = self._number("<I"), self._number("<Q"), self._number("<Q")
        if version not in (2, 3):
            raise CheckpointError(f"{self._path} is a GGUF file of version {version}; 2 and 3 are read")
        #: Arrays of whole numbers, and single ones, by key.
        self.integers: dict[str, tuple[int, ...]] = {}
        for _ in range(entries):
            self._entry()
        found = []
        for _ in range(tensors):
            name, dimensions = self._text(), self._number("<I")
            if dimensions > 4:
                raise CheckpointError(f"{self._path} is no whole GGUF file: a tensor has {dimensions} dimensions")
            lies = tuple(self._number("<Q") for _ in range(dimensions))[::-1]
            found.append((name, self._number("<I"), self._number("<Q"), lies))
        (alignment,) = self.integers.get("general.alignment", (32,))
        if not 0 < alignment <= 1 << 20:
            raise CheckpointError(f"{self._path} is no whole GGUF file: its alignment is {alignment}")
        start = -(-self._at // alignment) * alignment
        #: Name, type, place in the file, shape.
        self.tensors = [(name, kind, start + offset, lies) for name, kind, offset, lies in found]

    def _entry(self) -> None:
        name, kind, count, one = self._text(), self._number("<I"), 1, True
        if kind == _ARRAY:
            kind, count, one = self._number("<I"), self._number("<Q"), False
        if kind == _TEXT:
            for _ in range(count):
                self._take(self._number("<Q"))
        elif kind not in _SIZES:
            raise CheckpointError(f"{self._path} is no whole GGUF file: an entry is of type {kind}")
        else:
            data = self._take(count * _SIZES[kind].itemsize)
            if _SIZES[kind].kind in "iu" and (one or count <= 8):
                self.integers[name] = tuple(int(x) for x in np.frombuffer(data, _SIZES[kind]))

    def _take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise CheckpointError(f"{self._path} is no whole GGUF file: it ends within its header")
        data = self._data[self._at : self._at + count]
        self._at += count
        return data

    def _number(self, form: str) -> int:
        (value,) = struct.unpack(form, self._take(struct.calcsize(form)))
        return int(value)

    def _text(self) -> str:
        return self._take(self._number("<Q")).decode("utf-8", "replace")


class GGUFFile(TensorSource):
    """The tensors of a GGUF file, dequantised as they are read: exactly what the ``gguf`` package makes of them."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise CheckpointError(f"{path} is a GGUF file: install gguf (pip install gguf) to read it") from error
        self._file, self.files, self._gguf = CheckedFile(path), (path,), gguf
        header = _Header(self._file)
        if not header.tensors:
            raise CheckpointError(f"{path} is a GGUF file without tensors")
        shapes = {
            name.removeprefix(_SHAPE): shape for name, shape in header.integers.items() if name.startswith(_SHAPE)
        }
        self.infos: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[Any, int, tuple[int, ...]]] = {}
        plain = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
        for name, number, offset, lies in header.tensors:
            try:
                kind = gguf.GGMLQuantizationType(number)
            except ValueError as error:
                raise CheckpointError(
                    f"{path}: tensor {name!r} is of a type {number} that gguf does not know"
                ) from error
            shape = shapes.get(name, lies)
            block, size = gguf.GGML_QUANT_SIZES[kind]
            if min(shape, default=1) < 1 or math.prod(shape) != math.prod(lies) or (lies and lies[-1] % block):
                raise CheckpointError(f"{path}: tensor {name!r} of {list(lies)} cannot be {list(shape)}")
            if offset + math.prod(lies) // block * size > self._file.size:
                raise CheckpointError(f"{path} is truncated: tensor {name!r} ends after the file")
            if name in self.infos:
                raise CheckpointError(f"{path} has the tensor {name!r} twice")
            if kind.name not in plain:
                self._check(kind, size)
            stored = None if kind.name in plain else kind.name
            self.infos[name] = TensorInfo(plain.get(kind.name, "F32"), shape, stored)
            self._places[name] = kind, offset, lies

    def _check(self, kind: Any, size: int) -> None:
        try:
            self._gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError as error:
            raise CheckpointError(f"{self._file.path} has tensors in {kind.name}, which gguf does not read") from error

    def pieces(self, name: str, *, rows: int | None = None) -> Iterator[np.ndarray]:
        kind, offset, lies = self._places[name]
        info = self.infos[name]
        if info.stored is None:
            yield from self._file.pieces(offset, DTYPES[info.kind], info.shape, rows)
            return
        block, size = self._gguf.GGML_QUANT_SIZES[kind]
        whole = math.prod(info.shape[1:]) // block * size if lies == info.shape else 0
        if not whole:  # a shape of its own, as a convolution's kernel: small
            flat = math.prod(lies) // block * size
            (data,) = self._file.pieces(offset, np.dtype(np.uint8), (1, flat), 1)
            yield self._gguf.quants.dequantize(data, kind).reshape(info.shape)
            return
        rows = rows or max(_PIECE_BYTES // (whole * 4), 1)
        for data in self._file.pieces(offset, np.dtype(np.uint8), (info.shape[0], whole), rows):
            yield self._gguf.quants.dequantize(data, kind).reshape(len(data), *info.shape[1:])

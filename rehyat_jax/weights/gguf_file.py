"""One GGUF file: its header read by the ``gguf`` package, its numbers in pieces from where they lie."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rehyat_jax.errors import CheckpointError
from rehyat_jax.weights.files import DTYPES, CheckedFile, TensorInfo, TensorSource

#: Of a tensor that GGUF cannot shape: it has four dimensions at most.
_SHAPE = "comfy.gguf.orig_shape."
_PIECE_BYTES = 1 << 21


class GGUFFile(TensorSource):
    """The tensors of a GGUF file, dequantised as they are read: exactly what the ``gguf`` package makes of them."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise CheckpointError(f"{path} is a GGUF file: install gguf (pip install gguf) to read it") from error
        self._file, self.files, self._gguf = CheckedFile(path), (path,), gguf
        try:
            reader = gguf.GGUFReader(path)
            shapes = {
                name.removeprefix(_SHAPE): tuple(int(x) for x in field.contents())
                for name, field in reader.fields.items()
                if name.startswith(_SHAPE)
            }
            found = [
                (str(t.name), t.tensor_type, int(t.data_offset), tuple(int(x) for x in t.shape[::-1]))
                for t in reader.tensors
            ]
        except Exception as error:  # the package raises whatever NumPy does of a damaged or hostile file
            raise CheckpointError(
                f"{path} is no whole GGUF file: {str(error)[:100] or type(error).__name__}"
            ) from error
        self.infos: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[Any, int, tuple[int, ...]]] = {}
        plain = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
        for name, kind, offset, lies in found:
            shape = shapes.get(name, lies)
            block, size = gguf.GGML_QUANT_SIZES[kind]
            if math.prod(shape) != math.prod(lies) or (lies and lies[-1] % block):
                raise CheckpointError(f"{path}: tensor {name!r} of {list(lies)} cannot be {list(shape)}")
            if offset + math.prod(lies) // block * size > self._file.size:
                raise CheckpointError(f"{path} is truncated: tensor {name!r} ends after the file")
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

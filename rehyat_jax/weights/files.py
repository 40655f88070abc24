"""Tensors on disk, whatever the file: what a file says of them, and their numbers in checked pieces.

Everything in a header or an index is checked against the file before it is believed: a hostile or damaged file ends in
a `CheckpointError`, and nothing is allocated on its word. Files are read, not mapped: a file that is cut while it is
mapped ends the process (SIGBUS), and some file systems have no maps at all.
"""

from __future__ import annotations

import abc
import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from rehyat_jax.errors import CheckpointError

#: The number types that networks are read from, by their safetensors name.
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
#: Those that a file may have beside them.
_OTHERS = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
#: In which matrices are written, by name. Files have no other fp8 with scales than this: three bits behind the point.
EIGHT_BITS = {"fp8": np.dtype(ml_dtypes.float8_e4m3fn), "int8": np.dtype(np.int8)}
#: In which wide matrices are kept on the device as fp8: four bits behind the point, and a range that a row's numbers
#: fill. A float's error goes with the number itself, so that no choice of scales, groups or rotations helps the other
#: (docs/notebook/decisions.md).
FINE_FP8 = np.dtype(ml_dtypes.float8_e3m4)
#: The largest number of each.
LARGEST = {EIGHT_BITS["fp8"]: 448, FINE_FP8: 15.5, EIGHT_BITS["int8"]: 127}
#: Every kind that is known by its size.
KINDS = DTYPES | _OTHERS
READABLE = f"only {', '.join(DTYPES)} are read"

#: What is read at a time.
_PIECE_BYTES = 1 << 21


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What a file says of one tensor."""

    #: safetensors' name of its number type; of a type that safetensors lacks, the file's own name.
    kind: str
    shape: tuple[int, ...]
    #: The file's own name for it, where the numbers are read as wider ones than they are kept as.
    stored: str | None = None

    @property
    def dtype(self) -> np.dtype:
        return KINDS[self.kind]

    @property
    def readable(self) -> bool:
        """May it be part of a network?"""
        return self.kind in DTYPES

    @property
    def counts(self) -> bool:
        """Whole numbers or truth values: a step, a marker, a tokenizer's bytes, and never a weight."""
        return self.kind.lower().startswith(("i", "u", "bool"))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class TensorSource(abc.ABC):
    """Named tensors on disk."""

    infos: Mapping[str, TensorInfo]
    #: Words that a file has beside its tensors.
    metadata: Mapping[str, str] = MappingProxyType({})
    #: What is read: one file, or an index and its shards.
    files: tuple[Path, ...]

    @abc.abstractmethod
    def pieces(self, name: str, *, rows: int | None = None) -> Iterator[np.ndarray]:
        """A tensor in order, ``rows`` rows at a time (when not given, a few megabytes), each valid until the next.

        A tensor without dimensions comes as one row.

        Raises:
            CheckpointError: the file was cut or replaced since it was opened, or cannot be read.
        """


class CheckedFile:
    """A file that is read in pieces, each known to be whole and of the file that was opened.

    It is open only while it is read, so that a checkpoint may have more shards than a process may open files.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            CheckpointError: it cannot be read.
        """
        self.path = path
        try:
            self._identity = _identity(path)
        except OSError as error:
            raise _unreadable(path, error) from error

    @property
    def size(self) -> int:
        return self._identity[1]

    def read(self, begin: int, count: int) -> bytes:
        """``count`` bytes from ``begin`` on, fewer at the end of the file."""
        try:
            with self.path.open("rb") as file:
                file.seek(begin)
                return file.read(count)
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def pieces(self, begin: int, dtype: np.dtype, shape: tuple[int, ...], rows: int | None) -> Iterator[np.ndarray]:
        """The array that lies from ``begin`` on, as `TensorSource.pieces`."""
        shape = shape or (1,)
        row = math.prod(shape[1:]) * dtype.itemsize
        rows = rows or max(_PIECE_BYTES // max(row, 1), 1)
        try:
            with self.path.open("rb") as file:
                if _identity(self.path) != self._identity:
                    raise CheckpointError(f"{self.path} changed while it was read")
                file.seek(begin)
                buffer = np.empty(min(rows, shape[0]) * row, np.uint8)
                for start in range(0, shape[0], rows):
                    count = min(rows, shape[0] - start)
                    piece = buffer[: count * row]
                    if file.readinto(piece.data) != piece.nbytes:
                        raise CheckpointError(f"{self.path} was cut while it was read")
                    yield piece.view(dtype).reshape(count, *shape[1:])
        except OSError as error:
            raise _unreadable(self.path, error) from error


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read: {error.strerror or error}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object with no name given twice.

    Raises:
        CheckpointError: unreadable, not JSON, or not an object.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    return parse_object(data, str(path))


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """As `read_json`, of bytes; ``where`` names them."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise CheckpointError(f"{where} gives the same name twice")
        return result

    try:
        value = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is not a JSON object")
    return value


def listed(names: Iterable[str]) -> str:
    """Tensors by number and, the first few, by name."""
    names = list(names)
    some = ", ".join(map(repr, names[:3]))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} tensor{'' if len(names) == 1 else 's'} ({some}{more})" if names else "no tensors"

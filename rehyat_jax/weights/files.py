"""Tensors on disk, read where they lie: safetensors (single or sharded) by a memory map, ``.pth`` through torch.

Everything in a header or an index is checked against the file before it is believed: a hostile or damaged file ends in
a `CheckpointError`, and nothing is allocated on its word.
"""

from __future__ import annotations

import abc
import dataclasses
import json
import math
import mmap
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from rehyat_jax.errors import CheckpointError

#: The number types that Wan checkpoints come in, by their safetensors name.
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
_READABLE = f"only {', '.join(DTYPES)} are read"

#: The safetensors format's own limit; Wan's largest header is a fifth of a megabyte.
_LARGEST_HEADER = 100_000_000
#: What is mapped at a time.
_PIECE_BYTES = 1 << 21
_NEIGHBOURHOOD = 1 << 25
_TORCH_SUFFIXES = (".pth", ".pt", ".bin")


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What a file says of one tensor."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class TensorSource(abc.ABC):
    """Named tensors on disk."""

    infos: Mapping[str, TensorInfo]

    @abc.abstractmethod
    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """A tensor in order, some rows at a time, read-only; a piece is given back when the next is asked for.

        A tensor without dimensions comes as one row.
        """


def _cut(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Pieces of a few megabytes, each after the number of bytes before it."""
    array = array if array.shape else array.reshape(1)
    row = array[:1].nbytes
    rows = max(_PIECE_BYTES // max(row, 1), 1)
    for start in range(0, array.shape[0], rows):
        yield start * row, array[start : start + rows]


def open_tensors(path: Path) -> TensorSource:
    """The tensors of a file, or of all the shards that a ``*.safetensors.index.json`` names.

    Raises:
        CheckpointError: the file is missing, damaged, foreign, or needs torch, which is not installed.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    if path.name.endswith(".safetensors.index.json"):
        return ShardedFile(path)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in _TORCH_SUFFIXES:
        return TorchFile(path)
    raise CheckpointError(f"{path} is neither a .safetensors nor a .pth file")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object with no name given twice.

    Raises:
        CheckpointError: unreadable, not JSON, or not an object.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return _parse_object(data, str(path))


def _parse_object(data: bytes, where: str) -> dict[str, Any]:
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


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class SafetensorsFile(TensorSource):
    """One safetensors file, mapped into memory (https://huggingface.co/docs/safetensors: layout and its rules)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                total = file.seek(0, 2)
                file.seek(0)
                start = file.read(8)
                length = int.from_bytes(start, "little")
                if len(start) < 8 or length > total - 8:
                    raise CheckpointError(f"{path} is truncated or not a safetensors file")
                if length > _LARGEST_HEADER:
                    raise CheckpointError(f"{path} has a header of {length} bytes: not a safetensors file")
                header = _parse_object(file.read(length), f"the header of {path}")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        self._start = 8 + length
        self.infos, self._offsets = self._checked(header, total - self._start)

    def _checked(self, header: dict[str, Any], size: int) -> tuple[dict[str, TensorInfo], dict[str, int]]:
        """Tensors and where they begin, once they are known to tile the data exactly."""
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
                    raise CheckpointError(f"{self._path} describes tensor {name!r} in a way that is not safetensors'")
            if kind not in DTYPES:
                raise CheckpointError(f"{self._path}: tensor {name!r} is of type {kind}; {_READABLE}")
            # numpy's limit; a fortiori torch's.
            if len(shape) > 32:
                raise CheckpointError(f"{self._path}: tensor {name!r} has {len(shape)} dimensions")
            infos[name] = TensorInfo(DTYPES[kind], tuple(shape))
            if end - begin != infos[name].nbytes:
                raise CheckpointError(f"{self._path}: tensor {name!r} of shape {shape} cannot lie in {begin}:{end}")
            spans.append((begin, end, name))
        position = 0
        for begin, end, name in sorted(spans):
            if begin != position:
                raise CheckpointError(f"{self._path}: tensor {name!r} overlaps another or leaves a gap before it")
            position = end
        if position > size:
            raise CheckpointError(f"{self._path} is truncated: {position} bytes of tensors announced, {size} there")
        if position < size:
            raise CheckpointError(f"{self._path} has {size - position} bytes after its last tensor")
        return infos, {name: begin for begin, _, name in spans}

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        info, begin = self.infos[name], self._start + self._offsets[name]
        whole = np.frombuffer(self._map, info.dtype, info.size, begin).reshape(info.shape)
        for offset, piece in _cut(whole):
            yield piece
            self._give_back(begin + offset, begin + offset + piece.nbytes)

    def _give_back(self, start: int, end: int) -> None:
        """Unmap what was read (the pages are clean), so that a whole file is read in the memory of a piece.

        And what lies around it: a kernel with large pages maps some of the neighbourhood with every page asked for.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            start = max(start - _NEIGHBOURHOOD, 0)
            start -= start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, min(end + _NEIGHBOURHOOD, len(self._map)) - start)


class ShardedFile(TensorSource):
    """Several safetensors files under one ``*.safetensors.index.json``."""

    def __init__(self, index: Path) -> None:
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
            raise CheckpointError(f"{index} has no weight_map from tensors to files")
        shards = {file: SafetensorsFile(_beside(index, file)) for file in sorted(set(where.values()))}
        found = {name: file for file, shard in shards.items() for name in shard.infos}
        for name in where.keys() | found.keys():
            owner = where.get(name)
            if owner is None:
                raise CheckpointError(f"{index} does not know tensor {name!r} of {found[name]}")
            if name not in shards[owner].infos:
                raise CheckpointError(f"{index}: tensor {name!r} is not in {owner}")
        if sum(len(shard.infos) for shard in shards.values()) != len(where):
            raise CheckpointError(f"{index}: a tensor is stored in more than one shard")
        self._shards = {name: shards[file] for name, file in where.items()}
        self.infos = {name: shard.infos[name] for name, shard in self._shards.items()}

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        return self._shards[name].pieces(name)


def _beside(index: Path, file: str) -> Path:
    """The shard named by an index: a plain name in the index's own folder, not reached through a link elsewhere.

    The Hugging Face cache is the exception: its ``snapshots/<revision>`` hold links into the same model's ``blobs``.
    """
    if file != Path(file).name or "\\" in file or "\0" in file or not file.endswith(".safetensors"):
        raise CheckpointError(f"{index} names a shard {file!r} that is not a .safetensors file in its own folder")
    path, folder = index.parent / file, index.parent.resolve()
    allowed = [folder, *(parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots")]
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}, which {index.name} names, does not exist") from error
    if real.parent not in allowed:
        raise CheckpointError(f"{path}, which {index.name} names, is a link out of its folder")
    return path


class TorchFile(TensorSource):
    """A ``.pth``/``.pt`` file of tensors, maybe nested in dictionaries; torch maps it, and unpickles nothing else."""

    def __init__(self, path: Path) -> None:
        try:
            import torch
        except ImportError as error:
            raise CheckpointError(f"{path} is a torch file: install torch (pip install torch) to read it") from error
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, OSError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{path} is truncated, or not a torch file of plain tensors") from error
        names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
        self._tensors = dict(_flatten(content, torch.Tensor))
        self.infos = {}
        for name, tensor in self._tensors.items():
            if tensor.dtype not in names:
                raise CheckpointError(f"{path}: tensor {name!r} is of type {tensor.dtype}; {_READABLE}")
            self.infos[name] = TensorInfo(DTYPES[names[tensor.dtype]], tuple(tensor.shape))
        self._integer = torch.int16

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        tensor, dtype = self._tensors[name].detach(), self.infos[name].dtype
        if dtype.itemsize == 2:
            tensor = tensor.view(self._integer)
        for _, piece in _cut(tensor.numpy().view(dtype)):
            yield piece


def _flatten(content: Any, leaf: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors by dotted name; what else a training checkpoint holds (step counts, options) is left."""
    if not isinstance(content, Mapping):
        return
    for key, value in content.items():
        if isinstance(value, leaf):
            yield f"{prefix}{key}", value
        else:
            yield from _flatten(value, leaf, f"{prefix}{key}.")

"""Safetensors files written as a stream, and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rehyat_jax.errors import CheckpointError
from rehyat_jax.runtime.files import hidden, reason
from rehyat_jax.weights.files import DTYPES, EIGHT_BITS

#: Bytes of tensors in one file, at most, unless a single tensor is larger (the Hugging Face libraries' own habit).
MAX_SHARD_BYTES = 5 * 10**9
#: Counts and random keys, which no checkpoint has but a stream.
INTEGERS = {"I32": np.dtype(np.int32), "U32": np.dtype(np.uint32)}
#: Without it transformers refuses a file.
_FOR_TORCH = {"format": "pt"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outgoing:
    """A tensor to write: what it is, and its numbers in order, a block at a time."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside ``folder``, on its disk, renamed to it when the block ends well and removed when not.

    A link is followed. That a folder of this name can appear is known before the block begins.

    Raises:
        CheckpointError: ``folder`` exists and is not empty, or cannot be made or written (full disk, read-only, the
            current folder, the root of a disk, …).
    """
    asked, folder = folder, Path(os.path.realpath(folder))
    partial = hidden(folder, f"{secrets.token_hex(4)}.partial")
    try:
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise CheckpointError(f"{asked} exists and is not empty: name a new folder")
        if folder == Path.cwd() or folder.is_mount():
            what = "the current folder" if folder == Path.cwd() else "the root of a disk"
            raise CheckpointError(f"{asked} is {what}, in whose place no folder can appear: name a new folder in it")
        partial.mkdir(parents=True)
        if folder.exists():
            # Now, not after everything is written: a folder in use by the system is not replaced.
            os.replace(partial, folder)
            partial.mkdir()
        yield partial
        os.replace(partial, folder)
    except OSError as error:
        raise CheckpointError(f"cannot write {asked}: {reason(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tensors(folder: Path, stem: str, tensors: Sequence[Outgoing], *, max_shard_bytes: int) -> None:
    """One ``<stem>.safetensors``, or numbered shards and their index, as the Hugging Face libraries name them."""
    shards = _shards(tensors, max_shard_bytes)
    if len(shards) == 1:
        write_file(folder / f"{stem}.safetensors", shards[0])
        return
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, shard)
        where |= {tensor.name: file for tensor in shard}
    total = sum(tensor.nbytes for tensor in tensors)
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def _shards(tensors: Sequence[Outgoing], limit: int) -> list[list[Outgoing]]:
    shards: list[list[Outgoing]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def write_file(path: Path, tensors: Sequence[Outgoing], *, metadata: Mapping[str, str] = _FOR_TORCH) -> None:
    """One safetensors file, on the disk when this returns; the host never holds more of it than a block."""
    kinds = DTYPES | INTEGERS | {"F8_E4M3": EIGHT_BITS["fp8"], "I8": EIGHT_BITS["int8"]}
    names = {dtype: name for name, dtype in kinds.items()}
    # Wide types first, so that every tensor lies on a multiple of its item's size.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for tensor in ordered:
        begin, end = end, end + tensor.nbytes
        entry = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        header[tensor.name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            for block in tensor.blocks():
                file.write(np.ascontiguousarray(block).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())

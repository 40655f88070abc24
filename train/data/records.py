"""Shards: ArrayRecord files of packed records, each with a description beside it; open are those that are read.

A shard is written under a partial name, renamed when whole, and then described; what is not described is not there.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.serialization
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from rehyat_jax.errors import RehyatError
from rehyat_jax.runtime.files import remove_leftovers, sample_digest, whole_file
from rehyat_jax.runtime.outputs import locked

#: Files of a folder whose bytes are compared when it is opened, in all; of the others sizes alone. Damage elsewhere is
#: met when a record is read: ArrayRecord has checksums of its own.
VERIFIED_BYTES = 256 << 20
#: Shards that one reader keeps open.
_OPEN = 64


def pack(record: Mapping[str, Any]) -> bytes:
    """A record: arrays and texts by name."""
    return flax.serialization.msgpack_serialize(dict(record))


def unpack(content: bytes) -> dict[str, Any]:
    return flax.serialization.msgpack_restore(content)


@dataclasses.dataclass(frozen=True, kw_only=True)
class File:
    """A file of a prepared folder, and what it must be."""

    name: str
    bytes: int
    digest: str

    @classmethod
    def of(cls, path: Path) -> File:
        return cls(name=path.name, bytes=path.stat().st_size, digest=sample_digest(path).hex())


def damaged(folder: Path, files: Iterable[File], *, budget: int = VERIFIED_BYTES) -> set[str]:
    """Names of files that are missing, of another size or, as far as ``budget`` bytes of reading tell, changed.

    Which files are read does not depend on their order. Of a large file a sample is read (`sample_digest`).
    """
    bad: set[str] = set()
    for file in sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).digest()):
        try:
            whole = (folder / file.name).stat().st_size == file.bytes
            if whole and (budget := budget - min(file.bytes, 64 << 20)) >= 0:
                whole = File.of(folder / file.name) == file
        except OSError:
            whole = False
        if not whole:
            bad.add(file.name)
    return bad


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """Where a shard has the records of one key: of a video's content its clips, of a caption's digest its embedding."""

    first: int
    count: int
    #: Of a caption.
    tokens: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """A whole shard and its records by key."""

    file: File
    held: Mapping[str, Held]

    @classmethod
    def read(cls, description: Path) -> Shard | None:
        """By a description; None where that is no description."""
        try:
            content = json.loads(description.read_text(encoding="utf-8"))
            held = {str(key): Held(**value) for key, value in content["held"].items()}
            return cls(file=File(**content["file"]), held=held)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def describe(self, folder: Path) -> None:
        content = {
            "file": dataclasses.asdict(self.file),
            "held": {k: dataclasses.asdict(v) for k, v in self.held.items()},
        }
        with whole_file(folder / f"{self.file.name}.json") as partial:
            partial.write_text(json.dumps(content) + "\n", encoding="utf-8")

    def remove(self, folder: Path) -> None:
        for name in (f"{self.file.name}.json", self.file.name):
            (folder / name).unlink(missing_ok=True)


def shards_of(folder: Path, kind: str, *, budget: int = VERIFIED_BYTES) -> list[Shard]:
    """The whole shards whose names begin with ``kind``; those that are not as they were written are removed."""
    found = [Shard.read(path) for path in sorted(folder.glob(f"{kind}-*.array_record.json"))]
    described = [shard for shard in found if shard is not None]
    bad = damaged(folder, (shard.file for shard in described), budget=budget)
    for shard in described:
        if shard.file.name in bad:
            shard.remove(folder)
    return [shard for shard in described if shard.file.name not in bad]


def write_shard(
    folder: Path, name: str, records: Iterator[tuple[str, bytes | None]], *, tokens: Mapping[str, int] | None = None
) -> Shard:
    """A shard of records by key, whole or not at all, and its description. A key's records follow one another; those of
    a key that ``records`` takes back, by None, are left out of the description.

    Args:
        tokens: of keys that are captions; read as the records come, by which it may be filled.

    Raises:
        RehyatError: it cannot be written.
    """
    path = folder / name
    with locked(path, command="rehyat prepare"):
        remove_leftovers(path)
        with whole_file(path) as partial:
            try:
                held = _write_records(partial, records, {} if tokens is None else tokens)
            except (RuntimeError, ValueError) as error:  # of pybind11, for Riegeli's failures
                raise RehyatError(f"cannot write {path}: {str(error).splitlines()[0][:200]}") from error
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        shard = Shard(file=File.of(path), held=held)
        shard.describe(folder)
    return shard


def _write_records(
    path: Path, records: Iterator[tuple[str, bytes | None]], tokens: Mapping[str, int]
) -> dict[str, Held]:
    held, count, writer = dict[str, Held](), 0, ArrayRecordWriter(str(path), "group_size:1")
    for key, record in records:
        if record is None:
            held.pop(key, None)
            continue
        first, there = (held[key].first, held[key].count) if key in held else (count, 0)
        held[key] = Held(first=first, count=there + 1, tokens=tokens.get(key, 0))
        writer.write(record)
        count += 1
    writer.close()
    return held


class Reader:
    """Random access to records of many shards, by several threads; as few of them are open as one run needs."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._paths = [str(folder / name) for name in names]
        self._open: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, shard: int, record: int) -> dict[str, Any]:
        """
        Raises:
            RehyatError: the shard is damaged or missing.
        """
        path = self._paths[shard]
        try:
            return unpack(self._reader(shard).read([record])[0])
        except Exception as error:  # ArrayRecord's checksums raise RuntimeError; msgpack has kinds of its own
            if "Too many open files" in str(error):
                raise RehyatError(f"cannot open {path}: this process has too many open files (ulimit -n)") from error
            if not Path(path).is_file():
                raise RehyatError(f"{path} is missing: the same rehyat prepare makes it again") from error
            raise RehyatError(f"{path} is damaged: remove it, and the same rehyat prepare makes it again") from error

    def _reader(self, shard: int) -> Any:
        with self._lock:
            if (reader := self._open.pop(shard, None)) is None:
                # 32 KiB and no reading ahead: as Grain opens them for random access.
                options = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 32768}
                reader = ArrayRecordReader(self._paths[shard], **options)
            self._open[shard] = reader
            while len(self._open) > _OPEN:
                self._open.popitem(last=False)  # closed when no thread reads from it any more
        return reader

"""A path to its tensors: the reader is chosen by what the file is, not by its ending."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from rehyat_jax.errors import CheckpointError
from rehyat_jax.weights.files import TensorSource, read_json
from rehyat_jax.weights.gguf_file import GGUFFile
from rehyat_jax.weights.safetensors_file import SafetensorsFile
from rehyat_jax.weights.scaled import widened
from rehyat_jax.weights.torch_file import TorchFile

#: Endings of files of tensors, the better formats first.
ENDINGS = ("safetensors", "sft", "pth", "pt", "bin", "ckpt", "gguf")
_SAFETENSORS, _TORCH = ENDINGS[:2], ENDINGS[2:6]
#: ``model.safetensors.index.json``, ``model.bin.index.json``, and of a variant ``model.safetensors.index.fp16.json``.
_INDEX = re.compile(rf"(?P<stem>.+)\.(?P<ending>{'|'.join(ENDINGS)})\.index(\.[\w-]+)?\.json")
#: ``model-00001-of-00007.safetensors``, with a variant's name before or after the numbers.
_NUMBERED = re.compile(rf"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)(?P<rest>(\.[\w-]+)?\.({'|'.join(ENDINGS)}))")
#: What files begin with that are sometimes found in the place of weights.
_NO_WEIGHTS = {
    b"version https://git-lfs": "is a git-lfs pointer, not the file itself: fetch it with `git lfs pull`",
    b"<!doctype html": "is a web page, not the file itself: download it again",
    b"<html": "is a web page, not the file itself: download it again",
    b"<?xml": "is a server's message in XML, not the file itself: download it again",
    b'{"': "is JSON, not weights: a server's message, or an index or a configuration",
    b"PAR1": "is a parquet file of data, not of weights",
    b"\x1f\x8b": "is compressed (gzip): unpack it first",
    b"BZh": "is compressed (bzip2): unpack it first",
    b"\xfd7zxz": "is compressed (xz): unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed (zstd): unpack it first",
    b"7z\xbc\xaf": "is compressed (7-Zip): unpack it first",
}


def open_tensors(path: Path) -> TensorSource:
    """The tensors of a file, or of all the shards that an index names or that are numbered as it is.

    Weights that are kept in fewer bits are read as the numbers that they stand for.

    Raises:
        CheckpointError: the file is missing, damaged, foreign, or needs torch, which is not installed.
    """
    return widened(_opened(path), path)


def _opened(path: Path) -> TensorSource:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    if is_index(path):
        return _from_index(path)
    if (numbered := _NUMBERED.fullmatch(path.name)) and int(numbered["count"]) > 1:
        return _numbered(path, numbered)
    return _open_file(path)


def is_index(path: Path) -> bool:
    """Does the file name shards?"""
    return _INDEX.fullmatch(path.name) is not None


def weights_in(folder: Path) -> list[Path]:
    """Sets of weights in a folder, one path each: an index, the first of numbered shards, or a file.

    Hidden files are none (macOS leaves a ``._x`` beside every ``x`` on other file systems).
    """
    try:
        names = sorted(file.name for file in folder.iterdir() if not file.name.startswith(".") and file.is_file())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from error
    indices = [name for name in names if is_index(folder / name)]
    taken = {shard for index in indices for shard in _shards_of(read_json(folder / index))}
    firsts: dict[tuple[str, str], str] = {}
    found = list(indices)
    for name in names:
        if name in taken or name.rpartition(".")[2] not in ENDINGS:
            continue
        if numbered := _NUMBERED.fullmatch(name):
            firsts.setdefault((numbered["stem"], numbered["rest"]), name)
        else:
            found.append(name)
    return [folder / name for name in sorted([*found, *firsts.values()], key=_rank)]


def _rank(name: str) -> tuple[int, str]:
    index = _INDEX.fullmatch(name)
    return ENDINGS.index(index["ending"] if index else name.rpartition(".")[2]), name


def _open_file(path: Path) -> TensorSource:
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    for mark, what in _NO_WEIGHTS.items():
        if start.lower().startswith(mark.lower()):
            raise CheckpointError(f"{path} {what}")
    if start.startswith(b"GGUF"):
        return GGUFFile(path)
    if start.startswith(b"PK\x03\x04") or start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return TorchFile(path)
    ending = path.suffix.removeprefix(".")
    if ending in _SAFETENSORS or start[8:9] == b"{":
        return SafetensorsFile(path)
    if ending in _TORCH:
        return TorchFile(path)
    raise CheckpointError(f"{path} is neither a .safetensors, a .pth nor a .gguf file")


class ShardedTensors(TensorSource):
    """Several files as one."""

    def __init__(self, shards: Mapping[str, TensorSource], owners: Mapping[str, str], files: tuple[Path, ...]) -> None:
        self._shards = {name: shards[file] for name, file in owners.items()}
        self.infos = {name: shard.infos[name] for name, shard in self._shards.items()}
        self.metadata = {key: value for shard in shards.values() for key, value in shard.metadata.items()}
        self.files = files

    def pieces(self, name: str, *, rows: int | None = None) -> Iterator[np.ndarray]:
        return self._shards[name].pieces(name, rows=rows)


def _shards_of(index: Mapping[str, object]) -> set[str]:
    where = index.get("weight_map")
    return set(map(str, where.values())) if isinstance(where, dict) else set()


def _from_index(index: Path) -> TensorSource:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files")
    files = {file: _beside(index, file) for file in sorted(set(where.values()))}
    shards = {file: _open_file(path) for file, path in files.items()}
    found = {name: file for file, shard in shards.items() for name in shard.infos}
    for name in where.keys() | found.keys():
        owner = where.get(name)
        if owner is None:
            raise CheckpointError(f"{index} does not know tensor {name!r} of {found[name]}")
        if name not in shards[owner].infos:
            raise CheckpointError(f"{index}: tensor {name!r} is not in {owner}")
    if sum(len(shard.infos) for shard in shards.values()) != len(where):
        raise CheckpointError(f"{index}: a tensor is stored in more than one shard")
    return ShardedTensors(shards, where, (index, *files.values()))


def _beside(index: Path, file: str) -> Path:
    """The shard named by an index: a plain name in the index's own folder; a link there may lead anywhere, as the link
    of a single file may (the Hugging Face cache and other stores of models are farms of links)."""
    if file != Path(file).name or "\\" in file or "\0" in file or file.rpartition(".")[2] not in _like(index):
        raise CheckpointError(f"{index} names a shard {file!r} that is not a .{_like(index)[0]} file in its own folder")
    path = index.parent / file
    try:
        path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}, which {index.name} names, does not exist") from error
    return path


def _like(index: Path) -> tuple[str, ...]:
    """Endings that the shards of an index may have: its own format's."""
    match = _INDEX.fullmatch(index.name)
    assert match is not None
    return _SAFETENSORS if match["ending"] in _SAFETENSORS else _TORCH


def _numbered(path: Path, match: re.Match[str]) -> TensorSource:
    """All shards of a set whose index is missing: their numbers say how many they are."""
    stem, rest, count, digits = match["stem"], match["rest"], match["count"], len(match["number"])
    if int(count) > 10_000:
        raise CheckpointError(f"{path} says that it is one of {count} files, which no checkpoint has")
    names = [f"{stem}-{i:0{digits}d}-of-{count}{rest}" for i in range(1, int(count) + 1)]
    files = {name: path.parent / name for name in names}
    if missing := next((name for name, file in files.items() if not file.is_file()), None):
        raise CheckpointError(f"{path.parent / missing} is missing: {path.name} is one of {int(count)}")
    shards = {name: _open_file(file) for name, file in files.items()}
    owners: dict[str, str] = {}
    for file, shard in shards.items():
        if twice := next((name for name in shard.infos if name in owners), None):
            raise CheckpointError(f"{path.parent}: tensor {twice!r} is in {owners[twice]} and in {file}")
        owners |= dict.fromkeys(shard.infos, file)
    return ShardedTensors(shards, owners, tuple(files.values()))

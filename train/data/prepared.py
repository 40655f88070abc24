"""Data that `rehyat prepare` made: latents and prompt embeddings of clips, in ArrayRecord files that Grain reads.

Which clips a round gets is a function of the seed and the number of clips before it, so that the reader's state follows
from the step that a checkpoint is of: a resumed run goes on exactly, on as many processes as it likes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.serialization
import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.models.checkpoints import open_component
from rehyat_jax.runtime.files import sample_digest, whole_file
from train.data.clips import AnyBucket
from train.data.pools import Pool
from train.parallel.devices import WHOLE, Rows

INDEX = "data.json"
#: Of the settings and files that a folder is being made from.
PLAN = "plan.json"
#: The empty prompt's embedding.
EMPTY = "empty.msgpack"
_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedClips(AnyBucket):
    """Clips of a folder that `rehyat prepare` made, with their captions."""

    folder: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class File:
    """A file of a prepared folder, and what it must be."""

    name: str
    bytes: int
    digest: str
    #: Records in it.
    clips: int = 0

    @classmethod
    def of(cls, path: Path, *, clips: int = 0) -> File:
        return cls(name=path.name, bytes=path.stat().st_size, digest=sample_digest(path).hex(), clips=clips)

    def is_whole(self, folder: Path) -> bool:
        """Whether it is there as it was written (of a large file: wherever a sample was taken)."""
        try:
            return File.of(folder / self.name, clips=self.clips) == self
        except OSError:
            return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is made of what. Two runs of the same plan make the same files."""

    #: Digests of the videos' names, sizes and captions, and of the networks.
    footage: str
    vae: str
    text_encoder: str
    frames: int
    height: int
    width: int
    fps: int
    #: [T, h, w, z] of a clip.
    latents: tuple[int, int, int, int]
    #: Tokens of the longest caption, and the width of an embedding.
    text: tuple[int, int]
    dtype: str
    videos: int
    videos_per_shard: int
    version: int = _VERSION

    @property
    def shards(self) -> int:
        return -(-self.videos // self.videos_per_shard)

    def shard(self, number: int) -> str:
        """The name of a shard's file."""
        return f"clips-{number:05d}-of-{self.shards:05d}.array_record"

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> Plan:
        """
        Raises:
            TypeError: it is not what `dataclasses.asdict` made.
        """
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in source.items()}
        return cls(**values)


def pack(record: Mapping[str, Any]) -> bytes:
    """A record: arrays and texts by name."""
    return flax.serialization.msgpack_serialize(dict(record))


def unpack(content: bytes) -> dict[str, Any]:
    return flax.serialization.msgpack_restore(content)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A finished folder."""

    folder: Path
    plan: Plan
    shards: tuple[File, ...]
    empty: File

    @classmethod
    def open(cls, folder: Path) -> Prepared:
        """Read the index and check every file.

        Raises:
            ConfigError: it is no prepared folder, is not finished, or a file is missing or damaged.
        """
        try:
            content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        except OSError as error:
            unfinished = (folder / PLAN).is_file()
            raise ConfigError(
                f"{folder} is not finished: the same rehyat prepare continues it"
                if unfinished
                else f"{folder} is no folder that rehyat prepare made (it has no {INDEX})"
            ) from error
        except ValueError as error:
            raise ConfigError(f"{folder / INDEX} is damaged") from error
        try:
            plan, empty = Plan.from_dict(content["plan"]), File(**content["empty"])
            shards = tuple(File(**shard) for shard in content["shards"])
            if len(shards) != plan.shards or not sum(shard.clips for shard in shards) or plan.version != _VERSION:
                raise ValueError
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{folder / INDEX} is damaged, or of another version of this program") from error
        for file in (empty, *shards):
            if not file.is_whole(folder):
                raise ConfigError(f"{folder / file.name} is missing or damaged: the same rehyat prepare makes it anew")
        return cls(folder=folder, plan=plan, shards=shards, empty=empty)

    def write_index(self) -> None:
        """What `open` reads.

        Raises:
            RehyatError: it cannot be written.
        """
        content = {
            "plan": dataclasses.asdict(self.plan),
            "empty": dataclasses.asdict(self.empty),
            "shards": [dataclasses.asdict(shard) for shard in self.shards],
        }
        with whole_file(self.folder / INDEX) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def __len__(self) -> int:
        """Clips."""
        return sum(shard.clips for shard in self.shards)

    def check(self, *, vae: str, text_encoder: str, frames: int, where: Path) -> None:
        """
        Args:
            vae, text_encoder: `identity` of those that the model at ``where`` has.

        Raises:
            ConfigError: the clips are of another length, or were encoded by other networks.
        """
        if self.plan.frames != frames:
            raise ConfigError(f"{self.folder} has clips of {self.plan.frames} frames, and the bucket says {frames}")
        for name, theirs, ours in (("VAE", self.plan.vae, vae), ("text encoder", self.plan.text_encoder, text_encoder)):
            if theirs != ours:
                raise ConfigError(f"{self.folder} was prepared with another {name} than that of {where}")

    def empty_text(self) -> Float[np.ndarray, "1 L D"]:
        """The empty prompt's embedding."""
        return self._padded(unpack((self.folder / EMPTY).read_bytes())["text"])[None]

    def captions(self, count: int) -> list[str]:
        """Of the first clips."""
        records = _Records(self.folder, self.shards)
        return [records[index]["caption"] for index in range(min(count, len(records)))]

    def clips(self, first: int, last: int | None = None) -> grain.MapDataset:
        """Clips ``first`` to ``last`` in the order of the files: latents, and text padded with zeros."""

        def arrays(record: Mapping[str, Any]) -> dict[str, np.ndarray]:
            return {"latents": record["latents"], "text": self._padded(record["text"])}

        return grain.MapDataset.source(_Records(self.folder, self.shards))[first:last].map(arrays)

    def _padded(self, text: np.ndarray) -> np.ndarray:
        return np.pad(text, ((0, self.plan.text[0] - len(text)), (0, 0)))


def open_prepared(buckets: Sequence[AnyBucket], model: Path) -> dict[Path, Prepared]:
    """The folders of buckets of `PreparedClips`, checked against the model's folder whose training they are for.

    Raises:
        ConfigError: see `Prepared.open` and `Prepared.check`.
    """
    found: dict[Path, Prepared] = {}
    for bucket in buckets:
        if isinstance(bucket, PreparedClips):
            data = found[bucket.folder] = found.get(bucket.folder) or Prepared.open(bucket.folder)
            data.check(
                vae=identity(model, "vae"),
                text_encoder=identity(model, "text_encoder"),
                frames=bucket.frames,
                where=model,
            )
    return found


def identity(model: Path, name: str) -> str:
    """A digest of one of a model's networks: its sizes and its files, as `sample_digest` sees them.

    Raises:
        CheckpointError, ConfigError: there is no such network.
    """
    opened = open_component(model, name)
    # An index says where tensors are, and no more.
    files = [file for file in opened.tensors.files if file.suffix != ".json"]
    digest = hashlib.sha256(str(opened.config).encode())
    for file in files:
        digest.update(sample_digest(file))
    return digest.hexdigest()


class _Records:
    """Records of all shards, as Grain's random access takes them."""

    def __init__(self, folder: Path, shards: Sequence[File]) -> None:
        self._paths = [str(folder / shard.name) for shard in shards if shard.clips]
        self._ends = np.cumsum([shard.clips for shard in shards if shard.clips])
        for path in self._paths:  # all at once, an error would not say which
            try:
                grain.sources.ArrayRecordDataSource([path])
            except RuntimeError as error:
                raise _damaged(path) from error
        self._source = grain.sources.ArrayRecordDataSource(self._paths)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return unpack(self._source[index])
        except Exception as error:  # ArrayRecord's checksums raise RuntimeError; msgpack has kinds of its own
            raise _damaged(self._paths[int(np.searchsorted(self._ends, index, side="right"))]) from error


def _damaged(path: str) -> RehyatError:
    return RehyatError(f"{path} is damaged: the same rehyat prepare makes it anew")


class PreparedFeed:
    """A prepared folder's clips, shuffled anew each time that all have served; a `train.data.pools.Feed`."""

    def __init__(
        self,
        data: Prepared,
        *,
        count: int,
        seed: int,
        dtype: jnp.dtype,
        place: Callable[[int], int],
        first: int = 0,
        last: int | None = None,
        rows: Rows = WHOLE,
    ) -> None:
        """
        Args:
            count: clips a round, over all processes.
            place: of a round of the run among those that draw from here.
            first, last: the clips that serve.
            rows: this process's share of a round.

        Raises:
            ConfigError: none are left.
        """
        clips = data.clips(first, last)
        if not len(clips):
            raise ConfigError(f"{data.folder} has {len(data)} clips, of which {first} are held out: none are left")
        self._count, self._place, self._plan, self._dtype = count // rows.parts, place, data.plan, dtype
        self._whole = count
        mine = clips.seed(seed).shuffle().repeat()[rows.part :: rows.parts]
        options = grain.ReadOptions(num_threads=8, prefetch_buffer_size=2 * self._count)
        self._rows = iter(mine.to_iter_dataset(options).batch(self._count))
        self._next = 0
        self.frozen = {"empty": jnp.asarray(data.empty_text(), dtype)}

    def turn(self, index: int) -> PyTree:
        if (wanted := self._place(index) * self._count) != self._next:
            self._rows.set_state({"next_index": wanted})
        self._next = wanted + self._count
        return next(self._rows)

    def turn_shapes(self) -> PyTree:
        stored = jnp.dtype(self._plan.dtype)
        return {
            "latents": jax.ShapeDtypeStruct((self._whole, *self._plan.latents), stored),
            "text": jax.ShapeDtypeStruct((self._whole, *self._plan.text), stored),
        }

    def pool(self, turn: PyTree, frozen: PyTree, others: PyTree) -> Pool:
        return Pool(turn["latents"].astype(jnp.float32), turn["text"].astype(self._dtype))

    def nothing(self, frozen: PyTree, others: PyTree) -> Array:
        return frozen["empty"]

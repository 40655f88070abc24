"""Data that `rehyat prepare` made: latents of clips and embeddings of captions, in ArrayRecord files that Grain reads.

Which clips a round gets is a function of the seed and the number of clips before it, so that the loader state follows
from the step that a checkpoint is of: a resumed run goes on exactly, on as many processes as it likes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.models.networks import open_component
from rehyat_jax.runtime.devices import WHOLE, Rows
from rehyat_jax.runtime.files import sample_digest, whole_file
from train.data.clips import AnyBucket
from train.data.footage import Unusable
from train.data.pools import Pool
from train.data.records import File, Reader, damaged

INDEX = "data.json"
#: The settings that a folder is made with.
PLAN = "plan.json"
VERSION = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedClips(AnyBucket):
    """Clips of a folder that `rehyat prepare` made, with their captions."""

    folder: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodePlan:
    """How videos are encoded: what all clips of a folder have in common."""

    #: Digests of the networks.
    vae: str
    text_encoder: str
    frames: int
    height: int
    width: int
    fps: int
    #: [T, h, w, z] of a clip.
    latents: tuple[int, int, int, int]
    #: Width of an embedding.
    text: int
    dtype: str
    #: Whether captions were repaired; all were before there was a choice.
    repair_prompts: bool = True

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> EncodePlan:
        """
        Raises:
            TypeError: it is not what `dataclasses.asdict` made.
        """
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in source.items()}
        return cls(**values)


def check_version(content: Any, *, where: Path) -> None:
    """
    Raises:
        ConfigError: a plan or an index is of another version of the format.
    """
    inner = content.get("plan", content) if isinstance(content, dict) else {}
    version = content.get("version", inner.get("version")) if isinstance(inner, dict) else None
    if isinstance(version, int) and version != VERSION:
        raise ConfigError(
            f"{where} is of version {version} of prepared data, and this program reads version {VERSION}: "
            "prepare the videos again, in another folder"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Video:
    """A video of the index: where it came from, and where its records are."""

    name: str
    #: Of the source file: while they are the same, so is the content.
    size: int
    modified: int
    #: `train.data.footage.content_digest`.
    content: str
    #: The shard that has its clips (a place in `Prepared.shards`), the first of them there, and how many there are.
    shard: int
    first: int
    clips: int
    #: A digest of the caption, the shard that has its embedding, and the record.
    caption: str
    text_shard: int
    text: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A finished folder."""

    folder: Path
    plan: EncodePlan
    #: Tokens of the longest caption.
    tokens: int
    shards: tuple[File, ...]
    videos: tuple[Video, ...]
    #: Of the empty prompt: the shard that has its embedding, and the record.
    empty: tuple[int, int]
    #: Videos that could not be used.
    unusable: tuple[Unusable, ...] = ()
    #: Contents of the videos that training does not see: see `hold_out`.
    held_out: frozenset[str] = frozenset()

    @classmethod
    def open(cls, folder: Path) -> Prepared:
        """Read the index and check the files, of many a part (`train.data.records.VERIFIED_BYTES`).

        Raises:
            ConfigError: it is no prepared folder, is not finished, is of another version, or a file is missing or
                damaged.
        """
        found = cls.read_index(folder)
        if bad := sorted(damaged(folder, found.shards)):
            raise ConfigError(f"{folder / bad[0]} is missing or damaged: the same rehyat prepare makes it again")
        return found

    @classmethod
    def read_index(cls, folder: Path) -> Prepared:
        """As `open`, but looks at no other file."""
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
        check_version(content, where=folder)
        try:
            return cls(
                folder=folder,
                plan=EncodePlan.from_dict(content["plan"]),
                tokens=content["tokens"],
                shards=tuple(File(**shard) for shard in content["shards"]),
                videos=tuple(Video(**video) for video in content["videos"]),
                empty=(int(content["empty"][0]), int(content["empty"][1])),
                unusable=tuple(Unusable(**video) for video in content["unusable"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{folder / INDEX} is damaged") from error

    def write_index(self) -> None:
        """What `open` reads.

        Raises:
            RehyatError: it cannot be written.
        """
        content = {
            "version": VERSION,
            "plan": dataclasses.asdict(self.plan),
            "tokens": self.tokens,
            "empty": self.empty,
            "shards": [dataclasses.asdict(shard) for shard in self.shards],
            "unusable": [video._asdict() for video in self.unusable],
        }
        # A line a video: a folder of a hundred thousand stays readable, and is written fast.
        videos = ",\n".join(json.dumps(dataclasses.asdict(video)) for video in self.videos)
        with whole_file(self.folder / INDEX) as partial:
            head = json.dumps(content, indent=1).removesuffix("\n}")
            partial.write_text(f'{head},\n "videos": [\n{videos}\n]\n}}\n', encoding="utf-8")

    def __len__(self) -> int:
        """Clips."""
        return sum(video.clips for video in self.videos)

    @property
    def training_clips(self) -> int:
        """Clips that training sees."""
        return sum(video.clips for video in self.videos if not self._is_out(video))

    @property
    def identity(self) -> str:
        """A digest of all that training reads: settings, contents and captions, whichever shards they lie in."""
        digest = hashlib.sha256(repr(self.plan).encode())
        for video in self.videos:
            digest.update(f"{video.content} {video.caption} {video.clips} ".encode())
        return digest.hexdigest()

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
        return self._padded(self._reader()(*self.empty)["text"])[None]

    def held_out_captions(self, count: int) -> list[str]:
        """Of the first clips that training does not see."""
        read, videos = self._reader(), [video for video in self._by_hash() if self._is_out(video)]
        clips = itertools.islice((video for video in videos for _ in range(video.clips)), count)
        return [read(video.text_shard, video.text)["caption"] for video in clips]

    def clips(self, *, held_out: bool | None = None) -> grain.MapDataset:
        """Latents, and text padded with zeros, of the videos that training sees (False), of those that it does not
        (True: in the order of their hashes), or of all (None), in the index's order."""
        videos: Sequence[Video] = self.videos
        if held_out is not None:
            videos = [video for video in (self._by_hash() if held_out else videos) if self._is_out(video) == held_out]
        return grain.MapDataset.source(_Clips(self._reader(), videos)).map(self._arrays)

    def _arrays(self, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
        if not np.isfinite(record["latents"]).all():
            raise RehyatError(f"{self.folder}: latents of {record['name']}, clip {record['clip'] + 1}, are not finite")
        return {"latents": record["latents"], "text": self._padded(record["text"])}

    def _is_out(self, video: Video) -> bool:
        return video.content in self.held_out

    def _by_hash(self) -> list[Video]:
        return sorted(self.videos, key=_spread)

    def _reader(self) -> Reader:
        return Reader(self.folder, [shard.name for shard in self.shards])

    def _padded(self, text: np.ndarray) -> np.ndarray:
        return np.pad(text, ((0, self.tokens - len(text)), (0, 0)))


def _spread(video: Video) -> bytes:
    """A place in an order that follows from the content alone, and from nothing that a name or a source tells."""
    return hashlib.sha256(f"held out {video.content}".encode()).digest()


def hold_out(folders: Mapping[Path, Prepared], clips: int) -> dict[Path, Prepared]:
    """Keep whole videos from training, ``clips`` clips or a few more of each folder.

    They are spread by a hash of their content: it tells nothing of their names, copies stay together, and it is the
    same in every folder. A video that is held out of one folder of a run is held out of all.

    Raises:
        ConfigError: a folder has not so many clips, or none are left.
    """
    out: set[str] = set()
    for data in folders.values():
        there = 0
        for video in data._by_hash():
            if there >= clips:
                break
            out.add(video.content)
            there += video.clips
    apart = {path: dataclasses.replace(data, held_out=frozenset(out)) for path, data in folders.items()}
    for data in apart.values():
        left = sum(video.clips for video in data.videos if video.content not in out)
        if not left:
            raise ConfigError(
                f"{data.folder} has {len(data)} clips, of which {len(data) - left} are held out: none are left"
            )
    return apart


def open_prepared(buckets: Sequence[AnyBucket], model: Path, *, held_out: int = 0) -> dict[Path, Prepared]:
    """The folders of buckets of `PreparedClips`, checked against the model's folder whose training they are for.

    Args:
        held_out: clips of each that training does not see; see `hold_out`.

    Raises:
        ConfigError: see `Prepared.open`, `Prepared.check` and `hold_out`.
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
    return hold_out(found, held_out) if held_out else found


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


class _Clips:
    """Clips with their captions, as Grain's random access takes them."""

    def __init__(self, read: Reader, videos: Sequence[Video]) -> None:
        self._read, self._videos = read, videos
        self._ends = np.cumsum([video.clips for video in videos])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = int(np.searchsorted(self._ends, index, side="right"))
        video = self._videos[place]
        clip = index - int(self._ends[place]) + video.clips
        latents = self._read(video.shard, video.first + clip)["latents"]
        text = self._read(video.text_shard, video.text)
        return {"latents": latents, "text": text["text"], "name": video.name, "clip": clip}


class PreparedFeed:
    """A prepared folder's clips, shuffled again each time that all have served; a `train.data.pools.Feed`."""

    def __init__(
        self,
        data: Prepared,
        *,
        count: int,
        seed: int,
        dtype: jnp.dtype,
        place: Callable[[int], int],
        held_out: bool = False,
        rows: Rows = WHOLE,
    ) -> None:
        """
        Args:
            count: clips a round, over all processes.
            place: of a round of the run among those that draw from here.
            held_out: serve the clips that training does not see, in place of those that it does.
            rows: this process's share of a round.
        """
        self._count, self._place, self._data, self._dtype = count // rows.parts, place, data, dtype
        self._whole = count
        clips = data.clips(held_out=held_out)
        mine = clips.seed(seed).shuffle().repeat()[rows.part :: rows.parts]
        options = grain.ReadOptions(num_threads=8, prefetch_buffer_size=2 * self._count)
        self._rows = iter(mine.to_iter_dataset(options).batch(self._count))
        self._next = 0
        self.frozen = {"empty": jnp.asarray(data.empty_text(), dtype)}

    def host_batch(self, index: int) -> PyTree:
        if (wanted := self._place(index) * self._count) != self._next:
            self._rows.set_state({"next_index": wanted})
        self._next = wanted + self._count
        return next(self._rows)

    def host_batch_shapes(self) -> PyTree:
        plan = self._data.plan
        stored = jnp.dtype(plan.dtype)
        return {
            "latents": jax.ShapeDtypeStruct((self._whole, *plan.latents), stored),
            "text": jax.ShapeDtypeStruct((self._whole, self._data.tokens, plan.text), stored),
        }

    def pool(self, host_batch: PyTree, frozen: PyTree, models: PyTree) -> Pool:
        return Pool(host_batch["latents"].astype(jnp.float32), host_batch["text"].astype(self._dtype))

    def null_embedding(self, frozen: PyTree, models: PyTree) -> Array:
        return frozen["empty"]

    def prompts(self, host_batch: PyTree) -> PyTree:
        """The captions' embeddings."""
        return host_batch["text"]

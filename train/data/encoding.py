"""Videos and captions into latents and prompt embeddings, shard by shard, and each content once.

A video is known by its content, a caption by its text, and both by the folder's settings: videos that are added or
changed are encoded, those that are gone leave the index, and a mended caption costs a caption. A shard is written under
a partial name and renamed when whole, so a run may be killed at any time, and that costs a shard at most.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.runtime.files import reason, whole_file
from train.data.encode_plan import Encoding
from train.data.encoders import TextEncoder, VideoEncoder
from train.data.footage import Footage, Unusable, content_digest
from train.data.frames import count_clips
from train.data.ledger import Checked, Key, Ledger
from train.data.prepared import INDEX, PLAN, VERSION, EncodePlan, Prepared, Video, check_version
from train.data.records import File, Held, Shard, pack, shards_of, write_shard

#: Called with what is under way, how much of it is done, and all of it.
Progress = Callable[[str, int, int], None]
#: What two plans must have in common, in words where the name does not say it.
_WORDS = {"vae": "another VAE", "text_encoder": "another text encoder"}
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run has done."""

    #: Clips in the folder; none where other parts are still at it.
    clips: int | None
    #: Videos that this run encoded.
    encoded: int
    #: Videos of the folder before that are gone from the source or changed.
    left: int
    #: Captions of which the text encoder reads a beginning alone.
    cut: int
    unusable: tuple[Unusable, ...]
    #: Bytes of shards that hold nothing of the index any more, and whether they were removed.
    stale: int


def encode_footage(
    encoding: Encoding,
    folder: Path,
    *,
    part: int = 1,
    parts: int = 1,
    retry: bool = False,
    prune: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Outcome:
    """Make what is missing of ``folder``, or a part of it; the index when no part is missing any more.

    Args:
        retry: try the videos again that could not be used, although they are as they were.
        prune: remove the shards that hold nothing of the index any more.

    Raises:
        ConfigError: the folder is something else, or was made by another plan; too many videos cannot be used.
        RehyatError: a file cannot be written.
    """
    _take(folder, encoding.plan)
    return _Run(encoding, folder, part=part, parts=parts, retry=retry, progress=progress).all(prune=prune)


def _take(folder: Path, plan: EncodePlan) -> None:
    """The folder is this plan's from now on."""
    if (folder / PLAN).is_file():
        try:
            content = json.loads((folder / PLAN).read_text(encoding="utf-8"))
            check_version(content, where=folder)
            theirs = EncodePlan.from_dict(content["plan"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{folder / PLAN} is damaged: choose another folder, or remove this one") from error
        for field in dataclasses.fields(EncodePlan):
            before, now = getattr(theirs, field.name), getattr(plan, field.name)
            if before != now:
                what = _WORDS.get(field.name, f"{field.name} {before} instead of {now}")
                raise ConfigError(f"{folder} holds data made with {what}: choose another folder, or remove this one")
    elif folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and was not made by rehyat prepare: choose another folder")
    else:
        content = {"version": VERSION, "plan": dataclasses.asdict(plan)}
        with whole_file(folder / PLAN) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _caption_key(caption: str) -> str:
    return hashlib.sha256(caption.encode("utf-8", "surrogatepass")).hexdigest()


class _Run:
    """One part's work on a folder."""

    def __init__(
        self, encoding: Encoding, folder: Path, *, part: int, parts: int, retry: bool, progress: Progress
    ) -> None:
        self._encoding, self._folder, self._progress = encoding, folder, progress
        self._part, self._parts = part, parts
        self._before = Prepared.read_index(folder) if (folder / INDEX).is_file() else None
        self._ledger = Ledger(folder, part=part, parts=parts)
        self._known: dict[Key, Checked] = {}
        for unusable in () if retry or self._before is None else self._before.unusable:
            key = Key(unusable.name, unusable.size, unusable.modified)
            self._known[key] = Checked(reason=unusable.reason)
        for video in () if self._before is None else self._before.videos:
            key = Key(video.name, video.size, video.modified)
            self._known[key] = Checked(content=video.content, clips=video.clips)
        self._settled = frozenset(self._known)  # as all parts see it
        self._retry = retry
        self._encoded = self._cut = 0

    def all(self, *, prune: bool) -> Outcome:
        found = self._ledger.read()
        self._known |= {key: one for key, one in found.items() if not (self._retry and one.reason)}
        self._check()
        self._encode_captions()
        self._encode_videos()
        return self._finish(prune=prune)

    def _mine(self, items: Sequence[_T], settled: Callable[[_T], bool]) -> list[list[_T]]:
        """Groups of this part. They follow from the source and the index alone, never from what other parts did since:
        so that each is somebody's, and a group that is made again is made of the same."""
        groups = []
        for of_kind in ([x for x in items if settled(x)], [x for x in items if not settled(x)]):
            size = self._encoding.videos_per_shard
            groups += [of_kind[start : start + size] for start in range(0, len(of_kind), size)]
        return groups[self._part - 1 :: self._parts]

    @functools.cached_property
    def _groups(self) -> list[list[Footage]]:
        return self._mine(self._encoding.found.footage, lambda video: Key.of(video) in self._settled)

    def _check(self) -> None:
        """Decode every video of this part that nobody has looked at yet, several side by side."""
        videos = [video for group in self._groups for video in group if Key.of(video) not in self._known]
        pool = ThreadPoolExecutor(max_workers=min(32, os.cpu_count() or 1))
        if videos:
            self._progress("check", 0, len(videos))
        try:
            results = pool.map(self._checked, videos)
            for done, (video, checked) in enumerate(zip(videos, results, strict=True), 1):
                self._note(video, checked)
                self._progress("check", done, len(videos))
        finally:
            pool.shutdown(cancel_futures=True)

    def _checked(self, video: Footage) -> Checked:
        plan = self._encoding.plan
        try:
            content = content_digest(video.path)
            return Checked(content=content, clips=count_clips(video.path, frames=plan.frames, fps=plan.fps))
        except OSError as error:
            return Checked(reason=f"cannot read {video.path}: {reason(error)}")
        except RehyatError as error:
            return Checked(reason=str(error))

    def _note(self, video: Footage, checked: Checked) -> None:
        self._known[Key.of(video)] = checked
        self._ledger.add(Key.of(video), checked)
        if checked.reason:
            self._encoding.check_limit(self._unusable(video for group in self._groups for video in group))

    def _unusable(self, videos: Iterator[Footage]) -> tuple[Unusable, ...]:
        """Those that were no videos to begin with, and those of ``videos`` that turned out not to be."""
        found = list(self._encoding.found.unusable)
        for video in videos:
            key = Key.of(video)
            if (checked := self._known.get(key)) is not None and checked.reason:
                found.append(Unusable(video.name, checked.reason, *key[1:]))
        return tuple(found)

    def _encode_captions(self) -> None:
        settled = set() if self._before is None else {video.caption for video in self._before.videos}
        captions = list(dict.fromkeys(["", *(video.caption for video in self._encoding.found.footage)]))
        stored = {key for shard in shards_of(self._folder, "texts") for key in shard.held}
        groups = self._mine(captions, lambda caption: _caption_key(caption) in settled)
        missing = [[caption for caption in group if _caption_key(caption) not in stored] for group in groups]
        total = sum(map(len, missing))
        if not total:
            return
        encoder, tokens, done = TextEncoder(self._encoding.model, self._encoding.plan), dict[str, int](), 0
        self._progress("captions", 0, total)

        def records(group: list[str]) -> Iterator[tuple[str, bytes]]:
            nonlocal done
            for caption in group:
                text, whole = encoder(caption)
                key = _caption_key(caption)
                tokens[key] = len(text)
                self._cut += not whole
                yield key, pack({"text": text, "caption": caption})
                done += 1
                self._progress("captions", done, total)

        for group in filter(None, missing):
            write_shard(self._folder, _shard_name("texts", map(_caption_key, group)), records(group), tokens=tokens)

    def _encode_videos(self) -> None:
        stored = {key for shard in shards_of(self._folder, "clips") for key in shard.held}
        missing: list[list[tuple[Footage, Checked]]] = []
        for group in self._groups:
            missing.append([])
            for video in group:
                checked = self._known[Key.of(video)]
                if not checked.reason and checked.content not in stored:
                    stored.add(checked.content)
                    missing[-1].append((video, checked))
        total = sum(map(len, missing))
        if not total:
            return
        encode, done = VideoEncoder(self._encoding.model, self._encoding.plan), 0
        self._progress("videos", 0, total)

        def records(group: list[tuple[Footage, Checked]]) -> Iterator[tuple[str, bytes | None]]:
            nonlocal done
            for video, checked in group:
                try:
                    for latents in encode(video):
                        yield checked.content, pack({"latents": latents, "content": checked.content})
                    self._encoded += 1
                except RehyatError as error:
                    self._note(video, dataclasses.replace(checked, reason=str(error)))
                    yield checked.content, None
                done += 1
                self._progress("videos", done, total)

        for videos in filter(None, missing):
            name = _shard_name("clips", (checked.content for _, checked in videos))
            write_shard(self._folder, name, records(videos))

    def _finish(self, *, prune: bool) -> Outcome:
        """The index, if all parts are done."""
        self._known = self._ledger.read() | self._known
        shards = [shard for kind in ("clips", "texts") for shard in shards_of(self._folder, kind, budget=0)]
        index, unusable = self._index(shards), self._unusable(iter(self._encoding.found.footage))
        left = stale = 0
        if index is not None:
            if not index.videos:
                raise ConfigError(f"none of {len(unusable)} videos can be used: {unusable[0].reason}")
            index.write_index()
            self._ledger.clear()
            names = {file.name for file in index.shards}
            for shard in (shard for shard in shards if shard.file.name not in names):
                stale += shard.file.bytes
                if prune:
                    shard.remove(self._folder)
            there = {(video.name, video.content) for video in index.videos}
            before = () if self._before is None else self._before.videos
            left = sum((video.name, video.content) not in there for video in before)
        return Outcome(
            clips=None if index is None else len(index),
            encoded=self._encoded,
            left=left,
            cut=self._cut,
            unusable=unusable,
            stale=stale,
        )

    def _index(self, shards: Sequence[Shard]) -> Prepared | None:
        """Every video where its records are; None while a part is not done."""
        found = {key: (shard, held) for shard in shards for key, held in shard.held.items()}
        used: dict[str, int] = {}  # shards by name, in the order of their first use
        files: list[File] = []

        def place(key: str) -> tuple[int, Held] | None:
            if (one := found.get(key)) is None:
                return None
            shard, held = one
            if shard.file.name not in used:
                used[shard.file.name] = len(files)
                files.append(shard.file)
            return used[shard.file.name], held

        if (empty := place(_caption_key(""))) is None:
            return None
        videos, longest = [], empty[1].tokens
        for video in self._encoding.found.footage:
            if (checked := self._known.get(Key.of(video))) is None:
                return None
            if checked.reason:
                continue
            caption = _caption_key(video.caption)
            clips, text = place(checked.content), place(caption)
            if clips is None or text is None:
                return None
            longest = max(longest, text[1].tokens)
            videos.append(
                Video(
                    name=video.name,
                    size=video.size,
                    modified=video.modified,
                    content=checked.content,
                    shard=clips[0],
                    first=clips[1].first,
                    clips=clips[1].count,
                    caption=caption,
                    text_shard=text[0],
                    text=text[1].first,
                )
            )
        return Prepared(
            folder=self._folder,
            plan=self._encoding.plan,
            tokens=longest,
            shards=tuple(files),
            videos=tuple(videos),
            empty=(empty[0], empty[1].first),
            unusable=self._unusable(iter(self._encoding.found.footage)),
        )


def _shard_name(kind: str, keys: Iterable[str]) -> str:
    """The same records make the same name."""
    return f"{kind}-{hashlib.sha256(' '.join(keys).encode()).hexdigest()[:16]}.array_record"

"""Videos and captions into latents and prompt embeddings, shard by shard.

A shard is written under a partial name and renamed when whole, then described in a file beside it; one that is as its
description says is not made again. So a run may be killed at any time, and that costs a shard at most.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from flax import nnx
from jaxtyping import Array, Float, PyTree, UInt8

from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.models.checkpoints import load_vae, open_component
from rehyat_jax.models.folder import find_model, read_defaults
from rehyat_jax.runtime.files import whole_file
from rehyat_jax.runtime.platform import precision
from rehyat_jax.text.prompt_encoder import TEXT_LENGTH, PromptEncoder
from train.data.footage import Footage, check_length, clips, find_footage
from train.data.prepared import EMPTY, PLAN, File, Plan, Prepared, identity, pack

#: Pixels of a step of the VAE: about a second of 480p would fill a small device, a latent frame of it does not.
_STEP_PIXELS = 1 << 21
#: Called with the videos done and in all.
Progress = Callable[[int, int], None]
#: What two plans must have in common, in words where the name does not say it.
_WORDS = {"footage": "other videos or captions", "vae": "another VAE", "text_encoder": "another text encoder"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoding:
    """What is to be done, checked: nothing was decoded and no weights were read yet."""

    plan: Plan
    source: Path
    footage: tuple[Footage, ...]
    model: Path


def plan_encoding(
    source: Path,
    *,
    model: str,
    frames: int | None,
    height: int | None,
    width: int | None,
    fps: int,
    dtype: str,
    videos_per_shard: int,
) -> Encoding:
    """Find the videos and check all that can be checked of them and of the model.

    Args:
        frames, height, width: of a clip; None: the model's defaults.

    Raises:
        CheckpointError, ConfigError: no such model, size or videos; a video is short or has no caption.
    """
    for name, value in (("fps", fps), ("videos_per_shard", videos_per_shard)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")
    footage, folder = find_footage(source), find_model(model)
    defaults = read_defaults(folder)
    frames, height, width = frames or defaults.num_frames, height or defaults.height, width or defaults.width
    vae: Any = open_component(folder, "vae").config
    transformer: Any = open_component(folder, "transformer").config
    if (frames - 1) % vae.temporal_factor:
        raise ConfigError(f"{frames} frames are not {vae.temporal_factor}k + 1")
    for side, of_patch in zip((height, width), transformer.patch_size[1:], strict=True):
        if side % (vae.spatial_factor * of_patch):
            raise ConfigError(f"a side of {side} is no multiple of {vae.spatial_factor * of_patch} pixels")
    for video in footage:
        check_length(video.path, frames=frames, fps=fps)
    text = PromptEncoder(folder, dtype=jnp.dtype(dtype))
    tokens = text.tokenizer.encode([*(video.caption for video in footage), ""], TEXT_LENGTH).mask.sum(axis=1)
    shape = ((frames - 1) // vae.temporal_factor + 1, height // vae.spatial_factor, width // vae.spatial_factor)
    plan = Plan(
        footage=_digest(source, footage),
        vae=identity(folder, "vae"),
        text_encoder=identity(folder, "text_encoder"),
        frames=frames,
        height=height,
        width=width,
        fps=fps,
        latents=(*shape, vae.z_dim),
        text=(int(tokens.max()), text.text_dim),
        dtype=dtype,
        videos=len(footage),
        videos_per_shard=videos_per_shard,
    )
    return Encoding(plan=plan, source=source, footage=tuple(footage), model=folder)


def _digest(source: Path, footage: list[Footage]) -> str:
    digest = hashlib.sha256()
    for video in footage:
        entry = [video.path.relative_to(source).as_posix(), video.path.stat().st_size, video.caption]
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()


def encode_footage(
    encoding: Encoding, folder: Path, *, part: int = 1, parts: int = 1, progress: Progress = lambda done, total: None
) -> int:
    """Make what is missing of ``folder``, or a part of its shards; the index when no part is missing any more.

    Returns:
        Clips in the folder.

    Raises:
        ConfigError: the folder is something else, or is being made by another plan.
        RehyatError: a video is damaged; a file cannot be written.
    """
    plan = encoding.plan
    _take(folder, plan)
    encode = _Encoder(encoding)
    mine, done = range(part - 1, plan.shards, parts), 0
    total = sum(len(_videos(encoding, number)) for number in mine)
    progress(0, total)
    for number in mine:
        name, videos = plan.shard(number), _videos(encoding, number)
        if _described(folder, name) is None:
            _write(folder / name, _records(encoding, videos, encode))
        done += len(videos)
        progress(done, total)
    if _described(folder, EMPTY) is None:
        with whole_file(folder / EMPTY) as partial:
            partial.write_bytes(pack({"text": encode.text("")}))
        _describe(folder / EMPTY, clips=0)
    empty, shards = _described(folder, EMPTY), [_described(folder, plan.shard(number)) for number in range(plan.shards)]
    whole = tuple(shard for shard in shards if shard is not None)
    if empty is not None and len(whole) == plan.shards:
        Prepared(folder=folder, plan=plan, shards=whole, empty=empty).write_index()
    return sum(shard.clips for shard in whole)


def _take(folder: Path, plan: Plan) -> None:
    """The folder is this plan's from now on."""
    if (folder / PLAN).is_file():
        try:
            theirs = Plan.from_dict(json.loads((folder / PLAN).read_text(encoding="utf-8")))
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{folder / PLAN} is damaged: choose another folder, or remove this one") from error
        for field in dataclasses.fields(Plan):
            before, now = getattr(theirs, field.name), getattr(plan, field.name)
            if before != now:
                what = _WORDS.get(field.name, f"{field.name} {before} instead of {now}")
                raise ConfigError(f"{folder} holds data made with {what}: choose another folder, or remove this one")
    elif folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and was not made by rehyat prepare: choose another folder")
    else:
        with whole_file(folder / PLAN) as partial:
            partial.write_text(json.dumps(dataclasses.asdict(plan), indent=1) + "\n", encoding="utf-8")


def _videos(encoding: Encoding, shard: int) -> tuple[Footage, ...]:
    count = encoding.plan.videos_per_shard
    return encoding.footage[shard * count : (shard + 1) * count]


class _Encoder:
    """The networks, read when they are first needed."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self._dtype = jnp.dtype(encoding.plan.dtype)
        self._prompts = PromptEncoder(encoding.model, dtype=self._dtype)

    def text(self, caption: str) -> Float[np.ndarray, "L D"]:
        """The caption's embedding, its tokens alone."""
        with precision(self._dtype):
            length = int(self._prompts.tokenizer.encode(caption, TEXT_LENGTH).mask.sum())
            return np.asarray(self._prompts(caption)[0, :length].astype(self._dtype))

    def latents(self, clip: UInt8[np.ndarray, "F H W 3"]) -> Float[np.ndarray, "T h w z"]:
        """Normalised."""
        with precision(jnp.float32):
            return np.asarray(self._video(clip))

    @functools.cached_property
    def _video(self) -> Callable[[np.ndarray], Array]:
        vae = load_vae(self._encoding.model)
        (graph, params), plan = nnx.split(vae), self._encoding.plan
        step = max(_STEP_PIXELS // (plan.height * plan.width * vae.config.temporal_factor), 1)

        @jax.jit
        def encode(params: PyTree, clip: Array) -> Array:
            vae = nnx.merge(graph, params)
            video = clip[None].astype(jnp.float32) / 127.5 - 1.0
            return vae.normalize(vae.encode(video, frames_per_step=step))[0].astype(self._dtype)

        return lambda clip: encode(params, clip)


def _records(encoding: Encoding, videos: tuple[Footage, ...], encode: _Encoder) -> Iterator[bytes]:
    plan = encoding.plan
    for video in videos:
        text, name = encode.text(video.caption), video.path.relative_to(encoding.source).as_posix()
        for clip in clips(video.path, frames=plan.frames, fps=plan.fps, height=plan.height, width=plan.width):
            yield pack({"latents": encode.latents(clip), "text": text, "caption": video.caption, "video": name})


def _write(path: Path, records: Iterator[bytes]) -> None:
    """A shard, whole or not at all, and its description."""
    for left in path.parent.glob(f".{path.name[:40]}.*.partial"):  # by a process that was killed
        left.unlink(missing_ok=True)
    count = 0
    with whole_file(path) as partial:
        try:
            writer = ArrayRecordWriter(str(partial), "group_size:1")
            for record in records:
                writer.write(record)
                count += 1
            writer.close()
        except (RuntimeError, ValueError) as error:  # of pybind11, for Riegeli's failures
            raise RehyatError(f"cannot write {path}: {str(error).splitlines()[0][:200]}") from error
        with partial.open("rb") as file:
            os.fsync(file.fileno())
    _describe(path, clips=count)


def _describe(path: Path, *, clips: int) -> None:
    with whole_file(path.with_name(f"{path.name}.json")) as partial:
        partial.write_text(json.dumps(dataclasses.asdict(File.of(path, clips=clips))) + "\n", encoding="utf-8")


def _described(folder: Path, name: str) -> File | None:
    """A file that was finished and is as it was, else None."""
    try:
        file = File(**json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return file if file.name == name and file.is_whole(folder) else None

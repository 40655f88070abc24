"""Videos that are no growing mp4: animations, folders of pictures, raw frames to a pipe, and batches of whole mp4s."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rehyat_jax.cli.generate_stream import Request, begun, described
from rehyat_jax.errors import RehyatError

if TYPE_CHECKING:
    import numpy as np

    from rehyat_jax.cli.progress import ProgressDisplay
    from rehyat_jax.pipeline import TextToVideo
    from rehyat_jax.runtime.record import Phases
    from rehyat_jax.sampling.settings import Settings

#: Of a name, in bytes, on every file system that is common.
_LONGEST_NAME = 255


def settings_of(pipe: TextToVideo, request: Request, *, streams: bool) -> Settings:
    """How the video is made, every value resolved."""
    if not streams:
        return pipe.settings(num_frames=request.frames, **request.sampling)
    chunk = 1 + pipe.vae.config.temporal_factor * (pipe.transformer.chunk_frames() - 1)
    return pipe.settings(num_frames=chunk, **request.sampling)


def blocks_of(
    pipe: TextToVideo, request: Request, *, streams: bool, display: ProgressDisplay, phases: Phases
) -> Iterator[np.ndarray]:
    """The video's frames, block by block as a stream makes them, or in one.

    Raises:
        RehyatError: as `TextToVideo.open_stream` and `TextToVideo.run`.
    """
    if not streams:
        settings = settings_of(pipe, request, streams=False)
        negative, seed = request.negative_prompt, request.seed
        yield pipe.run(
            request.prompt,
            settings,
            negative_prompt=negative,
            seed=seed,
            images=request.images,
            on_step=display,
            phases=phases,
        )
        return
    display("text", 0, 1)
    with phases.measure("text"):
        stream = begun(pipe, request)
    stream.ahead, stream.until = stream.gains_ahead, request.frames
    display("text", 1, 1)
    done = stream.frames_done
    if stream.beginning is not None:
        yield stream.beginning
    while done < request.frames:
        if request.timeline is not None:
            request.timeline.steer(stream, fps=pipe.fps)
        with phases.measure("chunks"):
            block = next(stream)[: request.frames - done]
        done += len(block)
        display("frames", done, request.frames)
        yield block


def write_other(
    pipe: TextToVideo,
    request: Request,
    out: Path,
    record_path: Path | None,
    *,
    streams: bool,
    display: ProgressDisplay,
    phases: Phases,
    record: Mapping[str, Any],
) -> Settings:
    """Write the video as its name says, and its record if it has one.

    Raises:
        RehyatError: as `blocks_of`; the file cannot be written.
    """
    from rehyat_jax.runtime.record import write_record
    from rehyat_jax.video.formats import write_video

    settings = settings_of(pipe, request, streams=streams)
    write_video(out, blocks_of(pipe, request, streams=streams, display=display, phases=phases), fps=pipe.fps)
    if record_path is not None:
        made = dataclasses.asdict(settings) | {
            "solver": str(settings.solver),
            "num_frames": request.frames,
            "sweep": "per-chunk" if streams else "per-step",
        }
        write_record(record_path, command="rehyat generate", settings=dict(record) | made, phases=phases, output=out)
    return settings


@dataclasses.dataclass(frozen=True)
class BatchVideo:
    """One video of a batch: the prompt, its number among the prompt's videos, and its file."""

    prompt: str
    number: int
    path: Path


def read_batch(prompts: Path, folder: Path, *, count: int) -> list[BatchVideo]:
    """The videos of a file of prompts, one prompt a line: ``{prompt}-{i}.mp4``, i from 0, as VBench reads them.

    Raises:
        RehyatError: a line is no name of a file, or stands twice; its number is told. A file that is there was not made
            by this program for its prompt.
    """
    from rehyat_jax.text.files import numbered_lines, read_text

    videos: list[BatchVideo] = []
    lines: dict[str, int] = {}
    for line, prompt in numbered_lines(read_text(prompts)):
        where = f"{prompts}, line {line}"
        if any(c in prompt for c in ("/", "\0", os.sep)):
            raise RehyatError(f"{where}: a prompt that is a file's name has no {'/' if '/' in prompt else 'such sign'}")
        if prompt in lines:
            raise RehyatError(f"{where}: the same prompt stands in line {lines[prompt]}; --count makes several of each")
        lines[prompt] = line
        for number in range(count):
            path = folder / f"{prompt}-{number}.mp4"
            if len(path.name.encode()) > _LONGEST_NAME:
                raise RehyatError(
                    f"{where}: the prompt is too long for a file's name ({len(path.name.encode())} bytes)"
                )
            videos.append(BatchVideo(prompt, number, path))
    if not videos:
        raise RehyatError(f"{prompts} has no prompts")
    for video in videos:
        if video.path.exists() and _told(video.path).get("prompt") != video.prompt:
            raise RehyatError(f"{video.path} is there, and was not made by rehyat for this prompt: move it")
    return videos


def make_batch(
    pipe: TextToVideo,
    request: Request,
    videos: list[BatchVideo],
    *,
    streams: bool,
    model: str,
    display: ProgressDisplay,
    phases: Phases,
) -> int:
    """Make those of the videos that are not there; each stands under its name when it is whole.

    Args:
        request: of every video, but for its prompt; the i-th of a prompt has the noise of ``seed + i``.

    Returns:
        How many were made now.

    Raises:
        RehyatError: a video that is there was made with other settings; as `blocks_of`.
    """
    from rehyat_jax.runtime.files import remove_leftovers
    from rehyat_jax.video.io import check_video_room, write_video

    settings = settings_of(pipe, request, streams=streams)
    missing: list[tuple[BatchVideo, Request, dict[str, str]]] = []
    for video in videos:
        mine = dataclasses.replace(request, prompt=video.prompt, seed=request.seed + video.number)
        metadata = described(mine, settings, model=model, loras=pipe.loras)
        if not video.path.exists():
            missing.append((video, mine, metadata))
        elif _told(video.path) != json.loads(metadata["comment"]):
            raise RehyatError(f"{video.path} was made with another seed, model or settings: name another folder")
    check_video_room(videos[0].path, len(missing) * request.frames, height=settings.height, width=settings.width)
    for made, (video, mine, metadata) in enumerate(missing):
        display("videos", len(videos) - len(missing) + made, len(videos))
        remove_leftovers(video.path)
        quiet = _Quiet()
        try:
            frames = blocks_of(pipe, mine, streams=streams, display=quiet, phases=phases)  # type: ignore[arg-type]
            write_video(video.path, frames, fps=pipe.fps, metadata=metadata)
        except KeyboardInterrupt:
            whole = len(videos) - len(missing) + made
            raise KeyboardInterrupt(f"{whole} of {len(videos)} videos are whole; the same command goes on") from None
    display("videos", len(videos), len(videos))
    return len(missing)


class _Quiet:
    """Shows nothing: a batch's progress is its videos."""

    def __call__(self, part: str, done: int, total: int) -> None: ...


def _told(path: Path) -> Mapping[str, Any]:
    """What a video says of how rehyat made it; nothing of any other file."""
    import av

    from rehyat_jax.video.containers import address

    with suppress(av.error.FFmpegError, OSError, ValueError, UnicodeDecodeError, RecursionError):
        with av.open(address(path)) as container:
            told = json.loads(container.metadata.get("comment", ""))
        if isinstance(told, dict) and told.get("made_by") == "rehyat":
            return told
    return {}

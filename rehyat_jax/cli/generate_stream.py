"""A video written while it is made: chunk, decoder, encoder; beside it lies the state from which the stream goes on.

What is on disk is sound at every moment. A chunk's frames are appended whole, then the state after them is saved whole;
a run that goes on cuts the video back to the frames of the state it finds and makes the rest again, the same bytes.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rehyat_jax.errors import RehyatError
from rehyat_jax.runtime.files import whole_file

if TYPE_CHECKING:
    from rehyat_jax.cli.progress import ProgressDisplay
    from rehyat_jax.pipeline import TextToVideo
    from rehyat_jax.runtime.record import Phases
    from rehyat_jax.sampling.settings import Settings
    from rehyat_jax.streams.stream import Stream
    from rehyat_jax.streams.timeline import Timeline
    from rehyat_jax.video.growing import GrowingVideo
    from rehyat_jax.video.images import Images

#: The state is saved after every chunk, unless saving it would then take more than a quarter of the time.
_PATIENCE = 3.0
_THUMBNAILS = 12
_LONGEST = 1 << 26


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs:
    """The files of a run, and the folder that is there as long as the video is not whole."""

    video: Path
    sheet: Path
    record: Path

    @property
    def state(self) -> Path:
        return self.video.with_name(f"{self.video.name}.state")

    def saved(self) -> list[Path]:
        """A saved stream's files, those that a killed process began among them."""
        with suppress(NotADirectoryError, FileNotFoundError):
            return [file for file in self.state.iterdir() if "stream.safetensors" in file.name]
        return []

    def forget(self) -> None:
        """Remove the state; whatever else lies in its folder stays."""
        for file in self.saved():
            file.unlink(missing_ok=True)
        with suppress(OSError):
            self.state.rmdir()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for; ``sampling`` are the arguments of ``TextToVideo.settings`` that a stream takes."""

    prompt: str
    negative_prompt: str
    seed: int
    frames: int
    images: Images
    sampling: Mapping[str, Any]
    #: Sentences by second, in the place of the one prompt.
    timeline: Timeline | None = None
    #: A video that the stream goes on from; its frames count.
    beginning: Path | None = None


def described(request: Request, settings: Settings, *, model: str, loras: Mapping[str, float]) -> dict[str, str]:
    """What the video itself says of how it was made."""
    from rehyat_jax.video.metadata import generation_metadata

    return generation_metadata(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        seed=request.seed,
        model=model,
        loras=loras,
        settings=dataclasses.asdict(settings)
        | {"solver": str(settings.solver), "num_frames": request.frames}
        | ({} if request.timeline is None else {"timeline": dict(request.timeline.sentences)}),
    )


def check_outputs(outputs: Outputs, *, resume: bool) -> None:
    """Learn before the model is read that the run cannot begin.

    Raises:
        RehyatError: the state has no place, or there is none to go on from and a video stands where a new one would.
    """
    if outputs.state.exists() and not outputs.state.is_dir():
        raise RehyatError(f"the stream's state cannot be kept in {outputs.state}: it is a file, not a folder")
    if resume and not outputs.saved() and not _is_hardly_begun(outputs.video):
        outputs.forget()  # of a run that was killed with its last file removed, and not yet the folder
        raise RehyatError(
            f"{outputs.video} cannot be gone on with: {outputs.state}, which a video leaves until it is finished, is "
            "missing"
        )


def _is_hardly_begun(path: Path) -> bool:
    """No frames, or the first block alone: what a run leaves that was killed before it saved a first state."""
    from rehyat_jax.video.growing import whole_frames

    if not path.exists():
        return True
    with open(path, "rb") as file:
        empty = not file.read(8).strip(b"\0")  # a block whose writing was cut short begins with zeros
    frames = list(whole_frames(path))
    return empty or (len(frames) == 1 and frames[0] > 0)


def stream_video(
    pipe: TextToVideo,
    request: Request,
    outputs: Outputs,
    *,
    resume: bool,
    display: ProgressDisplay,
    phases: Phases,
    record: Mapping[str, Any],
) -> Settings:
    """Make the video, or the rest of it; then its contact sheet and its record.

    Args:
        resume: go on from the state beside the video; where there is none yet, begin.
        record: further settings for the record.

    Returns:
        How it was made, every value resolved.

    Raises:
        RehyatError: the model cannot stream, the state is not one of this request, or a file cannot be written.
    """
    from rehyat_jax.runtime.devices import agreed, wait_for_all
    from rehyat_jax.video.growing import GrowingVideo, reopen_video
    from rehyat_jax.video.io import check_video_room

    chunk = pipe.transformer.chunk_frames()  # raises where the model cannot stream, before any file is made
    if not 1 <= request.frames <= _LONGEST:
        raise RehyatError(f"a stream can have 1 to {_LONGEST} frames, not {request.frames}")
    resume = bool(agreed(resume and bool(outputs.saved())))
    if resume and _is_finished(outputs.video):  # it was killed after its last chunk
        reopen_video(outputs.video, outputs.video)
    settings = pipe.settings(num_frames=1 + pipe.vae.config.temporal_factor * (chunk - 1), **request.sampling)
    metadata = described(request, settings, model=str(record["model"]), loras=pipe.loras)
    with GrowingVideo(outputs.video, fps=pipe.fps, metadata=metadata) as video:
        display("text", 0, 1)
        with phases.measure("text"):
            stream = _resumed(pipe, request, outputs) if resume else begun(pipe, request)
        stream.ahead, stream.until = stream.gains_ahead, request.frames
        display("text", 1, 1)
        wait_for_all("read")  # before the state can change or go
        after = stream.frames_done
        if resume:
            video.go_on(after=after)
        elif stream.beginning is not None:
            outputs.forget()  # of the video that is replaced now
            video.begin_chapter(stream.prompt)
            video.append(stream.beginning)
            stream.save(outputs.state)
        check_video_room(
            outputs.video,
            max(request.frames - after, 0),
            height=stream.settings.height,
            width=stream.settings.width,
        )
        try:
            _fill(video, stream, outputs, request=request, fps=pipe.fps, display=display, phases=phases)
            display("write", 0, 1)
            made = dataclasses.asdict(stream.settings) | {
                "solver": str(stream.settings.solver),
                "num_frames": video.frames,
                "sweep": "per-chunk",
                "resumed_after": after,
            }
            _finish(outputs, fps=pipe.fps, phases=phases, settings=dict(record) | made)
            display("write", 1, 1)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_kept(video, outputs)) from None
        except RehyatError as error:
            raise type(error)(f"{error}; {_kept(video, outputs)}") from error
    return stream.settings


def follow_video(pipe: TextToVideo, request: Request, outputs: Outputs) -> None:
    """The part of a process that is not the first in `stream_video`: the same chunks, and nothing is written.

    Raises:
        RehyatError: as `stream_video`; the state is not to be read here.
    """
    from rehyat_jax.runtime.devices import agreed, wait_for_all

    resume = bool(agreed(0))
    stream = _resumed(pipe, request, outputs) if resume else begun(pipe, request)
    stream.until = request.frames
    wait_for_all("read")
    frames = stream.frames_done
    if not resume and stream.beginning is not None:
        stream.save(outputs.state)
    while frames < request.frames:
        if request.timeline is not None:
            request.timeline.steer(stream, fps=pipe.fps)
        frames += len(next(stream))
        if agreed(0):
            stream.save(outputs.state)


def begun(pipe: TextToVideo, request: Request) -> Stream:
    """A new stream of a request.

    Raises:
        RehyatError: as `TextToVideo.open_stream`; there is a last image, or the beginning leaves no frame to make.
    """
    if request.images.last is not None:
        raise RehyatError(
            "--last-image is of a video with an end: a per-chunk sweep makes one without (--sweep per-step)"
        )
    stream = pipe.open_stream(
        request.prompt,
        negative_prompt=request.negative_prompt,
        seed=request.seed,
        beginning=request.beginning,
        image=request.images.first,
        **request.sampling,
    )
    if stream.frames_done >= request.frames:
        raise RehyatError(
            f"{request.beginning} gives {stream.frames_done} frames, which count: --frames must be more, not "
            f"{request.frames}"
        )
    return stream


def _resumed(pipe: TextToVideo, request: Request, outputs: Outputs) -> Stream:
    """
    Raises:
        RehyatError: the stream was begun otherwise than is asked for now, or is longer already.
    """
    stream = pipe.resume_stream(outputs.state)
    was, asked = stream.settings, pipe.settings(num_frames=stream.settings.num_frames, **request.sampling)
    for name in vars(was):
        if getattr(was, name) != getattr(asked, name):
            raise RehyatError(
                f"the stream in {outputs.state} was begun with {name} {getattr(was, name)}, not {getattr(asked, name)}"
            )
    if stream.seeds != (request.seed,):
        raise RehyatError(f"the stream in {outputs.state} was begun with another seed than {request.seed}")
    done = stream.frames_done
    if done > request.frames:
        raise RehyatError(f"{outputs.video} has {done} frames already, more than the {request.frames} asked for")
    if request.timeline is not None:
        request.timeline.steer(stream, fps=pipe.fps)
    elif (stream.prompt, stream.negative_prompt) != (request.prompt, request.negative_prompt):
        print(f"rehyat: other prompts than so far, from frame {done} on", file=sys.stderr)
        stream.change_prompt(request.prompt, request.negative_prompt)
    return stream


def _fill(
    video: GrowingVideo,
    stream: Stream,
    outputs: Outputs,
    *,
    request: Request,
    fps: int,
    display: ProgressDisplay,
    phases: Phases,
) -> None:
    """Append chunks until there are as many frames as asked for, the last one cut; the state is saved on the way."""
    from rehyat_jax.runtime.devices import agreed

    saved_at, cost, first, frames = time.monotonic(), 0.0, True, request.frames
    while video.frames < frames:
        if first:  # it waits for the compiler, so that its pace says nothing of the others'
            display("begin", 0, 1)
        with phases.measure("chunks"):
            if request.timeline is not None:
                request.timeline.steer(stream, fps=fps)
            block = next(stream)
        if first:
            display("begin", 1, 1)
            first = False
        with phases.measure("encode"):
            if not video.frames:
                outputs.forget()  # of the video that is replaced now
            video.begin_chapter(stream.prompt)
            video.append(block[: frames - video.frames])
        display("frames", video.frames, frames)
        now = time.monotonic()
        if agreed(video.frames < frames and now - saved_at >= _PATIENCE * cost):
            with phases.measure("save"):
                stream.save(outputs.state)
            saved_at = time.monotonic()
            cost = saved_at - now


def _finish(outputs: Outputs, *, fps: int, phases: Phases, settings: Mapping[str, Any]) -> None:
    """The three files appear together, then the state goes."""
    from rehyat_jax.runtime.record import write_record
    from rehyat_jax.video.growing import finish_video, spaced_frames
    from rehyat_jax.video.io import contact_sheet

    with ExitStack() as files:
        video, sheet, record = (
            files.enter_context(whole_file(path)) for path in (outputs.video, outputs.sheet, outputs.record)
        )
        with phases.measure("write"):
            finish_video(outputs.video, video)
            contact_sheet(sheet, spaced_frames(video, count=_THUMBNAILS, fps=fps), output=outputs.video)
        write_record(record, command="rehyat generate", settings=settings, phases=phases, output=outputs.video)
    outputs.forget()


def _is_finished(path: Path) -> bool:
    """An ordinary video, not a growing one."""
    from rehyat_jax.video.growing import whole_frames

    return max(whole_frames(path), default=None) == 0


def _kept(video: GrowingVideo, outputs: Outputs) -> str:
    """What a run that ends early leaves, and how it is gone on with."""
    if not video.frames:
        return "nothing was written"
    more = "; the same command with --resume goes on" if outputs.saved() else ""
    return f"{outputs.video} plays as it is, {video.frames} frames{more}"

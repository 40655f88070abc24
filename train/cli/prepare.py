"""Encode a folder of videos with captions, once, for training that reads latents and prompt embeddings."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from rehyat_jax.cli.arguments import parse_options
from rehyat_jax.errors import ConfigError
from rehyat_jax.runtime.files import check_writable, remove_leftovers
from rehyat_jax.runtime.outputs import check_ours, locked

if TYPE_CHECKING:
    from train.data.encoding import Outcome

#: Videos that are passed over, told one by one.
_TOLD = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepare:
    """Encode a folder of videos with captions into DST, which `rehyat finetune` and `rehyat distill` read.

    A video's caption is the text file of the same name beside it (a.mp4, a.txt); or metadata.jsonl in SRC names both, a
    line a video: {"file_name": "a.mp4", "caption": "a lemon …"}, or a metadata.csv or metadata.json does. A folder of
    numbered pictures is a video too. Videos that cannot be used are passed over and told of. A run that was stopped or
    killed goes on when the same command is given again; when SRC has changed, it makes what is missing and no more.
    """

    source: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SRC")]]
    """The folder of videos."""

    destination: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DST")]]
    """The folder to make, or to continue."""

    model: str = "mini-sprites"
    """A bundled model's name or a model's folder: whose VAE and text encoder."""

    frames: int | None = None
    """Of a clip; the model's own number when not given. A longer video gives several clips, each with its caption."""

    size: Annotated[str | None, tyro.conf.arg(metavar="WxH")] = None
    """Of a clip; the model's own when not given. Frames are scaled to cover it, and cut on both sides."""

    fps: int = 16
    """Frames a second that the model is trained at: of a video at another rate the nearest in time are taken."""

    dtype: Annotated[Literal["bfloat16", "float32"], tyro.conf.arg(metavar="bfloat16|float32")] = "bfloat16"
    """Of the stored numbers, and of the text encoder's computation; the VAE computes in float32."""

    videos_per_shard: int = 64
    """Videos in a file."""

    captions: Path | None = None
    """A list of videos and captions: .jsonl, .json, .csv or .tsv. Its paths are within SRC, or absolute."""

    file_column: str = "file_name"
    """What the list calls a video's path."""

    caption_column: str = "caption"
    """What the list calls a caption."""

    repair_prompts: bool = True
    """Repair the captions' text (curly quotes, full-width letters, mistaken encodings), as Wan's own code does."""

    most_unusable: int | None = None
    """More videos than so many that cannot be used end the run; half of all when not given."""

    retry: bool = False
    """Try the videos again that could not be used, although they are as they were."""

    force: bool = False
    """Begin although the memory of this machine is estimated to be too small."""

    prune: bool = False
    """Remove the files of DST that hold nothing but videos and captions that SRC has no more."""

    part: Annotated[str, tyro.conf.arg(metavar="I/N")] = "1/1"
    """Encode every N-th shard from the I-th on, beside other processes that do the other parts of the same DST."""


def main(argv: list[str]) -> None:
    """``rehyat prepare SRC DST``.

    Raises:
        RehyatError: a mistake in the arguments, the videos, the captions or the model; a file cannot be written.
    """
    options = parse_options(Prepare, argv, command="prepare")
    part, parts = _numbers(options.part, "/", "--part must be a number of a part and of parts as 2/8")
    if not 1 <= part <= parts:
        raise ConfigError(f"--part {options.part} is no part: the first is 1/{parts} and the last {parts}/{parts}")
    size = "--size must be a width and a height as 832x480"
    width, height = (None, None) if options.size is None else _numbers(options.size, "[xX×*]", size)
    suffix = "" if parts == 1 else f"-{part}of{parts}"
    # By its own name: "." and ".." have none.
    destination = Path(os.path.abspath(options.destination.expanduser()))
    if not destination.name:
        raise ConfigError(f"cannot prepare videos in {options.destination}: name a folder in it")
    record = destination.with_name(f"{destination.name}{suffix}.json")
    check_writable(record)

    from rehyat_jax.cli.progress import ProgressDisplay
    from rehyat_jax.runtime.compilation import cache_folder, keep_compiled
    from rehyat_jax.runtime.memory import check_memory
    from rehyat_jax.runtime.record import Phases, write_record
    from train.data.encode_plan import ClipSettings, memory_need, plan_encoding, smaller_size
    from train.data.encoding import encode_footage
    from train.data.footage import find_footage

    keep_compiled(cache_folder())
    phases = Phases()
    own = destination.with_name(f"{destination.name}{suffix}")
    with locked(own, command="rehyat prepare"):
        check_ours(destination, beside=[record])
        remove_leftovers(record)
        with phases.measure("find"):
            found = find_footage(
                options.source,
                captions=options.captions,
                file_column=options.file_column,
                caption_column=options.caption_column,
            )
            if found.unlisted:
                _say(f"{found.unlisted} videos in {options.source} are not in the list, and are left out")
            settings = ClipSettings(
                frames=options.frames,
                height=height,
                width=width,
                fps=options.fps,
                dtype=options.dtype,
                repair_prompts=options.repair_prompts,
            )
            encoding = plan_encoding(
                found,
                settings,
                model=options.model,
                videos_per_shard=options.videos_per_shard,
                most_unusable=options.most_unusable,
            )
        check_memory(
            memory_need(encoding),
            what=f"clips of {encoding.plan.frames} frames of {encoding.plan.width}x{encoding.plan.height}",
            smaller=lambda: smaller_size(encoding),
            force=options.force,
        )
        with ProgressDisplay() as display, phases.measure("encode"):
            outcome = encode_footage(
                encoding,
                options.destination,
                part=part,
                parts=parts,
                retry=options.retry,
                prune=options.prune,
                progress=display,
            )
        _report(outcome, options)
        write_record(
            record,
            command="rehyat prepare",
            settings=dataclasses.asdict(options),
            phases=phases,
            output=options.destination,
            **dataclasses.asdict(outcome) | {"unusable": [video._asdict() for video in outcome.unusable]},
        )
    print(options.destination)


def _report(outcome: Outcome, options: Prepare) -> None:
    if outcome.clips is None:
        _say(f"this part is done, and others are not: {options.destination} is finished when they are")
    if outcome.cut:
        _say(f"{outcome.cut} captions are longer than the text encoder reads: their ends do not count")
    if outcome.left:
        _say(f"{outcome.left} videos that {options.destination} had are gone or have changed")
    if outcome.stale:
        size = f"{outcome.stale / 1e6:.1f} MB in {options.destination} hold nothing that {options.source} still has"
        _say(f"{size}, and were removed" if options.prune else f"{size}: --prune removes them")
    for video in outcome.unusable[:_TOLD]:
        _say(f"passed over: {video.reason}")
    if (more := len(outcome.unusable) - _TOLD) > 0:
        _say(f"passed over: {more} more, all of them in the record")


def _say(sentence: str) -> None:
    print(f"rehyat: {sentence}", file=sys.stderr)


def _numbers(text: str, between: str, wanted: str) -> tuple[int, int]:
    match = re.fullmatch(rf"(\d{{1,6}}){between}(\d{{1,6}})", text.strip(), flags=re.ASCII)
    if not match:
        raise ConfigError(f"{wanted}, not {text!r}")
    return int(match[1]), int(match[2])

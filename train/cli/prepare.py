"""Encode a folder of videos with captions, once, for training that reads latents and prompt embeddings."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rehyat_jax.errors import ConfigError
from rehyat_jax.runtime.files import check_writable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepare:
    """Encode a folder of videos with captions into DST, which `rehyat finetune` and `rehyat distill` read.

    A video's caption is the text file of the same name beside it (a.mp4, a.txt); or metadata.jsonl in SRC names both, a
    line a video: {"file_name": "a.mp4", "caption": "a lemon …"}. A run that was stopped or killed goes on, where a
    shard was not finished, when the same command is given again.
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

    part: Annotated[str, tyro.conf.arg(metavar="I/N")] = "1/1"
    """Encode every N-th shard from the I-th on, beside other processes that do the other parts of the same DST."""


def main(argv: list[str]) -> None:
    """``rehyat prepare SRC DST``.

    Raises:
        RehyatError: a mistake in the arguments, the videos, the captions or the model; a file cannot be written.
    """
    options = tyro.cli(Prepare, args=argv, prog="rehyat prepare")
    part, parts = _numbers(options.part, "/", "--part must be a number of a part and of parts as 2/8")
    if not 1 <= part <= parts:
        raise ConfigError(f"--part {options.part} is no part: the first is 1/{parts} and the last {parts}/{parts}")
    size = "--size must be a width and a height as 832x480"
    width, height = (None, None) if options.size is None else _numbers(options.size, "[xX×*]", size)
    suffix = "" if parts == 1 else f"-{part}of{parts}"
    record = options.destination.with_name(f"{options.destination.name}{suffix}.json")
    check_writable(record)

    from rehyat_jax.cli.progress import ProgressDisplay
    from rehyat_jax.runtime.compilation import cache_folder, keep_compiled
    from rehyat_jax.runtime.record import Phases, write_record
    from train.data.encoding import encode_footage, plan_encoding

    keep_compiled(cache_folder())
    phases = Phases()
    with phases.measure("check"):
        encoding = plan_encoding(
            options.source,
            model=options.model,
            frames=options.frames,
            height=height,
            width=width,
            fps=options.fps,
            dtype=options.dtype,
            videos_per_shard=options.videos_per_shard,
        )
    with ProgressDisplay() as display, phases.measure("encode"):
        clips = encode_footage(
            encoding,
            options.destination,
            part=part,
            parts=parts,
            progress=lambda done, total: display("videos", done, total),
        )
    write_record(record, command="rehyat prepare", settings=dataclasses.asdict(options), phases=phases, clips=clips)
    print(options.destination)


def _numbers(text: str, between: str, wanted: str) -> tuple[int, int]:
    match = re.fullmatch(rf"(\d{{1,6}}){between}(\d{{1,6}})", text.strip(), flags=re.ASCII)
    if not match:
        raise ConfigError(f"{wanted}, not {text!r}")
    return int(match[1]), int(match[2])

"""The models of a server: what opens, resumes and describes its streams."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from rehyat_jax.errors import CheckpointError, RehyatError
from rehyat_jax.pipeline import TextToVideo
from rehyat_jax.serve.app import Model
from rehyat_jax.serve.wish import Wish
from rehyat_jax.streams.stream import Stream
from rehyat_jax.video.metadata import generation_metadata


class Models:
    """Pipelines by the names that clients choose by; the first is meant where none is named.

    Args:
        steps: denoising steps where a client asks for none; "auto": as many as each makes at its frame rate, measured.

    Raises:
        RehyatError: one cannot stream, or they have different frame rates.
    """

    def __init__(self, pipes: Mapping[str, TextToVideo], steps: int | Literal["auto"] | None) -> None:
        self.pipes = pipes
        for pipe in pipes.values():
            if (why := pipe.why_not_stream()) is not None:
                raise RehyatError(why)
        rates = {name: pipe.fps for name, pipe in pipes.items()}
        if len(set(rates.values())) > 1:
            told = ", ".join(f"{name} {rate}" for name, rate in rates.items())
            raise RehyatError(f"the models of one server have one frame rate, and these have {told}")
        self._steps = {name: _measured(name, pipe) if steps == "auto" else steps for name, pipe in pipes.items()}

    def about(self) -> tuple[Model, ...]:
        """What the page is told of each."""
        return tuple(
            Model(
                name=name,
                steps=self._steps[name] or pipe.defaults.num_inference_steps,
                offered_steps=tuple(pipe.defaults.offered_steps),
                guidance=pipe.defaults.guidance_scale,
                guided=pipe.defaults.guidance_scale > 1,
            )
            for name, pipe in self.pipes.items()
        )

    def opened(self, wish: Wish) -> Stream:
        """
        Raises:
            RehyatError: there is no such model, or it cannot make what is wished for.
        """
        name = wish.model or next(iter(self.pipes))
        if name not in self.pipes:
            raise RehyatError(f"there is no model {name[:80]!r} here, only {', '.join(self.pipes)}")
        stream = self.pipes[name].open_stream(
            wish.prompt,
            negative_prompt=wish.negative_prompt,
            seed=wish.seed,
            num_inference_steps=wish.num_inference_steps or self._steps[name],
            guidance_scale=wish.guidance_scale,
            image=wish.image,
            width=wish.width,
            height=wish.height,
        )
        stream.label, stream.ahead = name, stream.gains_ahead
        return stream

    def resumed(self, folder: Path) -> Stream:
        """A saved stream, by whichever model made it.

        Raises:
            CheckpointError: none did, or it is damaged.
        """
        for name, pipe in self.pipes.items():
            try:
                stream = pipe.resume_stream(folder)
            except CheckpointError as error:
                why = error
            else:
                stream.label, stream.ahead = name, stream.gains_ahead
                return stream
        raise why

    def described(self, stream: Stream, sentences: Mapping[float, str]) -> dict[str, str]:
        """A video's metadata, as `rehyat generate` writes it."""
        settings = dataclasses.asdict(stream.settings) | {
            "solver": str(stream.settings.solver),
            "num_frames": stream.frames_done,
        }
        return generation_metadata(
            prompt=sentences[min(sentences)] if sentences else stream.prompt,
            negative_prompt=stream.negative_prompt,
            seed=stream.seeds[0],
            model=stream.label,
            loras=self.pipes[stream.label].loras,
            settings=settings | ({"timeline": dict(sentences)} if len(sentences) > 1 else {}),
        )

    def warm_up(self) -> Iterator[bool]:
        """Compile, or read what was compiled, before anybody waits for it: two chunks with each model's settings. True
        after each part of it."""
        for name, pipe in self.pipes.items():
            stream = self.opened(Wish(prompt="", model=name))
            for _ in itertools.islice(stream, 2):
                stream.snapshot()
                yield True
            pipe.text.warm_up()
            yield True


def _measured(name: str, pipe: TextToVideo) -> int:
    measured = pipe.real_time_steps()
    slower = "" if measured.real_time else f", fewer than the {pipe.fps} of the video: playback slows evenly"
    print(
        f"rehyat: {name}: {measured.steps} steps make {measured.frames_per_second:.1f} frames a second here{slower}",
        file=sys.stderr,
    )
    return measured.steps

"""Several streams of one model at once: frames a second as rows of one batch and one after the other, and as a server
makes them for viewers who watch in real time.

``python -m benchmarks.streams_together --rows 32 --steps 4 --guidance 1 --seconds 60``; a stream is shown at 16 frames
a second. A line of JSON for each result, as it comes; what does not fit into the seconds is left out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

import rehyat_jax as rj
from rehyat_jax.serve.host import Host
from rehyat_jax.serve.limits import Limits
from rehyat_jax.serve.live import LiveStream
from rehyat_jax.serve.steerable import Pace
from rehyat_jax.serve.wish import Wish
from rehyat_jax.streams.together import Together, advance_together

PROMPT = "a koala moving right slowly on a red background"
#: Seconds that viewers watch before it counts: the server's own batches are made ready, and buffers filled.
WARM = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="mini-sprites")
    parser.add_argument("--rows", type=int, default=2, help="streams, a power of two")
    parser.add_argument("--steps", type=int, default=None, help="denoising steps; the model's own when not given")
    parser.add_argument("--guidance", type=float, default=None, help="1: none; the model's own when not given")
    parser.add_argument("--rounds", type=int, default=4, help="chunks of each stream that are timed")
    parser.add_argument("--seconds", type=float, default=600.0, help="all of it, compilation too")
    parser.add_argument("--watch", type=float, default=15.0, help="seconds for which the server's streams are watched")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    how: dict[str, Any] = {"num_inference_steps": options.steps, "guidance_scale": options.guidance}
    pipe = rj.TextToVideo.from_pretrained(options.model)
    say(device=jax.devices()[0].device_kind, model=options.model, rows=options.rows, **how)

    first = pipe.open_stream(PROMPT, **how)
    next(first), next(first)
    streams = [first, *(first.fork(seed=n) for n in range(1, options.rows))]
    say(compiled="alone")
    begun = time.monotonic()
    say(alone=rate(sum(len(next(first)) for _ in range(options.rounds)), begun), of="one stream, nothing beside it")
    advance_together(streams)
    say(compiled="together")
    begun = time.monotonic()
    frames = sum(
        len(block)
        for _ in range(options.rounds)
        for block in advance_together(streams)
        if not isinstance(block, Exception)
    )
    say(together=rate(frames, begun) / options.rows, of="each stream, without encoding")

    def opened(wish: Wish) -> Any:
        return pipe.open_stream(wish.prompt, seed=wish.seed, **how)

    with tempfile.TemporaryDirectory() as folder:
        together = Together(options.rows)
        together.know(options.rows, streams[0])
        limits = Limits(streams=options.rows)
        host = Host(opened, together=together, limits=limits, pace=Pace(ahead=2.0), folder=Path(folder))
        try:
            names = [host.begin(Wish(prompt=PROMPT, seed=n)).result(60) for n in range(options.rows)]
            watched([host.get(name) for name in names], min(options.watch, end - time.monotonic() - WARM), host)
        finally:
            host.close()


def watched(lives: list[LiveStream], seconds: float, host: Host) -> None:
    """Each by a viewer who is shown a second a second; how near each came to having nothing to show."""
    if seconds <= 0:
        say(served=None, of="no time was left")
        return
    for live in lives:
        live.join()
    begun = time.monotonic()
    while time.monotonic() - begun < WARM or not all(live.frames for live in lives):
        time.sleep(0.1)
    viewers = [live.join() for live in lives]  # from the newest frame on
    made, batches, begun = [live.frames for live in lives], host.batches_made, time.monotonic()
    least = [float("inf")] * len(lives)
    while (passed := time.monotonic() - begun) < seconds:
        if passed > 1.5:  # a chunk and what is left of the one under way
            least = [
                min(old, live.seconds - viewer.position)
                for old, live, viewer in zip(least, lives, viewers, strict=True)
            ]
        time.sleep(0.02)
    rates = [(live.frames - before) / passed for live, before in zip(lives, made, strict=True)]
    say(
        served=round(min(rates), 2),
        of="the slowest of the server's streams, frames a second, encoded",
        fastest=round(max(rates), 2),
        least_seconds_ahead=round(min(least), 2),
        real_time=min(least) > 0,
        batches=host.batches_made - batches,
        largest_batch=host.largest_batch,
    )


def rate(frames: int, begun: float) -> float:
    return round(frames / (time.monotonic() - begun), 2)


def say(**told: Any) -> None:
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()

"""Frames a second of several streams of one model, made as rows of one batch, and one after the other.

``python -m benchmarks.streams_together --rows 32 --steps 4``; a stream is shown at 16 frames a second.
"""

from __future__ import annotations

import argparse
import json
import time

import jax

import rehyat_jax as rj
from rehyat_jax.streams.together import advance_together

PROMPT = "a koala moving right slowly on a red background"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="mini-sprites")
    parser.add_argument("--rows", type=int, default=2, help="streams, a power of two")
    parser.add_argument("--steps", type=int, default=None, help="denoising steps; the model's own when not given")
    parser.add_argument("--rounds", type=int, default=4, help="chunks of each stream that are timed")
    options = parser.parse_args()
    pipe = rj.TextToVideo.from_pretrained(options.model)
    streams = [pipe.open_stream(PROMPT, seed=n, num_inference_steps=options.steps) for n in range(options.rows)]
    for stream in streams:
        next(stream), next(stream)
    advance_together(streams)

    def alone() -> int:
        return sum(len(next(stream)) for stream in streams)

    def together() -> int:
        return sum(len(block) for block in advance_together(streams) if not isinstance(block, Exception))

    rates = {}
    for name, one_round in (("alone", alone), ("together", together)):
        begun = time.monotonic()
        frames = sum(one_round() for _ in range(options.rounds))
        rates[name] = round(frames / (time.monotonic() - begun) / options.rows, 2)
    print(json.dumps({"device": jax.devices()[0].device_kind, "rows": options.rows, "frames_per_second_each": rates}))


if __name__ == "__main__":
    main()

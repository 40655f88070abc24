"""The moving picture at the top of the README: three streams of the bundled model side by side, each told another
sentence half way. ``python docs/images/draw_stream.py`` writes ``docs/images/stream.webp``.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

import rehyat_jax as rj

FIRST = [
    "a koala moving right slowly on a red background",
    "a lemon moving down slowly on a blue background",
    "a mushroom moving left slowly on a green background",
]
THEN = [
    "a koala moving up slowly on a yellow background",
    "a lemon moving right slowly on a green background",
    "a mushroom moving down slowly on a red background",
]
#: Chunks of each sentence: 33 frames, then 36 more.
CHUNKS = 3
OUT = Path(__file__).with_name("stream.webp")


def main() -> None:
    pipe = rj.TextToVideo.from_pretrained("mini-sprites")
    stream = pipe.open_stream(FIRST, seed=8)
    blocks = list(itertools.islice(stream, CHUNKS))
    stream.change_prompt(THEN)
    blocks += itertools.islice(stream, CHUNKS)
    video = np.concatenate(blocks, axis=1)  # [B, F, H, W, 3]
    gap = np.full((*video.shape[1:3], 4, 3), 255, np.uint8)
    shown = [part for each in video for part in (each, gap)][:-1]
    rj.write_video(OUT, np.concatenate(shown, axis=2), fps=pipe.fps, scale=2, quality=40)
    print(f"{OUT}: {OUT.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()

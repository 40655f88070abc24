"""Hybrid attention on a CPU: the walk over chunks beside the dense reference and beside its softmax window alone.

    python -m benchmarks.attention_cpu

Half a minute on two cores. Prints the median of several runs of each, taken in turns so that what else the machine does
falls on all alike, and the ratios.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time

import jax
import tyro

from rehyat_jax import hybrid_attention
from rehyat_jax.attention.softmax import softmax_attention
from rehyat_jax.mixers.window import window_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """One sample in float32; chunk and overlap in tokens."""

    tokens: int = 8192
    heads: int = 4
    head_dim: int = 64
    features: int = 128
    chunk: int = 512
    overlap: int = 128
    #: Timed runs of the scan and of the window; of the other two, a third as many.
    runs: int = 30


def main(sizes: Sizes) -> None:
    keys = jax.random.split(jax.random.key(0), 5)
    shape = (1, sizes.tokens, sizes.heads)
    q, k, v = (jax.random.normal(key, (*shape, sizes.head_dim)) for key in keys[:3])
    features = [jax.random.uniform(key, (*shape, sizes.features)) for key in keys[3:]]
    cut = {"chunk": sizes.chunk, "overlap": sizes.overlap}
    hybrid = functools.partial(hybrid_attention, **cut)
    candidates = {
        "hybrid, scan": functools.partial(
            jax.jit(functools.partial(hybrid, implementation="scan")), q, k, v, *features
        ),
        "softmax window alone": functools.partial(jax.jit(functools.partial(window_attention, **cut)), q, k, v),
        "full softmax": functools.partial(jax.jit(softmax_attention), q, k, v),
        "hybrid, dense reference": functools.partial(
            jax.jit(functools.partial(hybrid, implementation="reference")), q, k, v, *features
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        jax.block_until_ready(call())
    quick, slow = list(candidates)[:2], list(candidates)[2:]
    # The slow ones apart: what they leave of caches and pages would fall on whoever comes next.
    for turn in [slow] * (sizes.runs // 3) + [quick] * sizes.runs:
        for name in turn:
            start = time.perf_counter()
            jax.block_until_ready(candidates[name]())
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{sizes}\n{jax.default_backend()}, jax {jax.__version__}")
    for name, median in medians.items():
        print(f"{name:26s} {1e3 * median:9.1f} ms   {median / medians['hybrid, scan']:6.2f} × the scan")


if __name__ == "__main__":
    main(tyro.cli(Sizes))

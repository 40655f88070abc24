"""Wan-1.3B's transformer, all blocks converted, beside itself with full softmax: forward, and a training step's way.

    PYTHONPATH=. python -m benchmarks.dit

One JSON line for each case, all of them in ``$OUT/dit.json`` (or the working folder). About six minutes on an H200,
compilations included. bfloat16 with the float32 parts that Wan demands, batch 1, random weights and inputs, 480×832,
512 text tokens; chunks of 3 latent frames, overlap 1. A time is the median of 10 samples, on two inputs in turn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.eight_bits import rounded_to_int8
from benchmarks.recorded import floor
from benchmarks.timing import Case, Report, arguments, normal, peak_gib, random_weights, timed
from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.transformer import WanTransformer
from train.engine.arithmetic import forward_flops

TINY = WanConfig(num_layers=2, num_attention_heads=2, attention_head_dim=12, ffn_dim=48, text_dim=32, freq_dim=32)
#: Longest video for full softmax: beyond, one forward takes more than two seconds.
LONGEST_SOFTMAX = 41


def transformer(config: WanConfig, *, hybrid: bool, int8: bool = False) -> WanTransformer:
    def make() -> WanTransformer:
        how = HybridConfig(chunk_frames=3, overlap_frames=1) if hybrid else None
        return WanTransformer(config, hybrid=how, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    return rounded_to_int8(random_weights(make)) if int8 else random_weights(make)


def cases(config: WanConfig, lengths: Sequence[int], size: tuple[int, int]) -> Iterator[Case]:
    @functools.lru_cache(maxsize=1)
    def model(hybrid: bool, int8: bool) -> tuple[Any, Any]:
        return nnx.split(transformer(config, hybrid=hybrid, int8=int8))

    def inputs(frames: int, weights: Any) -> list[tuple[Any, ...]]:
        time = jnp.full((1,), 500.0)
        text = normal(9, 1, 512, config.text_dim)
        return [(weights, normal(i, 1, frames, *size, config.in_channels), time, text) for i in range(2)]

    def velocity(hybrid: bool, *, int8: bool = False, **how: Any) -> tuple[Callable[..., jax.Array], Any]:
        graph, weights = model(hybrid, int8)
        return lambda weights, x, time, text: nnx.merge(graph, weights)(x, time, text, **how), weights

    peers: dict[tuple[str, int], float] = {}

    def beside_peer(what: str, hybrid: bool, frames: int, figures: dict[str, Any]) -> dict[str, Any]:
        if not hybrid:
            peers[what, frames] = figures["ms"]
        elif (what, frames) in peers:
            figures["times_faster_than_softmax"] = round(peers[what, frames] / figures["ms"], 2)
        how = HybridConfig(chunk_frames=3, overlap_frames=1) if hybrid else None
        flops = forward_flops(config, how, shape=(frames, *size)) * (1 if what == "forward" else 3)
        figures |= floor(flops, figures["ms"])
        return {**figures, "ms_a_frame": round(figures["ms"] / frames, 3), "peak_gib": peak_gib()}

    def forward(hybrid: bool, frames: int, *, int8: bool = False) -> dict[str, Any]:
        function, weights = velocity(hybrid, int8=int8)
        return beside_peer("forward", hybrid, frames, timed(function, inputs(frames, weights), inference=True))

    def both_ways(hybrid: bool, frames: int) -> dict[str, Any]:
        function, weights = velocity(hybrid, remat="nothing")

        def loss(weights: Any, x: jax.Array, time: jax.Array, text: jax.Array) -> jax.Array:
            return jnp.square(function(weights, x, time, text).astype(jnp.float32)).mean()

        return beside_peer("both", hybrid, frames, timed(jax.value_and_grad(loss), inputs(frames, weights)))

    # Softmax comes first: so every ratio is known, and each model is made once.
    for frames in [x for x in lengths if x <= LONGEST_SOFTMAX]:
        yield f"softmax, forward, {frames} frames", functools.partial(forward, False, frames)
    yield f"softmax, forward and backward, {lengths[0]} frames", functools.partial(both_ways, False, lengths[0])
    for frames in lengths:
        yield f"hybrid, forward, {frames} frames", functools.partial(forward, True, frames)
    yield f"hybrid, forward and backward, {lengths[0]} frames", functools.partial(both_ways, True, lengths[0])
    yield f"hybrid in int8, forward, {lengths[0]} frames", functools.partial(forward, True, lengths[0], int8=True)


def main(argv: Sequence[str] | None = None) -> None:
    given = arguments(__doc__, "dit", argv, lengths=(21, 41, 81, 161))
    config, size = (TINY, (8, 8)) if given.tiny else (WanConfig.t2v_1_3b(), (60, 104))
    lengths = [4, 7] if given.tiny else given.lengths
    Report(given.out, given.seconds).run_all(cases(config, lengths, size))


if __name__ == "__main__":
    main()

"""Wan's VAE in bfloat16, streamed: video frames a second of encoding and decoding, at constant memory.

    PYTHONPATH=. python -m benchmarks.vae

One JSON line for each case, all of them in ``$OUT/vae.json`` (or the working folder). About two minutes on an H200,
most of it compilation. Random weights and inputs, batch 1, 480×832. A step's time is the median of 10 steps that hand
their state on, after three; frames a second are what it gives without end.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.timing import Case, Report, arguments, normal, peak_gib, random_weights, timed, walked
from rehyat_jax.models.wan.config import VAEConfig
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.sampling.codec import decode_first, decode_next, to_uint8

TINY = VAEConfig(base_dim=4, dim_mult=(1, 2, 2, 2), num_res_blocks=1)


def cases(config: VAEConfig, size: tuple[int, int], frames: int) -> Iterator[Case]:
    @functools.cache
    def model(dtype: Any) -> tuple[Any, Any]:
        return nnx.split(random_weights(lambda: WanVAE(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))))

    def latents(count: int, dtype: Any) -> jax.Array:
        return normal(count, 1, count, *size, config.z_dim, dtype=dtype)

    def decode(dtype: Any, at_once: int) -> dict[str, Any]:
        graph, weights = model(dtype)
        _, state = decode_first(weights, latents(1, dtype), graph=graph, pixels=to_uint8)
        inputs = latents(at_once, dtype)
        ms = walked(lambda state: decode_next(weights, inputs, state, graph=graph, pixels=to_uint8), state)
        return told(ms, config.temporal_factor * at_once)

    def encode(dtype: Any, at_once: int) -> dict[str, Any]:
        graph, weights = model(dtype)
        height, width = (config.spatial_factor * x for x in size)
        videos = [(weights, normal(i, 1, frames, height, width, 3, dtype=dtype)) for i in range(2)]

        def whole(weights: Any, video: jax.Array) -> jax.Array:
            return nnx.merge(graph, weights).encode(video, frames_per_step=at_once)

        figures = timed(whole, videos)
        return {**told(figures["ms"], frames), "program_gib": figures["program_gib"]}

    def told(ms: float, video_frames: int) -> dict[str, Any]:
        return {"ms": round(ms, 2), "frames_a_second": round(1e3 * video_frames / ms, 1), "peak_gib": peak_gib()}

    for dtype in (jnp.bfloat16, jnp.float32):
        name = jnp.dtype(dtype).name
        for at_once in (1, 3):
            case = f"decode, {name}, {at_once} latent frames a step"
            yield case, functools.partial(decode, dtype, at_once)
        yield f"encode, {name}, {frames} frames", functools.partial(encode, dtype, 1)


def main(argv: Sequence[str] | None = None) -> None:
    given = arguments(__doc__, "vae", argv)
    config, size, frames = (TINY, (4, 4), 9) if given.tiny else (VAEConfig(), (60, 104), 81)
    Report(given.out, given.seconds).run_all(cases(config, size, frames))


if __name__ == "__main__":
    main()

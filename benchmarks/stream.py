"""A video without end: Wan-1.3B's size, all blocks converted, four steps a chunk, no guidance; with and without VAE,
in bfloat16 and with the transformer's products in int8. And warm, from a prompt's embedding to frames on the host: a
stream's first frame, and a whole video of 81.

    PYTHONPATH=. python -m benchmarks.stream

One JSON line for each case, all of them in ``$OUT/stream.json`` (or the working folder). Four minutes on an H200, most
of it compilation. bfloat16, random weights, 480×832, chunks of 3 latent frames (12 of video), overlap 1. A chunk's time
is the median of 10 that hand their state on, after three.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from benchmarks import dit
from benchmarks import vae as of_vae
from benchmarks.recorded import floor
from benchmarks.timing import Case, Report, arguments, normal, peak_gib, random_weights, walked
from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.wan.config import VAEConfig, WanConfig
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.sampling import FlowSchedule, UniPC
from rehyat_jax.sampling.noise import video_keys
from rehyat_jax.sampling.session import Session
from rehyat_jax.sampling.settings import Settings
from train.engine.arithmetic import forward_flops

CHUNK, STEPS = 3, 4
#: Latent frames of a whole video: 81 frames.
WHOLE = 21


def cases(config: WanConfig, vae_config: VAEConfig, size: tuple[int, int]) -> Iterator[Case]:
    frames = CHUNK * vae_config.temporal_factor
    space = vae_config.spatial_factor

    @functools.cache
    def transformer(int8: bool) -> Any:
        return dit.transformer(config, hybrid=True, int8=int8)

    @functools.cache
    def session(*, with_vae: bool, int8: bool, num_frames: int = 1) -> Session:
        kinds: dict[str, Any] = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        settings = Settings(
            num_frames=num_frames,
            height=space * size[0],
            width=space * size[1],
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            schedule=FlowSchedule(shift=3.0),
            solver=UniPC(),
        )
        made = random_weights if with_vae else nnx.eval_shape
        vae = made(lambda: WanVAE(vae_config, **kinds, rngs=nnx.Rngs(0)))
        return Session(transformer=transformer(int8), vae=vae, settings=settings)

    def chunks(session: Session) -> tuple[Any, Any]:
        """From (number of the first frame, states) to latents and the next; and the first of them."""
        keys = video_keys(0, count=1)
        text_kv = session.precompute_text_kv(normal(9, 1, 1, 512, config.text_dim))

        def step(carry: Any) -> Any:
            first, states = carry
            latents, states = session.denoise_chunk(states, keys, text_kv, first)
            return latents, (first + CHUNK, states)

        return step, (jnp.zeros((), jnp.int32), session.init_state(1))

    def told(ms: float) -> dict[str, Any]:
        return {"ms_a_chunk": round(ms, 2), "frames_a_second": round(1e3 * frames / ms, 1), "peak_gib": peak_gib()}

    def transformer_alone(int8: bool) -> dict[str, Any]:
        step, state = chunks(session(with_vae=False, int8=int8))
        ms = walked(step, state)
        return told(ms) | floor(STEPS * _of_a_chunk(config, size), ms)

    def with_vae(int8: bool) -> dict[str, Any]:
        made = session(with_vae=True, int8=int8)
        (step, state), codec = chunks(made), made.codec
        ((_, past),) = codec.decode(normal(1, 1, 1, *size, vae_config.z_dim, dtype=jnp.float32))

        def both(state: Any) -> Any:
            latents, state["chunks"] = step(state["chunks"])
            decoded = list(codec.decode(latents, state["past"], first_frame=CHUNK))
            state["past"] = decoded[-1][1]
            return [pixels for pixels, _ in decoded], state

        return told(walked(both, {"chunks": state, "past": past}))

    def warm(once: Callable[[Array], None]) -> dict[str, Any]:
        """Of what begins with a prompt's embedding and ends with frames on the host: the median of five, compiled."""
        times = []
        for i in range(7):
            text = jax.block_until_ready(normal(i, 1, 1, 512, config.text_dim))
            start = time.perf_counter()
            once(text)
            times.append(time.perf_counter() - start)
        return {"ms": round(1e3 * statistics.median(times[2:]), 2), "peak_gib": peak_gib()}

    def first_frame(int8: bool) -> dict[str, Any]:
        made = session(with_vae=True, int8=int8)
        first = jnp.zeros((), jnp.int32)

        def once(text: Array) -> None:
            text_kv = made.precompute_text_kv(text)
            latents, _ = made.denoise_chunk(made.init_state(1), video_keys(0, count=1), text_kv, first)
            shown, _ = next(made.codec.decode(latents))
            np.asarray(shown)

        return warm(once)

    def whole(int8: bool) -> dict[str, Any]:
        made = session(with_vae=True, int8=int8, num_frames=1 + vae_config.temporal_factor * (WHOLE - 1))

        def once(text: Array) -> None:
            noise = normal(1, 1, *made.shape, dtype=jnp.float32)
            for shown, _ in made.codec.decode(made.denoise(noise, text)):
                np.asarray(shown)

        return warm(once)

    for name, int8 in (("stream", False), ("stream in int8", True)):
        yield f"{name}, {STEPS} steps, transformer alone", functools.partial(transformer_alone, int8)
        yield f"{name}, {STEPS} steps, with VAE", functools.partial(with_vae, int8)
        yield (
            f"{name}, {STEPS} steps, from embedding to first frame",
            functools.partial(first_frame, int8),
        )
    for name, int8 in (("whole video", False), ("whole video in int8", True)):
        yield f"{name}, {WHOLE} latent frames, {STEPS} steps, with VAE", functools.partial(whole, int8)


def _of_a_chunk(config: WanConfig, size: tuple[int, int]) -> int:
    """Operations of one evaluation of a chunk that has a past and reads its text's keys and values."""
    hybrid = HybridConfig(chunk_frames=CHUNK, overlap_frames=1)
    longer, shorter = (forward_flops(config, hybrid, shape=(CHUNK * n, *size)) for n in (3, 2))
    return longer - shorter


def main(argv: Sequence[str] | None = None) -> None:
    given = arguments(__doc__, "stream", argv)
    sizes = (dit.TINY, of_vae.TINY, (8, 8)) if given.tiny else (WanConfig.t2v_1_3b(), VAEConfig(), (60, 104))
    Report(given.out, given.seconds).run_all(cases(*sizes))


if __name__ == "__main__":
    main()

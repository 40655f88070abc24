"""A video without end: Wan-1.3B's size, all blocks converted, four steps a chunk, no guidance; with and without VAE.

    PYTHONPATH=. python -m benchmarks.stream

One JSON line for each case, all of them in ``$OUT/stream.json`` (or the working folder). Two minutes on an H200, most
of it compilation. bfloat16, random weights, 480×832, chunks of 3 latent frames (12 of video), overlap 1. A chunk's time
is the median of 10 that hand their state on, after three.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from benchmarks import dit
from benchmarks import vae as of_vae
from benchmarks.timing import Case, Report, arguments, normal, peak_gib, random_weights, walked
from rehyat_jax.models.wan.config import VAEConfig, WanConfig
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.sampling import FlowSchedule, Guidance, UniPC, plan_steps, rollout
from rehyat_jax.sampling.programs import decode_first, decode_next, denoise_chunk, read_text, to_uint8

CHUNK, STEPS = 3, 4


def cases(config: WanConfig, vae_config: VAEConfig, size: tuple[int, int]) -> Iterator[Case]:
    solver = UniPC()
    steps = plan_steps(FlowSchedule(shift=3.0), solver, num_steps=STEPS)
    frames = CHUNK * vae_config.temporal_factor

    @functools.cache
    def transformer() -> Any:
        return dit.transformer(config, hybrid=True)

    @functools.cache
    def vae() -> tuple[Any, Any]:
        kinds: dict[str, Any] = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        return nnx.split(random_weights(lambda: WanVAE(vae_config, **kinds, rngs=nnx.Rngs(0))))

    def chunks() -> tuple[Any, Any]:
        """From (number of the first frame, states) to latents and the next; and the first of them."""
        graph, weights = nnx.split(transformer())
        keys = rollout.video_keys(0, count=1)
        text = read_text(weights, normal(9, 1, 1, 512, config.text_dim), graph=graph)
        states = rollout.init_states(transformer(), steps=STEPS, branches=1, batch=1, height=size[0], width=size[1])

        def step(carry: Any) -> Any:
            first, states = carry
            latents, states = denoise_chunk(
                weights,
                states,
                keys,
                text,
                first,
                steps,
                graph=graph,
                shape=(CHUNK, *size, config.in_channels),
                solver=solver,
                guidance=Guidance(scale=1.0),
            )
            return latents, (first + CHUNK, states)

        return step, (jnp.zeros((), jnp.int32), states)

    def told(ms: float) -> dict[str, Any]:
        return {"ms_a_chunk": round(ms, 2), "frames_a_second": round(1e3 * frames / ms, 1), "peak_gib": peak_gib()}

    def transformer_alone() -> dict[str, Any]:
        step, state = chunks()
        return told(walked(step, state))

    def with_vae() -> dict[str, Any]:
        step, state = chunks()
        graph, weights = vae()
        _, past = decode_first(
            weights, normal(1, 1, 1, *size, vae_config.z_dim, dtype=jnp.float32), graph=graph, pixels=to_uint8
        )

        def both(state: Any) -> Any:
            latents, state["chunks"] = step(state["chunks"])
            video = []
            for i in range(CHUNK):
                pixels, state["past"] = decode_next(
                    weights, latents[:, i : i + 1], state["past"], graph=graph, pixels=to_uint8
                )
                video.append(pixels)
            return video, state

        return told(walked(both, {"chunks": state, "past": past}))

    yield f"stream, {STEPS} steps, transformer alone", transformer_alone
    yield f"stream, {STEPS} steps, with VAE", with_vae


def main(argv: Sequence[str] | None = None) -> None:
    given = arguments(__doc__, "stream", argv)
    sizes = (dit.TINY, of_vae.TINY, (8, 8)) if given.tiny else (WanConfig.t2v_1_3b(), VAEConfig(), (60, 104))
    Report(given.out, given.seconds).run_all(cases(*sizes))


if __name__ == "__main__":
    main()

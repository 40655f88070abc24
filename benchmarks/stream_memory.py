"""Memory of a stream at Wan-1.3B's sizes: what the compiled programs need, and with ``--run`` what a device used.

    python -m benchmarks.stream_memory
    python -m benchmarks.stream_memory --remember 0
    python -m benchmarks.stream_memory --run

The first two compile for this machine's backend, without any weights (half a minute on two cores): the program that a
stream runs for every chunk, the one that decodes a latent frame, and the whole sweep as one program for each length,
whose result is the whole video's latents. The last makes a stream of random weights and says after each of the
lengths what was in use at most since the process began; at 999 latent frames, 333 chunks, it is for a GPU.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from rehyat_jax import HybridConfig, Stream, StreamState
from rehyat_jax.models.wan.config import VAEConfig, WanConfig
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.sampling import FlowSchedule, UniPC, programs
from rehyat_jax.sampling.codec import decode_next, to_uint8
from rehyat_jax.sampling.noise import video_keys
from rehyat_jax.sampling.session import Session
from rehyat_jax.sampling.settings import Settings
from rehyat_jax.sampling.text import Padded
from rehyat_jax.streams.state import init_state

GIB = 1 << 30
MODELS = {
    "1.3b": (WanConfig.t2v_1_3b(), VAEConfig()),
    # For a test of this program.
    "tiny": (
        WanConfig(num_layers=2, num_attention_heads=2, attention_head_dim=12, ffn_dim=48, text_dim=32, freq_dim=32),
        VAEConfig(base_dim=4, dim_mult=(1, 2, 2, 2), num_res_blocks=1),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """A stream of one video in bfloat16 (its VAE in float32), and the lengths to compare."""

    model: Literal["1.3b", "tiny"] = "1.3b"
    width: int = 832
    height: int = 480
    steps: int = 4
    #: 1: no guidance.
    guidance: float = 1.0
    chunk_frames: int = 3
    overlap_frames: int = 1
    #: See `rehyat_jax.sampling.rollout.ContextNoise`.
    remember: Literal["steps"] | float = "steps"
    #: Latent frames.
    lengths: tuple[int, ...] = (9, 999)
    #: Make the stream instead of compiling it.
    run: bool = False

    @property
    def settings(self) -> Settings:
        return Settings(
            num_frames=1 + 4 * (self.chunk_frames - 1),
            height=self.height,
            width=self.width,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            schedule=FlowSchedule(shift=3.0),
            solver=UniPC(),
            remember=self.remember,
        )


def abstract_models(options: Options) -> tuple[WanTransformer, WanVAE]:
    """Sizes and dtypes, no numbers."""
    config, vae_config = MODELS[options.model]
    hybrid = HybridConfig(chunk_frames=options.chunk_frames, overlap_frames=options.overlap_frames)
    kinds: dict[str, Any] = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    transformer = nnx.eval_shape(lambda: WanTransformer(config, hybrid=hybrid, **kinds, rngs=nnx.Rngs(0)))
    return transformer, nnx.eval_shape(lambda: WanVAE(vae_config, rngs=nnx.Rngs(0)))


def session(options: Options) -> Session:
    """Of no numbers."""
    transformer, vae = abstract_models(options)
    return Session(transformer=transformer, vae=vae, settings=options.settings)


def first_state(session: Session) -> StreamState:
    text = jnp.zeros((session.sampler.guidance.evaluations, 1, 512, session.text_dim), jnp.float32)
    return init_state(session, keys=video_keys(0, count=1), text=text)


def text_kv(session: Session, state: StreamState) -> Padded:
    """Of a text as long as can be, by shapes."""
    return programs.precompute_text_kv.eval_shape(session.weights, Padded(state.text, 512), graph=session.graph)


def lowered(options: Options) -> dict[str, Any]:
    """What is to be compiled, by name; the sweeps as one program last, in the order of the lengths."""
    made = session(options)
    state, (chunk, *size) = jax.eval_shape(lambda: first_state(made)), made.chunk_shape
    steps = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), made.steps)
    how: dict[str, Any] = {"graph": made.graph, "sampler": made.sampler}
    read = text_kv(made, state)

    named = {
        "a chunk of a stream": programs.denoise_chunk.lower(
            made.weights,
            state.states,
            state.keys,
            read,
            state.first_frame,
            steps,
            shape=(chunk, *size),
            **how,
        ),
        "a latent frame decoded": decode_next.lower(
            made.codec.weights,
            jax.ShapeDtypeStruct((1, 1, *size), jnp.float32),
            state.decoder,
            graph=made.codec.graph,
            pixels=to_uint8,
        ),
    }
    for length in options.lengths:

        def whole(weights: Any, states: Any, keys: Any, text: Any, steps: Any, length: int = length) -> Any:
            """The stream's program for every chunk, in a scan over chunks."""
            read = programs.precompute_text_kv.function(weights, Padded(text, 512), graph=made.graph)

            def one(states: Any, first: Any) -> Any:
                shape = (chunk, *size)
                made_of_it = programs.denoise_chunk.function(
                    weights, states, keys, read, first, steps, shape=shape, **how
                )
                return made_of_it[::-1]

            states, latents = jax.lax.scan(one, states, jnp.arange(0, length, chunk, dtype=jnp.int32))
            return jnp.moveaxis(latents, 0, 1).reshape(1, -1, *size)[:, :length], states

        program = jax.jit(whole, donate_argnums=1).lower(made.weights, state.states, state.keys, state.text, steps)
        named[f"{length} latent frames in one program"] = program
    return named


def print_analysis(options: Options) -> None:
    made = session(options)
    state = jax.eval_shape(lambda: first_state(made))
    parts = {
        "transformer": made.weights,
        "VAE": made.codec.weights,
        "linear states and overlaps": state.states,
        "text's keys and values": text_kv(made, state),
        "decoder's past": state.decoder,
    }
    for name, part in parts.items():
        print(f"{name:32s} {_nbytes(part) / GIB:7.3f} GiB")
    print(f"{'GiB':32s} {'arguments':>9s} {'results':>9s} {'of them in place':>17s} {'temporary':>10s} {'all':>7s}")
    most = []
    for name, program in lowered(options).items():
        memory = program.compile().memory_analysis()
        given, made = memory.argument_size_in_bytes, memory.output_size_in_bytes
        shared, temporary = memory.alias_size_in_bytes, memory.temp_size_in_bytes
        print(
            f"{name:32s} {given / GIB:9.3f} {made / GIB:9.3f} {shared / GIB:17.3f} {temporary / GIB:10.4f} "
            f"{(given + made - shared + temporary) / GIB:7.3f}"
        )
        most.append(made - shared + temporary)
    # The first two programs take turns, and all that a stream holds is there meanwhile.
    print(f"a stream in all: {(sum(map(_nbytes, parts.values())) + max(most[:2])) / GIB:.3f} GiB")


def run(options: Options) -> None:
    """A stream of random weights; its pixels mean nothing."""
    models = abstract_models(options)
    rng = np.random.default_rng(0)

    def drawn(x: jax.ShapeDtypeStruct) -> jax.Array:
        # On the host, so that the device holds nothing but the parameter.
        return jax.device_put((0.02 * rng.standard_normal(x.shape, np.float32)).astype(x.dtype))

    for model in models:
        nnx.update(model, jax.tree.map(drawn, nnx.state(model)))
    transformer, vae = models

    def no_text(_: str) -> Any:
        raise NotImplementedError("this stream has no prompt")

    made = Session(transformer=transformer, vae=vae, settings=options.settings)
    stream = Stream(made, first_state(made), text=no_text, model=lambda: "", prompt="")
    begin, peaks = time.perf_counter(), []
    for length in sorted(options.lengths):
        while int(stream.state.first_frame) < length:
            next(stream)
        stats = jax.devices()[0].memory_stats() or {}
        peaks.append(stats.get("peak_bytes_in_use", 0))
        print(
            f"{length:6d} latent frames, {stream.frames_done} frames, {time.perf_counter() - begin:7.1f} s: "
            f"{peaks[-1] / GIB:.4f} GiB at most, {stats.get('bytes_in_use', 0) / GIB:.4f} GiB now"
        )
    if peaks[0]:
        print(f"the longest over the shortest: {peaks[-1] / peaks[0]:.5f}")


def _nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def main(options: Options) -> None:
    print(f"{options}\n{jax.default_backend()}, jax {jax.__version__}")
    (run if options.run else print_analysis)(options)


if __name__ == "__main__":
    main(tyro.cli(Options))

"""Generation on the devices at hand, random weights in bfloat16: a step of a whole video, a stream's chunks.

    python -m benchmarks.generation --model 14b --size 1280x720 --frames 81        # an evaluation of a whole video
    python -m benchmarks.generation --model 14b --stream                           # 480p, four steps a chunk
    python -m benchmarks.generation --model 14b --stream --mesh.tensor 2           # on two devices
    python -m benchmarks.generation --model 14b --teacher --mesh.context 8         # softmax, its time over eight

The programs are those of `rehyat generate`; without guidance, the autoencoder and the text encoder apart. One JSON
line; ``peak_gib`` is what the first device had in use at most. ``--model tiny`` runs anywhere.
"""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from benchmarks.multi_gpu import Sizes, model_of
from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.wan.config import VAEConfig, WanConfig
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.runtime.compilation import cache_folder, keep_compiled
from rehyat_jax.runtime.devices import ONE_DEVICE, Devices
from rehyat_jax.runtime.mesh_config import MeshConfig
from rehyat_jax.sampling import Euler, FlowSchedule, Renoise, programs
from rehyat_jax.sampling.condition import Condition
from rehyat_jax.sampling.noise import video_keys
from rehyat_jax.sampling.session import Session
from rehyat_jax.sampling.settings import Settings
from rehyat_jax.sampling.text import Padded

GIB = 2**30
MODELS = {
    "1.3b": WanConfig.t2v_1_3b(),
    "14b": WanConfig.t2v_14b(),
    "tiny": Sizes.tiny().model,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is generated, and on which mesh."""

    model: Literal["1.3b", "14b", "tiny"] = "1.3b"
    stream: bool = False
    """A stream's chunks in place of a step of a whole video."""
    teacher: bool = False
    """Softmax in every block."""
    size: str = "832x480"
    frames: int = 81
    """Of a whole video."""
    steps: int = 4
    """A chunk."""
    samples: int = 3
    """After one that is not counted."""
    mesh: Annotated[MeshConfig, tyro.conf.arg(name="mesh")] = MeshConfig(fsdp=1)


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, description=__doc__, args=argv)
    keep_compiled(cache_folder())
    devices = ONE_DEVICE if options.mesh.single else Devices.first(options.mesh)
    config = MODELS[options.model]
    sizes = Sizes(model=config, hybrid=None if options.teacher else HybridConfig())  # type: ignore[arg-type]
    model = nnx.merge(*model_of(sizes, devices, param_dtype=jnp.bfloat16))
    width, height = (int(side) for side in options.size.split("x"))
    settings = Settings(
        num_frames=9 if options.stream else options.frames,
        height=height,
        width=width,
        num_inference_steps=options.steps,
        guidance_scale=1.0,
        schedule=FlowSchedule(shift=5.0),
        solver=Renoise() if options.stream else Euler(),
        remember=0.0 if options.stream else "steps",
    )
    vae = nnx.eval_shape(lambda: WanVAE(VAEConfig(), rngs=nnx.Rngs(0)))
    session = Session(transformer=model, vae=vae, settings=settings, devices=devices)
    text = np.random.default_rng(0).normal(size=(1, 1, 512, config.text_dim))
    text_rows = devices.replicate(Padded(jnp.asarray(text, jnp.bfloat16), 512))
    seconds = (streamed if options.stream else stepped)(session, text_rows, samples=options.samples)
    stats = jax.devices()[0].memory_stats() or {}
    said = dataclasses.asdict(options) | {
        "device": jax.devices()[0].device_kind,
        "mesh": {axis: size for axis, size in devices.shape.items() if size > 1},
        "seconds": [round(each, 4) for each in seconds],
        "peak_gib": round(stats["peak_bytes_in_use"] / GIB, 2) if "peak_bytes_in_use" in stats else None,
    }
    if options.stream:
        said["frames_a_second"] = round(4 * model.chunk_frames() / min(seconds), 1)
    print(json.dumps(said), flush=True)


def stepped(session: Session, text: Padded, *, samples: int) -> list[float]:
    """Seconds of an evaluation of the whole video."""
    noise = jax.random.normal(jax.random.key(0), (1, *session.shape))
    state = session.devices.replicate(session.sampler.solver.init(noise))
    seconds = []
    with session.computing():
        for _ in range(samples + 1):
            begun = time.perf_counter()
            state = programs.denoise_step(
                session.weights,
                state,
                session.settings.steps().at(0),
                text,
                Condition(),
                graph=session.graph,
                sampler=session.sampler,
            )
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - begun)
    return seconds[1:]


def streamed(session: Session, text: Padded, *, samples: int) -> list[float]:
    """Seconds of a chunk."""
    with session.computing():
        text_kv = programs.precompute_text_kv(session.weights, text, None, graph=session.graph)
    states, keys, seconds = session.init_state(1), video_keys(0, count=1), []
    for number in range(samples + 1):
        begun = time.perf_counter()
        latents, states = session.denoise_chunk(states, keys, text_kv, jnp.int32(3 * number))
        jax.block_until_ready((latents, states))
        seconds.append(time.perf_counter() - begun)
    return seconds[1:]


if __name__ == "__main__":
    main()

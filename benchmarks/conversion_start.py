"""What converting a model costs it before any training: its velocities beside the teacher's, on true clips with noise.

    python -m benchmarks.conversion_start

A minute on two CPU cores. Every block is converted, at once; the baselines' rows are the same blocks without the past
(window) and without softmax (linear). ``level`` is what φ_q·φ_k begins with; one row has a φ initialised as any other
network: output kernel of unit spread, biases 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

from rehyat_jax.attention.features import FeatureMap
from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.checkpoints import load_text_encoder, load_transformer, load_vae
from rehyat_jax.models.folder import bundled_models
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.sprites import world
from rehyat_jax.sprites.captions import captions
from rehyat_jax.text.tokenizer import Tokenizer, embed_prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Which clips, noise and window."""

    model: str = "mini-sprites"
    clips: int = 4
    frames: int = 65
    #: In 0…1000.
    times: tuple[float, ...] = (250.0, 750.0, 1000.0)
    chunk_frames: int = 3
    overlap_frames: int = 1
    seed: int = 2026


def students(teacher: WanTransformer, chunk: int, overlap: int) -> Iterator[tuple[str, WanTransformer]]:
    rngs = nnx.Rngs(0)
    heads, width = teacher.config.num_attention_heads, teacher.config.attention_head_dim
    hybrid = HybridConfig(chunk_frames=chunk, overlap_frames=overlap)

    def begun(spread: float, bias: jax.Array) -> WanTransformer:
        """φ's output kernel so many times as wide, and this bias."""
        model = teacher.with_hybrid(hybrid, rngs=rngs)
        assert model.hybrid_blocks is not None
        for phi in (model.hybrid_blocks.phi_q, model.hybrid_blocks.phi_k):
            last = phi.layers[-1]
            last.kernel.set_value(last.kernel[...] * spread)
            last.bias.set_value(jnp.broadcast_to(bias, last.bias.shape))
        return model

    yield "window alone", teacher.with_hybrid(dataclasses.replace(hybrid, kind="window"), rngs=rngs)
    yield "hybrid", teacher.with_hybrid(hybrid, rngs=rngs)
    for level in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        bias = FeatureMap(heads, width, level=level, rngs=rngs).layers[-1].bias[...]
        yield f"hybrid, level {level:g}", begun(1.0, bias)
    yield "hybrid, usual start of φ", begun(10.0, jnp.zeros(()))
    yield "linear alone", teacher.with_hybrid(dataclasses.replace(hybrid, kind="linear"), rngs=rngs)


def main(settings: Settings) -> None:
    folder = bundled_models()[settings.model]
    teacher, vae = load_transformer(folder, hybrid=None), load_vae(folder, dtype=jnp.float32)
    keys = jax.random.split(jax.random.key(settings.seed), 2)
    scenes = world.sample_scenes(keys[0], settings.clips, split="unseen")
    text = embed_prompts(load_text_encoder(folder, dtype=jnp.float32), Tokenizer.from_folder(folder), captions(scenes))
    video = world.render(scenes, num_frames=settings.frames)
    latents = vae.normalize(nnx.jit(lambda vae, x: vae.encode(x, frames_per_step=4))(vae, video))
    noise = jax.random.normal(keys[1], latents.shape)
    velocity = nnx.jit(lambda model, x, t: model(x, t, text))

    def at_every_time(model: WanTransformer) -> list[jax.Array]:
        return [
            velocity(model, latents + (noise - latents) * (t / 1000), jnp.full(len(text), t)) for t in settings.times
        ]

    exact = at_every_time(teacher)
    print(f"{settings}\nlatents {latents.shape}; ‖v − v_teacher‖ / ‖v_teacher‖ at times {settings.times}")
    for name, model in students(teacher, settings.chunk_frames, settings.overlap_frames):
        errors = [
            float(jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs))
            for ours, theirs in zip(at_every_time(model), exact, strict=True)
        ]
        print(f"{name:26s} " + "  ".join(f"{error:8.4f}" for error in errors), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Settings))

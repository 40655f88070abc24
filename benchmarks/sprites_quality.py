"""A softmax model of sprites by several guidances, latents kept: sample (quick on a GPU), then decode and measure.

``rehyat eval sprites`` is the measure of a model; this one sweeps guidance and parts the prompts.

    python -m benchmarks.sprites_quality sample  --model mini-sprites --out latents/      # GPU: about a minute
    python -m benchmarks.sprites_quality measure --model mini-sprites --latents latents/  # two CPU cores: ten minutes

The prompts are never seen in training: half of them have a held-out (object, direction) pair, the other half are
reserved captions. Latents are kept in float16; sampling is deterministic for one device and dtype.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from rich.console import Console

from rehyat_jax.models.checkpoints import load_text_encoder, load_transformer, load_vae
from rehyat_jax.models.wan.config import VAEConfig
from rehyat_jax.sampling import FlowSchedule, Guidance, UniPC, guided_velocity, sample
from rehyat_jax.sampling.programs import to_uint8
from rehyat_jax.sprites import world
from rehyat_jax.sprites.captions import captions
from rehyat_jax.sprites.clips import quantized, through_vae
from rehyat_jax.sprites.prompts import occlusion_scenes, unseen_scenes
from rehyat_jax.text.tokenizer import Tokenizer, embed_prompts

#: Frames of the occlusion clips for each wait.
_WAITS = {0: 81, 16: 97, 48: 129}


def _folder(model: str) -> Path:
    path = Path(model)
    return path if path.is_dir() else Path(world.__file__).parents[1] / "assets" / model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """Sample latents of every set of prompts."""

    out: Path
    model: str = "mini-sprites"
    prompts: int = 256
    occlusions: int = 64
    frames: int = 65
    steps: int = 30
    guidance: tuple[float, ...] = (4.0,)
    shift: float = 3.0
    dtype: str = "bfloat16"
    batch: int = 64
    seed: int = 2026

    def run(self, console: Console) -> None:
        folder, dtype = _folder(self.model), jnp.dtype(self.dtype)
        graph, params = nnx.split(load_transformer(folder, dtype=dtype, hybrid=None))
        vae = VAEConfig.from_dict(json.loads((folder / "vae" / "config.json").read_text()))
        encoder, tokenizer = load_text_encoder(folder, dtype=jnp.float32), Tokenizer.from_folder(folder)
        negative = embed_prompts(encoder, tokenizer, [""])

        @functools.partial(jax.jit, static_argnames="scale")
        def denoise(params: Any, noise: jax.Array, text: jax.Array, *, scale: float) -> jax.Array:
            velocity = guided_velocity(
                nnx.merge(graph, params),
                text,
                negative=jnp.broadcast_to(negative, text.shape),
                guidance=Guidance(scale=scale),
                dtype=dtype,
            )
            schedule = FlowSchedule(shift=self.shift)
            return sample(velocity, noise, schedule=schedule, solver=UniPC(), num_steps=self.steps)

        def clips(scenes: Any, frames: int, width: int, scale: float) -> np.ndarray:
            texts = captions(scenes)
            side = vae.spatial_factor
            shape = (frames // vae.temporal_factor + 1, world.HEIGHT // side, width // side, vae.z_dim)
            batch = min(self.batch, len(texts))
            parts = []
            for begin in range(0, len(texts), batch):
                text = embed_prompts(encoder, tokenizer, texts[begin : begin + batch])
                key = jax.random.fold_in(jax.random.key(self.seed), begin)
                noise = jax.random.normal(key, (len(text), *shape))
                parts.append(np.asarray(denoise(params, noise, text, scale=scale), np.float16))
            return np.concatenate(parts)

        self.out.mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        for scale in self.guidance:
            latents = clips(unseen_scenes(self.prompts, seed=self.seed), self.frames, world.WIDTH, scale)
            np.savez(self.out / f"plain-g{scale:g}.npz", latents=latents)
            console.print(f"plain, guidance {scale:g}: {len(latents)} clips at {time.monotonic() - begun:.1f} s")
        if self.occlusions:
            for wait, frames in _WAITS.items():
                scenes = occlusion_scenes(self.occlusions, wait=wait, seed=self.seed)
                np.savez(
                    self.out / f"occlusion-{wait}.npz",
                    latents=clips(scenes, frames, world.OCCLUSION_WIDTH, self.guidance[0]),
                )
                console.print(f"occlusion, wait {wait}: at {time.monotonic() - begun:.1f} s")
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}
        (self.out / "settings.json").write_text(json.dumps(settings, indent=1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """Decode sampled latents, measure them, and measure their ceiling and controls."""

    latents: Path
    model: str = "mini-sprites"
    #: Only the first so many clips of each set (of the plain ones half from either half); 0: all.
    limit: int = 0

    def run(self, console: Console) -> None:
        from rehyat_jax.sprites.occlusion import report_occlusions
        from rehyat_jax.sprites.report import frozen, report, swapped, table

        settings = json.loads((self.latents / "settings.json").read_text())
        vae = load_vae(_folder(self.model), dtype=jnp.float32)
        graph, params = nnx.split(vae)

        @jax.jit
        def decode(params: Any, latents: jax.Array) -> jax.Array:
            vae = nnx.merge(graph, params)
            video = vae.decode(vae.denormalize(latents), frames_per_step=4)
            return to_uint8(video)

        def batches(array: Any, size: int = 8) -> Iterator[jax.Array]:
            for begin in range(0, len(array), size):
                yield jnp.asarray(array[begin : begin + size])

        def decoded(latents: np.ndarray) -> np.ndarray:
            return np.concatenate([np.asarray(decode(params, x.astype(jnp.float32))) for x in batches(latents)])

        scenes = unseen_scenes(settings["prompts"], seed=settings["seed"])
        half, keep = settings["prompts"] // 2, (self.limit or settings["prompts"]) // 2
        chosen = np.r_[0:keep, half : half + keep]
        scenes = jax.tree.map(lambda x: x[chosen], scenes)
        frames = settings["frames"]
        truth = world.render(scenes, num_frames=frames)
        reports: dict[str, Any] = {}
        for scale in settings["guidance"]:
            latents = np.load(self.latents / f"plain-g{scale:g}.npz")["latents"][chosen]
            video = decoded(latents)
            halves = (("", slice(None)), (", held-out", slice(0, keep)), (", reserved", slice(keep, None)))
            found = {
                f"guidance {scale:g}{name}": report(video[part], jax.tree.map(lambda x, p=part: x[p], scenes))
                for name, part in halves
            }
            console.print(table(found))
            reports |= found
        through = through_vae(vae, quantized(truth), batch=8)
        mixed = np.asarray(swapped(scenes, num_frames=frames))
        beside = {"true clips, VAE": through, "frozen": frozen(through), "swapped": mixed}
        found = {name: report(video, scenes) for name, video in beside.items()}
        console.print(table(found))
        reports |= found
        error = np.mean(np.square(through / 127.5 - 1 - truth), axis=(1, 2, 3, 4))
        console.print(f"VAE: {np.mean(10 * np.log10(4 / error)):.2f} dB PSNR on true clips")
        result: dict[str, Any] = {name: dataclasses.asdict(r) for name, r in reports.items()}
        for wait in _WAITS:
            file = self.latents / f"occlusion-{wait}.npz"
            if file.is_file():
                latents = np.load(file)["latents"][: self.limit or None]
                hidden = occlusion_scenes(settings["occlusions"], wait=wait, seed=settings["seed"])
                hidden = jax.tree.map(lambda x: x[: self.limit or None], hidden)
                behind = report_occlusions(decoded(latents), hidden)
                result[f"occlusion {wait}"] = dataclasses.asdict(behind)
                console.print(f"wait {wait}: {behind}")
        (self.latents / "report.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    tyro.cli(Sample | Measure).run(Console(width=200))

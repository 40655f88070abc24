"""A softmax model of sprites by several guidances, latents kept: sample (quick on a GPU), then decode and measure.

``rehyat eval sprites`` is the measure of a model; this one sweeps guidance and parts the prompts.

    python -m benchmarks.sprites_quality sample  --model mini-sprites --out latents/      # GPU: about a minute
    python -m benchmarks.sprites_quality measure --model mini-sprites --latents latents/  # two CPU cores: ten minutes

The prompts are never seen in training: half of them have a held-out (object, direction) pair, the other half are
reserved captions. Latents are kept in float16; sampling is deterministic for one device and dtype.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from rehyat_jax.models.checkpoints import load_text_encoder, load_transformer, load_vae
from rehyat_jax.sampling import FlowSchedule, UniPC
from rehyat_jax.sampling.codec import Codec
from rehyat_jax.sampling.session import Session
from rehyat_jax.sampling.settings import Settings
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
        transformer, vae = load_transformer(folder, dtype=dtype, hybrid=None), load_vae(folder)
        encoder, tokenizer = load_text_encoder(folder, dtype=jnp.float32), Tokenizer.from_folder(folder)

        def clips(scenes: Any, frames: int, width: int, scale: float) -> np.ndarray:
            texts = captions(scenes)
            settings = Settings(
                num_frames=frames,
                height=world.HEIGHT,
                width=width,
                num_inference_steps=self.steps,
                guidance_scale=scale,
                schedule=FlowSchedule(shift=self.shift),
                solver=UniPC(),
            )
            session = Session(transformer=transformer, vae=vae, settings=settings)
            batch = min(self.batch, len(texts))
            parts = []
            for begin in range(0, len(texts), batch):
                some = texts[begin : begin + batch]
                text = session.embed(lambda prompt: embed_prompts(encoder, tokenizer, [prompt]), some, "")
                key = jax.random.fold_in(jax.random.key(self.seed), begin)
                noise = jax.random.normal(key, (len(some), *session.shape))
                parts.append(np.asarray(session.denoise(noise, text), np.float16))
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
        codec = Codec(vae)

        def decoded(latents: np.ndarray, size: int = 8) -> np.ndarray:
            parts = []
            for begin in range(0, len(latents), size):
                some = jnp.asarray(latents[begin : begin + size], jnp.float32)
                parts.append(np.concatenate([np.asarray(frames) for frames, _ in codec.decode(some)], axis=1))
            return np.concatenate(parts)

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

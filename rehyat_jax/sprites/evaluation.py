"""What a model of MovingSprites can do, against its teacher, its ceiling and the controls.

Four subjects: clips of a training length; clips many times as long (streamed); what comes out from behind a pillar
after a wait, of clips made from a sentence; and the same of true clips that a stream goes on with, judged early and
late. Only in the last is it known what went in: a model that is not told a name may draw an object that is none of the
world's, or two in one, and whether that comes out again cannot be judged well. Every model, ceiling and control of a
subject gets the same prompts and seeds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rehyat_jax.pipeline import TextToVideo
from rehyat_jax.sprites.captions import captions
from rehyat_jax.sprites.clips import Past, Sweep, generated, quantized, through_vae
from rehyat_jax.sprites.occlusion import OcclusionReport, judged, report_occlusions, swapped_occlusions
from rehyat_jax.sprites.prompts import occlusion_scenes, unseen_scenes
from rehyat_jax.sprites.report import Report, frozen, report, swapped
from rehyat_jax.sprites.verifier import Detections, detect
from rehyat_jax.sprites.world import (
    HEIGHT,
    OCCLUSION_WIDTH,
    WIDTH,
    Occlusions,
    Scenes,
    occlusion_frames,
    render,
    seen_again,
)

#: Names of the sources that are models.
MODELS, TEACHER = ("per step", "streamed"), "teacher"
#: A stream without what it remembers of its beginning.
EMPTIED = "… emptied"
#: Called as (part, steps done, steps in all).
OnStep = Callable[[str, int, int], None]
#: Frames of a chunk where the model has none: three latent frames.
_FRAMES_OF_A_CHUNK = 12
#: Of the bundled model's training, frames: an object may well be hidden for so long.
_LONGEST_WAIT = 48


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """How much is measured. All but ``seeds`` are for each seed, which draws prompts and noise anew."""

    clips: int
    long_clips: int
    occlusions: int
    #: The bundled model trains on clips of 33 to 129 frames, mostly 65; 1053 frames are eight times its longest.
    frames: int = 65
    long_frames: int = 1053
    waits: tuple[int, ...] = (0, 16, 48, 96)
    seeds: tuple[int, ...] = (2026,)
    #: Clips side by side.
    batch: int = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """One report on the clips of one seed."""

    subject: str
    source: str
    seed: int
    report: Report | OcclusionReport


def evaluate(
    pipe: TextToVideo,
    sample: Sample,
    *,
    sampling: Mapping[str, Any],
    teacher: TextToVideo | None = None,
    on_step: OnStep = lambda part, done, total: None,
    on_found: Callable[[list[Measurement]], None] = lambda found: None,
) -> list[Measurement]:
    """All measurements of a model; those that need a stream are left out of a model that cannot.

    Args:
        sampling: arguments of ``TextToVideo.settings`` other than sizes.
        teacher: another model to put beside it, by its per-step sweep.
        on_found: called with all measurements so far after each subject: a run that is cut has not been for nothing.
    """
    streams = pipe.transformer.why_not_stream() is None
    whole: list[_Source] = [_Source(MODELS[0], pipe, "per-step")]
    streamed = [_Source(MODELS[1], pipe, "per-chunk")] if streams else []
    beside = [_Source(TEACHER, teacher, "per-step")] if teacher else []
    run = _Run(sample=sample, sampling=sampling, vae=pipe, on_step=on_step, chunk=_chunk(pipe))
    found: list[Measurement] = []
    for seed in sample.seeds:
        if sample.clips:
            found += run.plain(
                "training length", whole + streamed + beside, clips=sample.clips, frames=sample.frames, seed=seed
            )
            on_found(found)
        if sample.long_clips and streams:
            found += run.plain("long", streamed, clips=sample.long_clips, frames=sample.long_frames, seed=seed + _APART)
            on_found(found)
        for wait in sample.waits if sample.occlusions else ():
            found += run.behind(wait, (streamed or whole) + beside, seed=seed)
            on_found(found)
        for wait in sample.waits if sample.occlusions and streams else ():
            found += run.continued(wait, streamed[0], seed=seed)
            on_found(found)
    return found


#: Keeps the prompts and noise of long clips apart from those of short ones.
_APART = 1_000_003


@dataclasses.dataclass(frozen=True)
class _Source:
    name: str
    pipe: TextToVideo
    sweep: Sweep


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    sample: Sample
    sampling: Mapping[str, Any]
    #: The model whose autoencoder sets the ceiling.
    vae: TextToVideo
    on_step: OnStep
    chunk: int

    def plain(
        self, subject: str, sources: Sequence[_Source], *, clips: int, frames: int, seed: int, apart: int = 0
    ) -> Iterator[Measurement]:
        """Models, then the ceiling, then the controls."""
        scenes = unseen_scenes(clips, seed=seed + apart)

        def found(source: str, video: np.ndarray) -> Measurement:
            return Measurement(
                subject=subject, source=source, seed=seed, report=report(video, scenes, chunk=self.chunk)
            )

        for source in sources:
            clip = self._clips(source, subject, scenes, frames=frames, width=WIDTH, seed=seed + apart)
            yield found(source.name, clip)
        part = f"{subject}, controls"
        self.on_step(part, 0, 3)
        through = through_vae(self.vae.vae, self._drawn(render, scenes, frames), batch=self._batch(frames))
        yield found("true clips, VAE", through)
        self.on_step(part, 1, 3)
        yield found("… frozen", frozen(through))
        self.on_step(part, 2, 3)
        yield found("swapped", self._drawn(swapped, scenes, frames))
        self.on_step(part, 3, 3)

    def behind(self, wait: int, sources: Sequence[_Source], *, seed: int) -> Iterator[Measurement]:
        """The same of clips with a pillar."""
        subject, frames = f"hidden wait {wait}", occlusion_frames(wait)
        scenes = occlusion_scenes(self.sample.occlusions, wait=wait, seed=seed)

        def found(source: str, video: np.ndarray) -> Measurement:
            return Measurement(subject=subject, source=source, seed=seed, report=report_occlusions(video, scenes))

        for source in sources:
            clips = self._clips(source, subject, scenes, frames=frames, width=OCCLUSION_WIDTH, seed=seed + wait)
            yield found(source.name, clips)
        part = f"{subject}, controls"
        self.on_step(part, 0, 2)
        truth = self._drawn(render, scenes, frames)
        yield found("true clips, VAE", through_vae(self.vae.vae, truth, batch=self._batch(frames)))
        self.on_step(part, 1, 2)
        yield found("swapped", self._drawn(swapped_occlusions, scenes, frames))
        self.on_step(part, 2, 2)

    def continued(self, wait: int, source: _Source, *, seed: int) -> Iterator[Measurement]:
        """True clips up to the last chunk in which the object is hidden, then a stream's, judged a chunk after the
        latest that any clip of training would show it whole, and again after one more of the longest waits, for no
        caption says how long an object waits. Beside it a stream whose state is emptied when it begins."""
        subject = f"continued, hidden wait {wait}"
        scenes, chunk = occlusion_scenes(self.sample.occlusions, wait=wait, seed=seed), self.chunk
        rest = self.vae.vae.config.temporal_factor - 1  # of a video's first latent frame, which is one frame
        in_time = occlusion_frames(max(wait, _LONGEST_WAIT) + chunk)
        frames = in_time + _LONGEST_WAIT
        truth = self._drawn(render, scenes, frames)
        hidden = int(np.asarray(seen_again(scenes, num_frames=frames)).argmax(axis=1).min())
        beginning = truth[:, : (hidden + rest) // chunk * chunk - rest]
        seen: dict[str, Detections] = {}
        for name, emptied in ((source.name, False), (EMPTIED, True)):
            clips = self._clips(
                dataclasses.replace(source, name=name),
                subject,
                scenes,
                frames=frames,
                width=OCCLUSION_WIDTH,
                seed=seed + wait,
                past=Past(frames=beginning, emptied=emptied),
            )
            seen[name] = detect(jnp.asarray(clips), pillar=True)
        part = f"{subject}, true clips"
        self.on_step(part, 0, 1)
        seen["true clips, VAE"] = detect(
            jnp.asarray(through_vae(self.vae.vae, truth, batch=self._batch(frames))), pillar=True
        )
        self.on_step(part, 1, 1)
        for when, until in (("", in_time), (f", {_LONGEST_WAIT} frames later", frames)):
            for name, found in seen.items():
                so_far = jax.tree.map(lambda a, until=until: a[:, :until], found)
                judgement = judged(so_far, scenes, width=OCCLUSION_WIDTH)
                yield Measurement(subject=subject + when, source=name, seed=seed, report=judgement)

    def _clips(
        self,
        source: _Source,
        subject: str,
        scenes: Scenes | Occlusions,
        *,
        frames: int,
        width: int,
        seed: int,
        past: Past | None = None,
    ) -> np.ndarray:
        settings = source.pipe.settings(num_frames=frames, height=HEIGHT, width=width, **self.sampling)
        part = f"{subject}, {source.name}"
        texts = captions(scenes)
        self.on_step(part, 0, 1)
        return generated(
            source.pipe,
            texts,
            settings,
            sweep=source.sweep,
            seed=seed,
            batch=self.sample.batch,
            progress=lambda done, total: self.on_step(part, done, total),
            past=past,
        )

    def _drawn(self, draw: Callable[..., Any], scenes: Any, frames: int) -> np.ndarray:
        """A few clips at a time: a true clip in float32 is four times what is kept of it."""
        size, count = self._batch(frames), len(scenes.grounds)
        parts = (jax.tree.map(lambda x, b=b: x[b : b + size], scenes) for b in range(0, count, size))
        compiled = jax.jit(draw, static_argnames="num_frames")
        return np.concatenate([quantized(compiled(some, num_frames=frames)) for some in parts])

    def _batch(self, frames: int) -> int:
        return max(1, min(self.sample.batch, 512 // frames))


def _chunk(pipe: TextToVideo) -> int:
    if pipe.transformer.why_not_stream() is not None:
        return _FRAMES_OF_A_CHUNK
    return pipe.transformer.chunk_frames() * pipe.vae.config.temporal_factor


def to_dict(measurement: Measurement) -> dict[str, Any]:
    """As JSON has it: what is not finite (nothing to judge; a half-life without end) is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    content = dataclasses.asdict(measurement)
    return content | {"report": {name: plain(value) for name, value in content["report"].items()}}

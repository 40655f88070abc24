"""The paper's ablations in MovingSprites: every row distilled, finetuned and measured, on one short schedule.

    python3 -m benchmarks.ablations --out out/ablations --gpus 4 --workers 12 --warm      # compile what follows
    python3 -m benchmarks.ablations --out out/ablations --gpus 4 --workers 12 --seconds 420
    python3 -m benchmarks.ablations --out out/ablations --table --draw ablations.png
    python3 -m benchmarks.ablations --out out/tiny --only base --seeds 1 --tiny           # two cores: does it run?

A row is a conversion of the bundled teacher, and the stages that it goes through; the teacher as it is, and finetuned
as long without a conversion, stand beside them. What is measured: distillation's error on prompts held out; by the
verifier, on prompts that no training sees, clips of training length, what comes out from behind a pillar, and for some
rows a long stream. Seed s of every row has the same prompts and the same noise.

A row and seed is a JSON line of ``ablations.jsonl``, appended as soon as it is known, with the seconds of each stage.
What is there is not done again, unless it is an error; so a run that was cut is continued by the same command. The
most important rows come first. Several workers share a GPU, so that one compiles while another steps; programs are kept
under ``--cache``, and no program depends on a seed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import tyro

from benchmarks import workers
from benchmarks.ablation_lines import Lines, draw, table
from benchmarks.ablation_rows import ROWS
from benchmarks.ablation_study import MINIBATCHES, STEPS_PER_ROUND, TINY, Job, Study
from rehyat_jax.errors import RehyatError
from rehyat_jax.models.checkpoints import load_transformer
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.pipeline import TextToVideo
from rehyat_jax.runtime.compilation import keep_compiled
from rehyat_jax.runtime.record import Phases
from rehyat_jax.sprites.captions import captions
from rehyat_jax.sprites.clips import Sweep, generated
from rehyat_jax.sprites.occlusion import report_occlusions
from rehyat_jax.sprites.prompts import occlusion_scenes, unseen_scenes
from rehyat_jax.sprites.report import report
from rehyat_jax.sprites.world import HEIGHT, OCCLUSION_WIDTH, WIDTH, occlusion_frames
from train.data.clips import Bucket
from train.data.sources import Source
from train.engine.loop import Stopped
from train.engine.optimizer import OptimizerConfig
from train.stages.distill import DistillTraining
from train.stages.finetune import FinetuneTraining

#: Seed of the prompts and the noise that rows of seed 0 are measured with, as ``rehyat eval sprites`` has it.
_FIRST_SEED = 2026
#: Frames of a chunk where the model has none.
_FRAMES_OF_A_CHUNK = 12
#: Clips that are measured side by side: 64 of them took 16 GiB, and a worker's subjects are measured together.
_AT_ONCE = 16


class _Softmax(FinetuneTraining):
    """Finetuning of the teacher as it is: the control that has had as many steps."""

    def student(self, source: Path) -> WanTransformer:
        return load_transformer(source, hybrid=None)


class Work:
    """One row and seed, from the teacher to its figures."""

    def __init__(self, study: Study, job: Job) -> None:
        self.study, self.sizes, self.row, self.seed = study, study.sizes, ROWS[job.row], job.seed
        self.folder = study.out / "students" / f"{job.row.replace(' ', '-')}-{job.seed}{'-warm' * study.warm}"
        self.dtype: Any = study.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")

    def run(self) -> dict[str, Any]:
        model = self.study.model
        found: dict[str, Any] = {}
        seconds: dict[str, dict[str, float]] = {}
        stages = [s for s in self.row.stages if getattr(self.sizes, f"{s}_steps")]
        shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was cut
        try:
            for stage in stages:
                training = self.distillation() if stage == "distill" else self.finetuning(model)
                phases = Phases()
                training.run(phases)
                seconds[stage] = {name: round(phase.milliseconds / 1000, 1) for name, phase in phases.done.items()}
                model = training.result
                if isinstance(training, DistillTraining):
                    found["distillation"] = _errors(training)
            measured = self.measured(model, begun=bool(stages))
        finally:
            if not self.study.keep:
                shutil.rmtree(self.folder, ignore_errors=True)
        seconds["measure"] = {name: figures.pop("seconds") for name, figures in measured.items()}
        return found | measured | {"seconds": seconds}

    def distillation(self) -> DistillTraining:
        assert self.row.hybrid is not None
        return DistillTraining(
            out=self.folder / "distilled",
            teacher=self.study.model,
            hybrid=dataclasses.replace(self.row.hybrid, length_norm=False),
            loss=self.row.loss,
            sources=(Source(frames=self.sizes.frames, batch=self.sizes.distill_batch),),
            num_inference_steps=self.sizes.sampling_steps,
            guidance_scale=self.sizes.guidance,
            steps=self.sizes.distill_steps,
            minibatches=MINIBATCHES,
            held_out=2,
            measure_rounds=-(-self.sizes.distill_steps // MINIBATCHES),
            seed=self.seed,
            dtype=self.dtype,
            optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=20, weight_decay=0.0),
            checkpoint_seconds=1e9,
        )

    def finetuning(self, source: Path) -> FinetuneTraining:
        sizes, kind = self.sizes, _Softmax if self.row.hybrid is None else FinetuneTraining
        plain = Bucket(kind="plain", frames=sizes.frames, batch=sizes.finetune_batch, share=0.65)
        behind = Bucket(
            kind="occlusion",
            frames=sizes.occlusion_frames,
            batch=max(sizes.occlusion_batch, 1),
            share=0.35,
            longest_wait=sizes.longest_wait,
        )
        return kind(
            out=self.folder / "student",
            source=source,
            anew="distill" not in self.row.stages,
            hybrid=self.row.hybrid,
            buckets=(plain, behind) if sizes.occlusion_batch else (plain,),
            history=self.row.history,
            remember=self.row.history.noise / 2 if self.row.history.share else "steps",
            steps=sizes.finetune_steps,
            steps_per_round=STEPS_PER_ROUND,
            unroll=True,
            shift=5.0,
            seed=self.seed,
            dtype=self.dtype,
            optimizer=OptimizerConfig(
                method="muon", learning_rate=3e-3, warmup_steps=30, schedule="linear", ema_decay=0.98
            ),
            checkpoint_seconds=1e9,
        )

    def measured(self, model: Path, *, begun: bool) -> dict[str, dict[str, Any]]:
        """Figures by subject, with their seconds.

        One after the other: cuDNN captures a graph when a program of its own is first run, and a thread that uses the
        GPU meanwhile ends one of the two, or fills a clip with garbage (seen in JAX 0.11.2 on H100 and H200).

        Args:
            begun: it has been through a stage; a conversion that has not is not there to be measured.
        """
        sizes, seed, hybrid = self.sizes, _FIRST_SEED + self.seed, self.row.hybrid
        if hybrid is not None and not begun:
            return {}
        parts: dict[str, Callable[[TextToVideo], dict[str, Any]]] = {}
        if sizes.clips:
            parts["plain"] = functools.partial(self._plain, clips=sizes.clips, frames=sizes.frames, seed=seed)
        for wait in sizes.waits if sizes.occlusions else ():
            parts[f"wait {wait}"] = functools.partial(self._behind, wait, seed=seed)
        if sizes.long_clips and self.row.streamed:
            parts["long"] = functools.partial(
                self._plain, clips=sizes.long_clips, frames=sizes.long_frames, seed=seed, streamed=True
            )
        if not parts:
            return {}
        pipe = TextToVideo.from_pretrained(
            model, dtype=self.dtype, hybrid=None if hybrid is None else "auto", cache_dir=self.study.cache_folder
        )

        def timed(part: Callable[[TextToVideo], dict[str, Any]]) -> dict[str, Any]:
            begin = time.perf_counter()
            return part(pipe) | {"seconds": round(time.perf_counter() - begin, 1)}

        return {name: timed(part) for name, part in parts.items()}

    def _plain(
        self, pipe: TextToVideo, *, clips: int, frames: int, seed: int, streamed: bool = False
    ) -> dict[str, Any]:
        scenes, hybrid = unseen_scenes(clips, seed=seed), self.row.hybrid
        video = self._clips(pipe, captions(scenes), frames=frames, width=WIDTH, seed=seed, streamed=streamed)
        chunk = _FRAMES_OF_A_CHUNK if hybrid is None else hybrid.chunk_frames * pipe.vae.config.temporal_factor
        return _figures(report(video, scenes, chunk=chunk))

    def _behind(self, wait: int, pipe: TextToVideo, *, seed: int) -> dict[str, Any]:
        scenes, frames = occlusion_scenes(self.sizes.occlusions, wait=wait, seed=seed), occlusion_frames(wait)
        video = self._clips(pipe, captions(scenes), frames=frames, width=OCCLUSION_WIDTH, seed=seed + wait)
        return _figures(report_occlusions(video, scenes))

    def _clips(
        self, pipe: TextToVideo, texts: list[str], *, frames: int, width: int, seed: int, streamed: bool = False
    ) -> Any:
        sweep: Sweep = "per-chunk" if streamed or self.row.history.share else "per-step"
        settings = pipe.settings(
            num_frames=frames,
            height=HEIGHT,
            width=width,
            num_inference_steps=self.sizes.sampling_steps,
            guidance_scale=self.sizes.guidance,
        )
        return generated(
            pipe, texts, settings, sweep=sweep, seed=seed, batch=_AT_ONCE, progress=lambda done, total: None
        )


def _errors(training: DistillTraining) -> dict[str, Any]:
    """Of what was measured at a distillation's start and at its end: means over blocks, and the blocks' own."""
    lines = [json.loads(line) for line in (training.train_folder / "blocks.jsonl").read_text().splitlines()]
    first, last = lines[0], lines[-1]
    return {
        "before": statistics.mean(first["error"]),
        "error": statistics.mean(last["error"]),
        "share": statistics.mean(last["share"]),
        "error_by_block": [round(error, 4) for error in last["error"]],
    }


def _figures(found: Any) -> dict[str, Any]:
    """A report's single numbers; null where there was nothing to judge."""
    figures = {k: v for k, v in dataclasses.asdict(found).items() if not isinstance(v, tuple)}
    return {k: v if math.isfinite(v) else None for k, v in figures.items()}


def line_of(study: Study, job: Job) -> dict[str, Any]:
    """A row's figures, or its error: the next may still give some."""
    keep_compiled(study.cache_folder)
    begin, device = time.perf_counter(), jax.devices()[0].device_kind
    line: dict[str, Any] = dataclasses.asdict(job) | {"device": device, "jax": jax.__version__}
    try:
        line |= Work(study, job).run()
    except Stopped:
        raise
    except Exception as error:
        traceback.print_exc()
        last = traceback.extract_tb(error.__traceback__)[-1]
        line |= {"error": f"{type(error).__name__}: {str(error)[:600]}", "where": f"{last.filename}:{last.lineno}"}
    return line | {"all_seconds": round(time.perf_counter() - begin, 1)}


def main(argv: list[str] | None = None) -> None:
    study = tyro.cli(Study, args=argv, description=__doc__, prog="python3 -m benchmarks.ablations")
    try:
        _run(study)
    except RehyatError as error:
        raise SystemExit(f"ablations: {error}") from error


def _run(study: Study) -> None:
    if study.table or study.draw:
        known = Lines(study.lines_file).read()
        if study.table:
            print(table(known))
        if study.draw:
            draw(known, study.draw)
        return
    if study.tiny:
        study = dataclasses.replace(study, sizes=TINY)
    jobs = study.jobs()
    if study.warm:
        study = dataclasses.replace(study, sizes=study.sizes.warming())
        _work(study, _tell, [job for job in jobs if not job.seed])
        return
    lines = Lines(study.lines_file)
    lines.begin(study.settings)
    done = {(line["row"], line["seed"]) for line in lines.read()}

    def write(line: dict[str, Any]) -> None:
        lines.append(line)
        _tell(line)

    _work(study, write, [job for job in jobs if (job.row, job.seed) not in done])
    done = {(line["row"], line["seed"]) for line in lines.read()}
    left = [f"{job.row} ({job.seed})" for job in jobs if (job.row, job.seed) not in done]
    print(f"not done: {', '.join(left) or 'nothing'}", file=sys.stderr)


def _work(study: Study, write: Callable[[dict[str, Any]], None], jobs: list[Job]) -> None:
    workers.run(
        functools.partial(line_of, study),
        jobs,
        write,
        died=lambda job, why: dataclasses.asdict(job) | {"error": why},
        workers=study.workers,
        gpus=study.gpus,
        seconds=study.seconds,
        logs=study.out / "logs",
    )


def _tell(line: dict[str, Any]) -> None:
    print(json.dumps(line, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()

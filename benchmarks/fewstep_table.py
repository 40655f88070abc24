"""What the gradient through the state, consistency and scores each give: {detached, through} × {each, both}, by seeds.

    python -m benchmarks.fewstep_table train --out out/table --seeds 2          # one H200
    python -m benchmarks.fewstep_table measure --out out/table                  # 40 s a student
    python -m benchmarks.fewstep_table draw --lines out/table/table.jsonl --to table.png

Every student begins as the bundled 20-step one. Half the batch, and fewer steps, of `configs/sprites_consistency.py`
(no wait above 48) and `configs/sprites_forcing.py`; "both" is scores after consistency. What stands is left alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import tyro

from rehyat_jax.pipeline import TextToVideo
from rehyat_jax.sprites.evaluation import MODELS, Sample, evaluate
from train.cli.config_files import load_config
from train.data.clips import Bucket
from train.engine.run import RunConfig
from train.stages.forced import ForcedTraining
from train.stages.forcing import ForcingTraining

Aim = Literal["consistency", "scores", "both"]
Gradients = Literal["through", "detached"]
_SOURCE = Path("mini-sprites-20-steps")
#: Steps a chunk, those of the first chunk, and the name in a line.
_FEW = ((4, 4), (2, 2), (1, 4))


class Student(NamedTuple):
    aim: Aim
    gradients: Gradients
    seed: int

    def __str__(self) -> str:
        return f"{self.aim}-{self.gradients}-{self.seed}"

    def training(self, out: Path) -> RunConfig:
        """Its run; "both" begins with the consistent one of the same seed and gradients."""
        given: dict[str, Any] = {
            "out": out / str(self),
            "source": out / str(self._replace(aim="consistency")) if self.aim == "both" else _SOURCE,
            "stop": int(self.gradients == "detached"),
            "seed": self.seed,
        }
        if self.aim == "consistency":
            shipped: Any = load_config("sprites_consistency", kinds=(ForcedTraining,)).config
            return dataclasses.replace(
                shipped,
                **given,
                buckets=(
                    Bucket(kind="plain", frames=69, batch=32, share=0.4, pairs=0.8),
                    Bucket(kind="plain", frames=21, batch=96, share=0.2, pairs=0.8),
                    Bucket(kind="occlusion", frames=129, batch=16, share=0.4, longest_wait=48),
                ),
                steps=160,
                optimizer=dataclasses.replace(shipped.optimizer, ema_decay=0.97),
            )
        shipped = load_config("sprites_forcing", kinds=(ForcingTraining,)).config
        plain, hidden = (
            dataclasses.replace(rollouts, clips=dataclasses.replace(rollouts.clips, batch=rollouts.clips.batch // 2))
            for rollouts in shipped.buckets
        )
        return dataclasses.replace(shipped, **given, buckets=(plain, hidden), steps=300)


def students(seeds: int) -> Iterator[Student]:
    for seed in range(seeds):
        for aim in get_args(Aim):
            for gradients in get_args(Gradients):
                yield Student(aim, gradients, seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Train all students, one after the other."""

    out: Path
    seeds: int = 2

    def __call__(self) -> None:
        for student in students(self.seeds):
            if not (self.out / str(student)).exists():
                student.training(self.out).run()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """Measure the students that stand, on prompts never seen: a line each."""

    out: Path
    seeds: int = 2
    clips: int = 128
    occlusions: int = 48

    def __call__(self) -> None:
        for student in students(self.seeds):
            if not (folder := self.out / str(student)).exists():
                continue
            pipe, line = TextToVideo.from_pretrained(folder), student._asdict()
            plain = Sample(clips=self.clips, occlusions=0, long_clips=0)
            for steps, first in _FEW:
                sampling = {"num_inference_steps": steps, "first_chunk_steps": first, "guidance_scale": 1.0}
                found: Any = {m.source: m.report for m in evaluate(pipe, plain, sampling=sampling)}[MODELS[1]]
                line[f"steps {steps}"] = [found.recall, found.directions, found.speed]
            hidden = Sample(clips=0, occlusions=self.occlusions, long_clips=0, waits=(48, 96))
            sampling = {"num_inference_steps": 4, "first_chunk_steps": 4, "guidance_scale": 1.0}
            for m in evaluate(pipe, hidden, sampling=sampling):
                if m.source == MODELS[1] and m.subject in ("continued, hidden wait 48", "continued, hidden wait 96"):
                    back: Any = m.report
                    line[m.subject.replace("continued, hidden wait", "hidden")] = [back.emerged, back.recall]
            print(text := json.dumps(line), flush=True)
            with open(self.out / "table.jsonl", "a", encoding="utf-8") as lines:
                lines.write(text + "\n")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw:
    """Plot lines: directions by steps, and what comes back after it was hidden; a dot a seed."""

    lines: Path
    to: Path

    def __call__(self) -> None:
        import matplotlib.pyplot as plt  # type: ignore[import-not-found,import-untyped,unused-ignore]

        found = [json.loads(line) for line in self.lines.read_text(encoding="utf-8").splitlines()]
        figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
        panels = [
            (
                axes[0],
                "directions (128 clips)",
                [("4 steps", "steps 4", 1), ("2", "steps 2", 1), ("1, first 4", "steps 1", 1)],
            ),
            (axes[1], "the same comes back (48 clips)", [("48 hidden", "hidden 48", 1), ("96 hidden", "hidden 96", 1)]),
        ]
        for panel, label, groups in panels:
            for place, (_, field, part) in enumerate(groups):
                for number, (aim, gradients) in enumerate((a, g) for a in get_args(Aim) for g in get_args(Gradients)):
                    values = [x[field][part] for x in found if (x["aim"], x["gradients"]) == (aim, gradients)]
                    at = place + (number - 2.5) / 8
                    colour, filled = f"C{get_args(Aim).index(aim)}", gradients == "through"
                    name = f"{aim}, {gradients}" if place == 0 else None
                    panel.bar(at, np.mean(values), 0.11, fill=filled, edgecolor=colour, color=colour, label=name)
                    panel.plot([at] * len(values), values, "k.", markersize=4)
            panel.set(xticks=range(len(groups)), xticklabels=[name for name, *_ in groups], ylabel=label)
        axes[0].set_ylim(0.75, 1.05)
        axes[0].legend(fontsize=7, ncols=3, loc="upper center")
        figure.suptitle("Students of 20 guided steps, trained for minutes on one H200")
        figure.savefig(self.to, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    tyro.cli(Train | Measure | Draw, args=argv, description=__doc__)()


if __name__ == "__main__":
    main()

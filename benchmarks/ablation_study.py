"""What is asked of `benchmarks.ablations`: the schedule, how much is measured, and where it runs."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from benchmarks.ablation_rows import ROWS
from rehyat_jax.errors import RehyatError
from rehyat_jax.runtime.compilation import cache_folder

#: Trajectories of distillation that are learned at once, and finetuning's steps of a round: what programs are made for.
MINIBATCHES, STEPS_PER_ROUND = 4, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """The schedule, and how much is measured; what is 0 is left out. No program depends on the numbers of training
    steps."""

    distill_steps: int = 160
    """Of the optimiser, four to a pass of the teacher."""
    distill_batch: int = 32
    """Trajectories side by side."""
    finetune_steps: int = 240
    finetune_batch: int = 32
    frames: int = 65
    """Of plain clips: of distillation, of finetuning, and of those that are measured."""
    occlusion_batch: int = 16
    occlusion_frames: int = 97
    """Of finetuning's clips with a pillar, a third of its rounds."""
    longest_wait: int = 16
    """Of the same, hidden."""
    clips: int = 64
    occlusions: int = 32
    """Clips for each of the waits."""
    waits: tuple[int, ...] = (16, 48)
    long_clips: int = 8
    long_frames: int = 257
    sampling_steps: int = 20
    """Of distillation's trajectories and of what is measured."""
    guidance: float = 4.0

    def warming(self) -> Sizes:
        """A round of each stage: the same programs, useless results."""
        return dataclasses.replace(
            self,
            distill_steps=min(self.distill_steps, MINIBATCHES),
            finetune_steps=min(self.finetune_steps, STEPS_PER_ROUND),
        )


TINY = Sizes(
    distill_steps=4,
    distill_batch=2,
    finetune_steps=8,
    finetune_batch=2,
    frames=21,
    occlusion_batch=2,
    occlusion_frames=21,
    longest_wait=0,
    clips=2,
    occlusions=1,
    waits=(0,),
    long_clips=1,
    long_frames=33,
    sampling_steps=2,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Run the rows; or show, by --table and --draw, what is known of them, and run nothing."""

    out: Path
    """Folder of everything that is written."""
    model: Path = Path("mini-sprites")
    """The teacher: its softmax part."""
    only: tuple[str, ...] = ()
    """Rows by name, or by the first word of several (chunk, overlap, …); all when none is named."""
    seeds: int = 3
    """Of the rows that matter most; the others have seed 0 alone."""
    gpus: int = 0
    """0: whatever JAX finds."""
    workers: int = 1
    """Processes; they go round the GPUs. A single one without GPUs to choose from is this process."""
    seconds: float = math.inf
    """After these no row is begun."""
    warm: bool = False
    """Only compile: a round of each stage, seed 0; no lines are written."""
    keep: bool = False
    """Keep the students, under students/."""
    tiny: bool = False
    """Sizes that mean nothing: to try the program itself."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of all computation; when not given float32 on a CPU, else bfloat16."""
    cache: Path | None = None
    """Folder of compiled programs and prompt embeddings; when not given, cache/ in --out."""
    table: bool = False
    """Print the lines as a table."""
    draw: Path | None = None
    """Draw the lines (needs matplotlib)."""
    lines: Path | None = None
    """Another file of lines to show than --out's."""
    sizes: Annotated[Sizes, tyro.conf.OmitArgPrefixes] = Sizes()

    @property
    def lines_file(self) -> Path:
        return self.lines or self.out / "ablations.jsonl"

    @property
    def cache_folder(self) -> Path | None:
        return cache_folder(self.cache or self.out / "cache")

    @property
    def settings(self) -> dict[str, Any]:
        """What lines of one file have in common."""
        return json.loads(json.dumps({"model": str(self.model), "dtype": self.dtype} | dataclasses.asdict(self.sizes)))

    def jobs(self) -> list[Job]:
        """The most important first.

        Raises:
            RehyatError: there is no such row.
        """
        for word in self.only:
            if not any(_named(word, row) for row in ROWS):
                raise RehyatError(f"there is no row {word!r}; there are {', '.join(ROWS)}")
        rows = {n: row for n, row in ROWS.items() if not self.only or any(_named(word, n) for word in self.only)}
        return [Job(name, seed) for seed in range(self.seeds) for name, row in rows.items() if not seed or row.headline]


def _named(word: str, row: str) -> bool:
    return word == row or row.startswith(f"{word} ")


@dataclasses.dataclass(frozen=True)
class Job:
    row: str
    seed: int

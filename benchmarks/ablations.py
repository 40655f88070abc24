"""The paper's ablations in MovingSprites, as far as distillation goes: how well blocks reproduce their teacher.

    python -m benchmarks.ablations --out ablations.json [--steps 200] [--seeds 1] [--only chunk overlap] [--batch 4]
    python -m benchmarks.ablations --out ablations.json --draw ablations.png      # what is there already, as a picture

Each row distils the bundled teacher's ten blocks anew, on one short schedule that is the same for all, and is measured
on prompts held out: Σ|y − ŷ| / Σ|y| of every block's attention over whole trajectories, as `train.distill` measures it.
A JSON line a row, all of them in ``--out``. What finetuning makes of it is another matter: `rehyat eval sprites`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rehyat_jax.files import check_writable
from rehyat_jax.hybrid_config import HybridConfig
from train.distill import DistillTraining
from train.optimizer import OptimizerConfig
from train.sources import Source

BASE = HybridConfig(chunk_frames=3, overlap_frames=1)
#: What is varied, and how: fields of `HybridConfig`, and of `DistillTraining` where a row names a loss.
ROWS: dict[str, list[dict[str, Any]]] = {
    "base": [{}],
    "chunk": [{"chunk_frames": n} for n in (1, 2, 5)],
    "overlap": [{"overlap_frames": n} for n in (0, 2)],
    "causal": [{"causal": False}],
    "degree": [{"degree": n} for n in (1, 3)],
    "depth": [{"layers": n} for n in (1, 3)],
    "stabilizer": [{"stabilizer": name} for name in ("lse", "none")],
    "linear": [{"kind": "linear"}],
    "loss": [{"loss": "score"}],
}


def training(out: Path, row: dict[str, Any], *, steps: int, batch: int, seed: int, dtype: str) -> DistillTraining:
    """Of one row and seed."""
    fields = dict(row)
    loss = fields.pop("loss", "l1")
    return DistillTraining(
        out=out, hybrid=dataclasses.replace(BASE, **fields), sources=(Source(frames=65, batch=batch),), steps=steps,
        minibatches=4, loss=loss, held_out=2, measure_rounds=-(-steps // 4), seed=seed, dtype=dtype,  # type: ignore[arg-type]
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=20, weight_decay=0.0),
    )  # fmt: skip


def measured(training: DistillTraining) -> dict[str, Any]:
    """Run it; the means over blocks of what was measured at its start and at its end."""
    begun = time.monotonic()
    training.run()
    lines = [json.loads(line) for line in (training.train_folder / "blocks.jsonl").read_text().splitlines()]
    first, last = lines[0], lines[-1]
    return {
        "before": statistics.mean(first["error"]), "error": statistics.mean(last["error"]),
        "share": statistics.mean(last["share"]), "seconds": round(time.monotonic() - begun, 1),
    }  # fmt: skip


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """A bar a row: the mean over seeds, each seed a dot; needs matplotlib."""
    import matplotlib.pyplot as plt  # type: ignore[import-not-found,import-untyped,unused-ignore]

    rows: dict[str, list[float]] = {}
    for line in lines:
        name = ", ".join(f"{key} {value}" for key, value in line["row"].items()) or "chunk 3, overlap 1"
        rows.setdefault(name, []).append(line["error"])
    figure, axes = plt.subplots(figsize=(7, 0.3 * len(rows) + 1), layout="constrained")
    axes.barh(list(rows), [statistics.mean(errors) for errors in rows.values()], color="lightgrey")
    for name, errors in rows.items():
        axes.plot(errors, [name] * len(errors), "k.")
    axes.invert_yaxis()
    axes.set_xlabel("error of attention on prompts held out, relative")
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="all lines as JSON")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), help="what is varied")
    parser.add_argument("--steps", type=int, default=200, help="of the optimiser, four to a pass of the teacher")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4, help="trajectories side by side")
    parser.add_argument("--draw", type=Path, metavar="FILE.png", help="draw the lines of --out and run nothing")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    given = parser.parse_args(argv)
    if given.draw:
        draw(json.loads(given.out.read_text(encoding="utf-8")), given.draw)
        return
    check_writable(given.out)

    from rehyat_jax.compilation import cache_folder, keep_compiled

    keep_compiled(cache_folder())
    lines: list[dict[str, Any]] = []
    for row in (row for name in given.only for row in ROWS[name]):
        for seed in range(given.seeds):
            with tempfile.TemporaryDirectory() as folder:
                run = training(
                    Path(folder) / "student", row, steps=given.steps, batch=given.batch, seed=seed, dtype=given.dtype
                )
                lines.append({"row": row, "seed": seed, "steps": given.steps, **measured(run)})
            print(json.dumps(lines[-1]), flush=True)
            given.out.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

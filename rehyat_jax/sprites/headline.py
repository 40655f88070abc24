"""The measurements of a model as tables to print."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from rehyat_jax.sprites.evaluation import MODELS, TEACHER, Measurement
from rehyat_jax.sprites.report import Report

#: Figures of a report, and what they are called.
_PLAIN = {
    "recall": "identity recall",
    "directions": "directions",
    "speed": "speed",
    "grounds": "ground",
    "captions": "captions",
    "third": "third seen",
    "ground_drift": "ground drift",
    "seam": "seam",
}
#: Of clips with a pillar; by chance, what comes out is the same in 1 of 64.
_OCCLUSION = {"entered": "entered", "emerged": "came out", "recall": "was the same"}
#: Those of which a model's over its teacher's is shown.
_COMPARED = ("recall", "directions", "speed", "grounds")


def headline(measurements: Sequence[Measurement]) -> list[Table]:
    """A table for each subject: a column for each model, ceiling and control, a row for each figure. Means over seeds,
    ± the standard deviation where there are several; "-" where there was nothing to judge."""
    return [
        _table([m for m in measurements if m.subject == subject])
        for subject in dict.fromkeys(m.subject for m in measurements)
    ]


def _table(rows: Sequence[Measurement]) -> Table:
    sources: dict[str, list[Measurement]] = {}
    for row in rows:
        sources.setdefault(row.source, []).append(row)
    report = rows[0].report
    plain = isinstance(report, Report)
    seeds = f", {len(sources[rows[0].source])} seeds" if len(sources[rows[0].source]) > 1 else ""
    title = f"{rows[0].subject}: {report.clips} clips{seeds}" + (
        f", {report.frames} frames" if isinstance(report, Report) else ""
    )
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("")
    for source in sources:
        table.add_column(source, justify="right")
    for figure, name in (_PLAIN if plain else _OCCLUSION).items():
        table.add_row(name, *(_text(_values(found, figure)) for found in sources.values()))
        if figure in _COMPARED and TEACHER in sources:
            shares = (
                _share(found, sources[TEACHER], figure) if source in MODELS else "" for source, found in sources.items()
            )
            table.add_row("  over the teacher's", *shares)
    return table


def _values(found: Sequence[Measurement], figure: str) -> np.ndarray:
    values = np.array([dataclasses.asdict(each.report)[figure] for each in found], float)
    return values[np.isfinite(values)]


def _text(values: np.ndarray) -> str:
    if not values.size:
        return "-"
    mean = values.mean()
    digits = 3 if abs(mean) >= 5e-3 or mean == 0 else 5
    spread = f" ± {values.std(ddof=1):.{digits}f}" if values.size > 1 else ""
    return f"{mean:.{digits}f}{spread}"


def _share(found: Sequence[Measurement], teacher: Sequence[Measurement], figure: str) -> str:
    mine, other = _values(found, figure), _values(teacher, figure)
    share = mine.mean() / other.mean() if mine.size and other.size and other.mean() else math.nan
    return f"{share:.3f}" if math.isfinite(share) else "-"

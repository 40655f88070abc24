"""The lines of `benchmarks.ablations`: kept in a file, as a table, and as a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rehyat_jax.errors import RehyatError

#: Figures by subject, and what they are called; "wait" stands for every wait.
_SHOWN = {
    "distillation": {"before": "error before", "error": "error", "share": "the past's share"},
    "plain": {"recall": "recall", "directions": "directions", "speed": "speed", "grounds": "ground", "seam": "seam"},
    "wait": {"emerged": "came out", "recall": "was the same"},
    "long": {"recall": "recall", "directions": "directions", "speed": "speed"},
}
#: Those that are drawn.
_DRAWN = {
    ("distillation", "error"),
    ("plain", "recall"),
    ("plain", "directions"),
    ("plain", "speed"),
    ("wait", "recall"),
}

Line = dict[str, Any]


class Lines:
    """A file of JSON lines: the settings first, then a row and seed each, appended whole."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, settings: dict[str, Any]) -> None:
        """Make the file, or go on with it.

        Raises:
            RehyatError: its lines are of other settings.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        known = [line["settings"] for line in map(_parsed, text.splitlines()) if "settings" in line]
        if known and known[0] != settings:
            changed = sorted(k for k in settings | known[0] if settings.get(k) != known[0].get(k))
            raise RehyatError(f"{self.path} has lines of other settings ({', '.join(changed)}); choose another --out")
        if text and not text.endswith("\n"):  # a line that was cut
            self._write("\n")
        if not known:
            self.append({"settings": settings})

    def append(self, line: Line) -> None:
        self._write(json.dumps(line, ensure_ascii=False) + "\n")

    def read(self) -> list[Line]:
        """Of all rows and seeds that gave figures.

        Raises:
            RehyatError: there is no such file.
        """
        if not self.path.is_file():
            raise RehyatError(f"there are no lines at {self.path}")
        lines = map(_parsed, self.path.read_text(encoding="utf-8").splitlines())
        return [line for line in lines if "row" in line and "error" not in line]

    def _write(self, text: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)


def _parsed(text: str) -> Line:
    try:
        return dict(json.loads(text))
    except ValueError:
        return {}


def _by_row(lines: Sequence[Line]) -> dict[str, list[Line]]:
    rows: dict[str, list[Line]] = {}
    for line in lines:
        rows.setdefault(line["row"], []).append(line)
    return rows


def _columns(lines: Sequence[Line]) -> list[tuple[str, str, str]]:
    """Subject, figure and title of all that some line has."""
    subjects = list(dict.fromkeys(key for line in lines for key in line))
    found = []
    for kind, figures in _SHOWN.items():
        for subject in (s for s in subjects if s == kind or s.startswith(f"{kind} ")):
            found += [(subject, figure, f"{subject}: {name}") for figure, name in figures.items()]
    return [c for c in found if any(_values([line], c[0], c[1]) for line in lines)]


def _values(lines: Sequence[Line], subject: str, figure: str) -> list[float]:
    values = [line.get(subject, {}).get(figure) for line in lines]
    return [value for value in values if value is not None]


def table(lines: Sequence[Line]) -> str:
    """In Markdown: a row each, means over seeds ± their standard deviation where there are several."""
    columns, rows = _columns(lines), _by_row(lines)

    def text(values: list[float]) -> str:
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{spread}" if values else "-"

    head = ["row", "seeds", *(title for *_, title in columns)]
    body = [
        [name, str(len(some)), *(text(_values(some, subject, figure)) for subject, figure, _ in columns)]
        for name, some in rows.items()
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *body])


def draw(lines: Sequence[Line], path: Path) -> None:
    """A panel a figure, in it a bar a row: the mean over seeds, each seed a dot; needs matplotlib."""
    import matplotlib.pyplot as plt  # type: ignore[import-not-found,import-untyped,unused-ignore]

    rows = _by_row(lines)
    columns = [c for c in _columns(lines) if (c[0].split()[0], c[1]) in _DRAWN]
    size = (2.5 * len(columns) + 2.5, 0.3 * len(rows) + 1)
    figure, panels = plt.subplots(1, len(columns), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axes, (subject, name, title) in zip(panels[0], columns, strict=True):
        for place, some in enumerate(rows.values()):
            if values := _values(some, subject, name):
                axes.barh(place, statistics.mean(values), color="lightgrey")
                axes.plot(values, [place] * len(values), "k.")
        axes.set_xlabel(title)
    panels[0][0].set_yticks(range(len(rows)), list(rows))
    panels[0][0].invert_yaxis()
    figure.savefig(path, dpi=120)

"""Times and memory against a video's length, from the lines of the other benchmarks; needs matplotlib.

python -m benchmarks.plots --lines gpu_check.json dit.json --out length.png
"""

from __future__ import annotations

import argparse
import collections
import json
import re
from collections.abc import Sequence
from pathlib import Path

#: A case that is a length: what it is of, and its latent frames.
_CASE = re.compile(r"(softmax, cudnn|operator with φ|softmax, forward|hybrid, forward), (\d+) frames")
_NAMES = {
    "softmax, cudnn": "full softmax, cuDNN",
    "operator with φ": "hybrid operator",
    "softmax, forward": "transformer, full softmax",
    "hybrid, forward": "transformer, hybrid",
}


def draw(lines: Sequence[dict], path: Path) -> None:
    """Milliseconds of the operator and of the transformer, and the transformer's memory, each against latent frames."""
    import matplotlib.pyplot as plt  # type: ignore[import-not-found,import-untyped,unused-ignore]

    found: dict[str, list[tuple[int, dict]]] = collections.defaultdict(list)
    for line in lines:
        if (match := _CASE.fullmatch(line["case"])) and "ms" in line:
            found[match[1]].append((int(match[2]), line))
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    panels = [
        ("ms", "ms, a layer's attention", ("softmax, cudnn", "operator with φ")),
        ("ms", "ms, forward", ("softmax, forward", "hybrid, forward")),
        ("program_gib", "GiB, forward", ("softmax, forward", "hybrid, forward")),
    ]
    for panel, (field, label, cases) in zip(axes, panels, strict=True):
        for case in cases:
            points = sorted((frames, line[field]) for frames, line in found[case])
            if points:
                panel.plot(*zip(*points, strict=True), "o-", label=_NAMES[case])
        panel.set(xlabel="latent frames", ylabel=label, ylim=(0, None))
        panel.legend()
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", nargs="+", type=Path, required=True, help="files of lines")
    parser.add_argument("--out", type=Path, required=True, help="a PNG")
    given = parser.parse_args(argv)
    draw([line for path in given.lines for line in json.loads(path.read_text(encoding="utf-8"))], given.out)


if __name__ == "__main__":
    main()

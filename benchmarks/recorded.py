"""What was recorded of a case before, on the same kind of device; and the least time that its arithmetic takes."""

from __future__ import annotations

import functools
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax

from train.engine.arithmetic import PEAK_TFLOPS

RESULTS = pathlib.Path(__file__).with_name("results")
#: A case's time, by the one of these names that it has.
_TIMES = ("ms", "ms_a_chunk")
#: From this on a run says that it is slower.
SLOWER = 1.05


def commit() -> str:
    """Of the code that runs; "unknown" where git does not say."""
    command = ["git", "-C", str(RESULTS.parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@functools.cache
def recorded(device_kind: str, folder: pathlib.Path = RESULTS) -> dict[str, tuple[float, str]]:
    """Milliseconds and commit of every case that there are lines of for ``jax.Device.device_kind``."""
    found: dict[str, tuple[float, str]] = {}
    for path in sorted(folder.glob("*.json")):
        lines = json.loads(path.read_text(encoding="utf-8"))
        machine = next((line for line in lines if isinstance(line, dict) and line.get("case") == "machine"), {})
        if machine.get("device") != device_kind:
            continue
        for line in lines:
            if (ms := _ms(line)) is not None:
                found[line["case"]] = ms, str(machine.get("commit", "unknown"))
    return found


def beside(case: str, figures: dict[str, Any], device_kind: str, folder: pathlib.Path = RESULTS) -> dict[str, Any]:
    """What a case's line says beside its own figures; of a slower run one line more, on standard error."""
    ms, before = _ms(figures), recorded(device_kind, folder).get(case)
    if ms is None or before is None:
        return {}
    ratio = ms / before[0]
    if ratio > SLOWER:
        percent = 100 * (ratio - 1)
        print(f"SLOWER by {percent:.0f} %: {case}: {ms} ms, {before[0]} at commit {before[1]}", file=sys.stderr)
    return {"recorded_ms": before[0], "recorded_commit": before[1], "of_recorded": round(ratio, 3)}


def floor(flops: float, ms: float) -> dict[str, float]:
    """The least milliseconds for so many operations by the device's data sheet, and their share of a time; nothing for
    a device of which none is known."""
    peak = PEAK_TFLOPS.get(jax.devices()[0].device_kind)
    if peak is None:
        return {}
    least = flops / peak / 1e9
    return {"floor_ms": round(least, 2), "of_floor": round(least / ms, 3)}


def _ms(figures: dict[str, Any]) -> float | None:
    return next((figures[name] for name in _TIMES if name in figures), None)

"""Where a program's time goes on a GPU: its kernels, by JAX's own profiler."""

from __future__ import annotations

import collections
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax

#: Whether a benchmark takes profiles; see ``timing.arguments``.
wanted = False
#: What the program that was profiled last took, kernel by kernel.
_last: dict[str, Any] = {}
#: Kernels told one by one; the others are summed.
_MOST = 16
_OPERATION = re.compile(r'^\s*(?:ROOT )?%(\S+) = .*op_name="([^"]*)"', re.MULTILINE)


def times(call: Callable[[], Any], *, device: int = 0) -> dict[str, float]:
    """Milliseconds of each kernel of one call, the longest first; nothing where the device is no GPU."""
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
    found: collections.Counter[str] = collections.Counter()
    for plane in profile.planes:
        if plane.name == f"/device:GPU:{device}":
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        found[event.name] += event.duration_ns
    return {name: ns / 1e6 for name, ns in found.most_common()}


def take(call: Callable[[], Any], program: Any = None) -> None:
    """Profile one call, where that is `wanted`; ``program``, compiled, says what its fusions are of."""
    if not wanted:
        return
    each = times(call)
    text = program.as_text() if hasattr(program, "as_text") else ""
    of = {name: operation.split("/", 1)[-1] for name, operation in _OPERATION.findall(text)}
    told = [[round(ms, 3), name[:100], of.get(name, "")[-120:]] for name, ms in list(each.items())[:_MOST]]
    rest = sum(list(each.values())[_MOST:])
    _last.update(kernels_ms=round(sum(each.values()), 3), kernels=told, other_kernels_ms=round(rest, 3))


def taken() -> dict[str, Any]:
    """Once, what `take` found."""
    found = dict(_last)
    _last.clear()
    return found

"""The run record: a JSON file beside an output that says how it was made, how long that took and in how much memory."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rehyat_jax.runtime.files import whole_file
from rehyat_jax.runtime.outputs import marker


@dataclasses.dataclass
class Phase:
    """One part of a run, or several stretches of it under one name. Bytes are ``None`` where they cannot be learnt."""

    milliseconds: float = 0.0
    #: Peak resident memory of the process during the phase (since the start of the process where the system cannot
    #: reset its mark).
    host_peak_bytes: int | None = None
    #: Peak memory of the fullest device, since the start of the process: devices do not reset theirs.
    device_peak_bytes: int | None = None


class Phases:
    """Times and memory of a run by phase: ``with phases.measure("denoise"): …``. Phases do not nest."""

    def __init__(self) -> None:
        self.done: dict[str, Phase] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the block to the phase ``name``; a phase entered again goes on counting."""
        phase = self.done.setdefault(name, Phase())
        _reset_host_peak()
        start = time.perf_counter()
        try:
            yield
        finally:
            phase.milliseconds += 1000 * (time.perf_counter() - start)
            peaks = [peak for peak in (phase.host_peak_bytes, _host_peak_bytes()) if peak is not None]
            phase.host_peak_bytes = max(peaks, default=None)
            phase.device_peak_bytes = _device_peak_bytes()

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return {
            name: dataclasses.asdict(phase) | {"milliseconds": round(phase.milliseconds, 1)}
            for name, phase in self.done.items()
        }


def environment() -> dict[str, Any]:
    """Versions and devices that a result may depend on."""
    import jax

    device = jax.devices()[0]
    return {
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("rehyat-jax", "jax", "jaxlib", "flax", "numpy")},
        "platform": platform.platform(),
        "device": {"kind": device.device_kind, "platform": device.platform, "count": jax.device_count()},
    }


def write_record(
    path: str | os.PathLike[str],
    *,
    command: str,
    settings: Mapping[str, Any],
    phases: Phases,
    output: str | os.PathLike[str],
    **more: Any,
) -> None:
    """Write the record as JSON, whole or not at all.

    Args:
        path: the record's own path.
        command: what made the output, as "rehyat generate".
        settings: every setting with the value it was resolved to, the seed among them.
        phases: what was measured.
        output: what the record stands beside; it may be replaced with that one.
        more: further entries, as the output's size.

    Raises:
        RehyatError: the file cannot be written.
    """
    record = {
        "command": command,
        **marker(output),
        "argv": sys.argv,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "settings": dict(settings),
        **more,
        "phases": phases.to_dict(),
        **environment(),
    }
    text = json.dumps(record, indent=2, default=str, ensure_ascii=False)
    with whole_file(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def _reset_host_peak() -> None:
    with suppress(OSError):  # elsewhere than on Linux the peak stays the process's
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to the present size


def _host_peak_bytes() -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _device_peak_bytes() -> int | None:
    import jax

    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((peak for peak in peaks if peak is not None), default=None)

"""What memory this machine has for a run, and refusing one that cannot fit: before anything is read, in one sentence.

Estimates are made from shapes alone by those who know them (`rehyat_jax.models.memory`); here they are compared.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import jax

from rehyat_jax.errors import ConfigError

_GB = 1e9
#: Limits of a container, in version 2 and version 1 of control groups.
_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes that a run needs at its fullest moment."""

    #: By what needs them: these lie in a device's memory side by side.
    device: Mapping[str, int]
    #: In the host's memory; beside the device's where the device is the host itself.
    host: int = 0

    @property
    def on_device(self) -> int:
        return sum(self.device.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Room:
    """Bytes that are free; None where that cannot be known."""

    device: int | None
    host: int | None
    #: Whether the device's memory is the host's.
    shared: bool

    @classmethod
    def here(cls) -> Room:
        """Of the first device, and of this process's machine or container."""
        device = jax.local_devices()[0]
        if device.platform == "cpu":
            return cls(device=None, host=_host_room(), shared=True)
        try:
            known = device.memory_stats() or {}
        except Exception:  # a backend without them
            known = {}
        limit = known.get("bytes_limit")
        return cls(
            device=None if limit is None else limit - known.get("bytes_in_use", 0), host=_host_room(), shared=False
        )

    def lacking(self, need: Need) -> tuple[str, int, int] | None:
        """What is too small: its name, the bytes needed and those that are there."""
        host = need.host + (need.on_device if self.shared else 0)
        if self.host is not None and host > self.host:
            return "memory", host, self.host
        if self.device is not None and need.on_device > self.device:
            return "device memory", need.on_device, self.device
        return None


def check_memory(
    need: Need, *, what: str, smaller: Callable[[], str | None] = lambda: None, force: bool = False
) -> None:
    """Refuse a run that this machine has no room for.

    Args:
        what: the run, as "81 frames of 832x480".
        smaller: says what would fit, as "--size 416x240"; None where nothing would. Asked only when this does not.
        force: say it, and go on.

    Raises:
        ConfigError: it does not fit.
    """
    if (lacking := Room.here().lacking(need)) is None:
        return
    kind, wanted, there = lacking
    name, largest = max(need.device.items(), key=lambda part: part[1])
    said = (
        f"{what} need about {wanted / _GB:.1f} GB of {kind} ({largest / _GB:.1f} of it for {name}), "
        f"and {there / _GB:.1f} GB are free"
    )
    if force:
        print(f"rehyat: {said}; going on, for --force", file=sys.stderr)
        return
    fits = smaller()
    raise ConfigError(f"{said}: {fits + ' would fit, and ' if fits else ''}--force goes on all the same")


def _host_room() -> int | None:
    """What the system says is available, and no more than a container's limit leaves."""
    rooms = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                rooms.append(int(line.split()[1]) << 10)
    except (OSError, ValueError):
        return None
    for limit, used in _LIMITS:
        try:
            rooms.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min(rooms, default=None)

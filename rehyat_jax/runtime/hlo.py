"""What a compiled program does, read from its text: cycles, kernels, and what its collectives move.

For a TPU, XLA writes beside every instruction how many cycles it expects. A loop's body is there once, and its
condition says how often it runs. Of a branch the costlier arm counts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import NamedTuple

_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One collective of a program, all its runs together."""

    kind: str
    #: Devices that exchange with each other.
    group: int
    #: Whether the program goes on with other work meanwhile.
    overlaps: bool
    #: Received by each device.
    bytes: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """Of one device in one run of a program."""

    #: By XLA's own account, kernels and collectives aside.
    cycles: float = 0.0
    #: Of custom kernels, by their own account.
    kernel_flops: float = 0.0
    collectives: tuple[Collective, ...] = ()

    def __add__(self, other: Work) -> Work:
        return Work(
            cycles=self.cycles + other.cycles,
            kernel_flops=self.kernel_flops + other.kernel_flops,
            collectives=self.collectives + other.collectives,
        )

    def times(self, count: int) -> Work:
        return Work(
            cycles=count * self.cycles,
            kernel_flops=count * self.kernel_flops,
            collectives=tuple(c._replace(bytes=count * c.bytes) for c in self.collectives),
        )

    def bytes_by_kind(self) -> dict[str, float]:
        """What each device receives, by kind of collective."""
        found: dict[str, float] = {}
        for collective in self.collectives:
            found[collective.kind] = found.get(collective.kind, 0.0) + collective.bytes
        return found


def work(program: str, *, devices: int) -> Work:
    """Of a compiled program's text, for a mesh of so many devices."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in program.splitlines():
        if head := _HEAD.match(line):
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)

    @functools.cache
    def of(name: str) -> Work:
        scattered = "reduce-scatter" in name or "all-reduce-scatter" in name
        total = Work()
        for line in computations.get(name, []):
            total += instruction(line, scattered)
        return total

    def instruction(line: str, scattered: bool) -> Work:
        found = _INSTRUCTION.match(line)
        if found is None:
            return Work()
        result, operation = found[1], found[2]
        if operation == "while":
            condition, body = (re.search(rf"{name}=%?([\w.\-]+)", line) for name in ("condition", "body"))
            if condition is None or body is None:
                return Work()
            known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            return of(body[1]).times(int(known[1]) if known else _trips(computations, condition[1]))
        if operation == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", line)
            names = re.findall(r"%([\w.\-]+)", branches[1]) if branches else []
            names += re.findall(r"(?:true|false)_computation=%([\w.\-]+)", line)
            return max((of(name) for name in names), key=lambda w: (w.kernel_flops, w.cycles), default=Work())
        if operation == "call" and (called := re.search(r"to_apply=%?([\w.\-]+)", line)):
            return of(called[1])
        kind = operation.removesuffix("-start")
        if kind in _COLLECTIVES:
            return Work(collectives=(_collective(line, kind, result, scattered, devices),))
        inside = Work()
        if operation == "fusion" and (called := re.search(r"calls=%?([\w.\-]+)", line)):
            moved = of(called[1]).collectives
            # One that goes on beside other work is in its start, in its end and in every fusion in between.
            if "async-collective-start" in line.split(" = ")[0]:
                moved = tuple(collective._replace(overlaps=True) for collective in moved)
            elif "async-collective-done" in line.split(" = ")[0] or called[1].startswith("async_collective_fusion"):
                moved = ()
            inside = Work(collectives=moved)
        if 'custom_call_target="tpu_custom_call"' in line:
            flops = re.search(r'"cost_estimate":\{"flops":"(\d+)"', line)
            return Work(kernel_flops=float(flops[1]) if flops else 0.0)
        cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
        return inside + Work(cycles=float(cycles[1]) if cycles and int(cycles[1]) < 1 << 60 else 0.0)

    return of(entry)


def _trips(computations: dict[str, list[str]], condition: str) -> int:
    """How often a loop runs whose condition is that a counter from 0 is below a number."""
    text = "\n".join(computations.get(condition, []))
    for called in re.findall(r"calls=%?([\w.\-]+)", text):
        text += "\n".join(computations.get(called, []))
    bounds = [int(n) for n in re.findall(r"= s32\[\]\S* constant\((\d+)\)", text)]
    return max(bounds, default=1)


def _collective(line: str, kind: str, result: str, scattered: bool, devices: int) -> Collective:
    arrays = [(name, [int(n) for n in sizes.split(",") if n]) for name, sizes in _ARRAY.findall(result)]
    sizes = [math.prod(shape) * _BYTES.get(name, 4) for name, shape in arrays]
    # A collective that has only been started has its operand beside its result.
    started = f" {kind}-start(" in line
    held = float(max(sizes, default=0)) if started else float(sum(sizes))
    group = _group(line, devices)
    share = (group - 1) / group
    if kind == "all-reduce" and scattered:
        kind, moved = "reduce-scatter", held * share
    elif kind == "reduce-scatter":
        moved = held * (group - 1)
    else:
        moved = {"all-gather": held * share, "all-reduce": 2 * held * share, "all-to-all": held * share}.get(kind, held)
    return Collective(kind, group, started, moved)


def _group(line: str, devices: int) -> int:
    if "source_target_pairs" in line:
        return 2
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(.*?\))? ?\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2])) or devices
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(found[2])
    return devices

"""A training's step, compiled ahead of time for a TPU slice that need not be there: does it fit, and how long does it
take?

    rehyat plan CONFIG --topology v5p:8x8x8 [--frames N] [--size WxH] [--batch N] [--field value …]
    rehyat plan generate --topology v6e:2x4 …  (of a video or a stream: rehyat plan generate --help)

Works on a machine without any accelerator; needs the compiler, `pip install 'jax[tpu]'`. CONFIG is what `rehyat
finetune` or `rehyat distill` takes; no weights and no data are read. What does not fit is refused. Of a step that is
rematerialised, as much is kept as fits, unless --remat-keeps says how much.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, get_args, runtime_checkable

import jax

from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.models.wan.remat import Keeps
from rehyat_jax.runtime.hlo import Work, work
from train.cli.command import parse
from train.engine.arithmetic import PEAK_TFLOPS
from train.engine.engine import Engine
from train.engine.stage import Stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What JAX calls a device of a TPU slice, as Google Cloud's documentation has it."""

    gigahertz: float
    #: Memory that a program may have, in GiB, by what the compiler says when it is too little.
    memory: float
    #: Between neighbours along one axis of the slice, both ways together, in bytes a second.
    link: float
    #: Of the hybrid kernels forward and backward: their products' share of the chip's peak, by
    #: `benchmarks.tpu_compiled`'s count of scheduled bundles.
    kernel_share: float


CHIPS = {
    "TPU v5 lite": Chip(gigahertz=1.5, memory=15.75, link=9e10, kernel_share=0.85),
    "TPU v5": Chip(gigahertz=1.75, memory=95.74, link=1.8e11, kernel_share=0.83),
    "TPU v5p": Chip(gigahertz=1.75, memory=95.74, link=1.8e11, kernel_share=0.83),
    # One of a chip's two, which share its links; between the two it is faster, and that is not counted. The clock
    # follows from the peak and the matrix units; the share is older than the others.
    "TPU7x": Chip(gigahertz=2.2, memory=94.75, link=9e10, kernel_share=0.33),
    "TPU v6 lite": Chip(gigahertz=1.75, memory=31.25, link=1.8e11, kernel_share=0.36),
}


class Slice(NamedTuple):
    """Devices that need not be here."""

    devices: list[Any]
    chip: Chip
    peak: float
    #: Chips along each axis.
    sides: tuple[int, ...]


class Program(NamedTuple):
    """A training's step, not compiled yet."""

    lowered: jax.stages.Lowered
    #: Counted operations over all devices in one run, and the optimiser steps that this is.
    flops: float
    steps: int
    mesh: dict[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a plan says. Bytes and times are of one chip and one run of the program."""

    argument_bytes: int
    temporary_bytes: int
    #: Seconds: XLA's own account of its instructions, the kernels, and collectives that nothing hides.
    xla: float
    kernels: float
    collectives: float
    utilisation: float
    compiled: Work

    @property
    def seconds(self) -> float:
        return self.xla + self.kernels + self.collectives


def find_slice(topology: str) -> Slice:
    """As ``v5e:16x16`` names it.

    Raises:
        ConfigError: there is no such slice, or no compiler.
    """
    from jax.experimental import topologies

    # The compiler is on this machine, and there is no network to ask what else is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if not re.fullmatch(r"\w+:\d+(x\d+)*", topology):
        raise ConfigError(f"a topology is named as v5e:16x16 or v5p:8x8x8, not {topology[:80]!r}")
    sides = tuple(int(n) for n in topology.split(":")[1].split("x"))
    # The compiler takes a host to have four chips.
    alone = {"chips_per_host_bounds": [1, 1, 1]} if math.prod(sides) == 1 else {}
    try:
        devices = list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **alone).devices)
    except Exception as error:  # of many kinds
        why = str(error).strip().split("\n")[0][:160]
        raise ConfigError(
            f"{topology} is no slice that jax[tpu], if it is installed, can compile for: {why}"
        ) from error
    kind = str(getattr(devices[0], "device_kind", "device"))
    if kind not in CHIPS:
        raise ConfigError(f"the speed of a {kind} is not known here; known are {', '.join(sorted(CHIPS))}")
    return Slice(devices, CHIPS[kind], PEAK_TFLOPS[kind] * 1e12, sides)


@runtime_checkable
class PlannedTraining(Protocol):
    """A configuration whose stage can be had by shapes alone."""

    @property
    def steps(self) -> int: ...

    def planned(
        self, among: Sequence[Any], *, size: tuple[int, int], frames: int | None = None, batch: int | None = None
    ) -> Stage: ...


def programs(training: PlannedTraining, stage: Stage) -> Iterator[tuple[str, Program]]:
    """Each kind of round of a planned stage, in words and not compiled yet.

    Raises:
        ConfigError: the configuration does not say what the model is, or the mesh does not divide.
    """
    engine = Engine(stage, steps=training.steps, planned=True)
    for kind, each in engine.rounds.items():
        program = Program(engine.lower(kind), each.flops, stage.steps_per_round, stage.devices.shape)
        yield stage.title(kind[0]), program


class TooLargeError(RehyatError):
    """A program does not fit."""


def estimate(program: Program, on: Slice) -> Estimate:
    """Compile, and read the program.

    Raises:
        TooLargeError: it does not fit; the largest arrays are named.
    """
    try:
        compiled = program.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        said = re.search(r"total memory required.*?\(([\d.]+\w)\).*?HBM \(([\d.]+\w)\)", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or "HBM" not in str(error):
            raise
        needed = f"{said[1]} of {said[2]} a chip are" if said else "more than a chip has is"
        raise _too_large(program, needed) from error
    memory: Any = compiled.memory_analysis()
    temporary = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    # The compiler counts temporaries alone.
    if (held := (memory.argument_size_in_bytes + temporary) / 2**30) > on.chip.memory:
        raise _too_large(program, f"{held:.2f}G of {on.chip.memory:.2f}G a chip are")
    found = work(compiled.as_text() or "", devices=len(on.devices))
    xla, kernels = found.cycles / on.chip.gigahertz / 1e9, found.kernel_flops / on.chip.kernel_share / on.peak
    moved: dict[bool, float] = {False: 0.0, True: 0.0}
    for collective in found.collectives:
        moved[collective.overlaps] += collective.bytes / (on.chip.link * _axes(on.sides, collective.group))
    exposed = moved[False] + max(moved[True] - xla - kernels, 0.0)
    seconds = xla + kernels + exposed
    return Estimate(
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=temporary,
        xla=xla,
        kernels=kernels,
        collectives=exposed,
        compiled=found,
        utilisation=program.flops / len(on.devices) / on.peak / seconds,
    )


def _too_large(program: Program, needed: str) -> TooLargeError:
    return TooLargeError(
        f"it does not fit: {needed} needed; the largest arrays of the program, over all chips, are "
        f"{'; '.join(largest(program.lowered.as_text()))}"
    )


def largest(program: str, *, count: int = 4) -> list[str]:
    """The largest arrays of a program before it is divided among devices."""
    widths = {"f32": 4, "bf16": 2, "i32": 4, "f64": 8, "ui32": 4}
    found = {}
    for text in set(re.findall(r"tensor<((?:\d+x)+(?:f32|bf16|i32|ui32|f64))>", program)):
        *sides, kind = text.split("x")
        found[f"{kind}[{','.join(sides)}]"] = math.prod(map(int, sides)) * widths[kind]
    names = sorted(found, key=lambda name: -found[name])[:count]
    return [f"{name} {found[name] / 2**30:.1f} GiB" for name in names]


def _axes(sides: tuple[int, ...], group: int) -> int:
    """Over how many of the slice's axes a group of devices exchanges."""
    used, count = 1, 0
    for side in sorted(sides, reverse=True):
        if used >= group:
            break
        used, count = used * side, count + 1
    return max(count, 1)


def report(program: Program, found: Estimate, on: Slice, *, name: str, compile_seconds: float) -> str:
    """A plan in words and figures."""
    gib = 2**30
    mesh = " x ".join(f"{axis} {size}" for axis, size in program.mesh.items() if size > 1)
    moved = ", ".join(f"{kind} {size / gib:.2f} GiB" for kind, size in sorted(found.compiled.bytes_by_kind().items()))
    steps = f" ({program.steps} optimiser steps)" if program.steps > 1 else ""
    return "\n".join(
        [
            f"{name}: {len(on.devices)} chips, {mesh}; compiled in {compile_seconds:.0f} s",
            f"  memory a chip   {(found.argument_bytes + found.temporary_bytes) / gib:.2f} GiB: state and batch "
            f"{found.argument_bytes / gib:.2f}, temporaries {found.temporary_bytes / gib:.2f}",
            f"  arithmetic      {program.flops / len(on.devices) / 1e12:.1f} TFLOP a chip, "
            f"{program.flops / 1e15:.3g} PFLOP in all",
            f"  received a chip {moved or 'nothing'}",
            f"  a round         {found.seconds:.2f} s{steps}: XLA {found.xla:.2f}, kernels {found.kernels:.2f}, "
            f"waiting for collectives {found.collectives:.2f}",
            f"  utilisation     {found.utilisation:.1%} of {on.peak / 1e12:.0f} TFLOP/s a chip",
        ]
    )


def main(argv: list[str]) -> int:
    """``rehyat plan CONFIG --topology NAME …``.

    Raises:
        ConfigError: a mistake in the configuration or the topology.
        RehyatError: it does not fit.
    """
    if argv and argv[0] == "generate":
        from train.cli import plan_generate

        return plan_generate.main(argv[1:])
    parser = argparse.ArgumentParser(
        prog="rehyat plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("--topology", required=True, help="a slice, as v5e:16x16, v5p:4x4x4, v6e:16x16")
    parser.add_argument("--frames", type=int, help="of every clip, in place of the configuration's")
    parser.add_argument("--size", default="832x480", help="of prepared clips, and of trajectories: WxH")
    parser.add_argument("--batch", type=int, help="clips a step, in place of the configuration's")
    given, fields = parser.parse_known_args(argv)
    if not re.fullmatch(r"\d+x\d+", given.size):
        raise ConfigError(f"a size is width x height, as 832x480, not {given.size[:80]!r}")
    width, height = (int(side) for side in given.size.split("x"))
    jax.config.update("jax_platforms", "cpu")
    training: Any = parse("plan", given.config, fields, kinds=(PlannedTraining,))
    on = find_slice(given.topology)

    def planned(training: Any) -> Iterator[str]:
        stage = training.planned(on.devices, size=(width, height), frames=given.frames, batch=given.batch)
        for title, program in programs(training, stage):
            begun = time.monotonic()
            found = estimate(program, on)
            name = f"{given.config} on {given.topology}, {title}"
            yield report(program, found, on, name=name, compile_seconds=time.monotonic() - begun)

    chosen = any(re.match(r"--remat[-_]keeps\b", field) for field in fields)
    if chosen or not getattr(training, "remat", False):
        for said in planned(training):
            print(said, flush=True)
        return 0
    most, *less = reversed(get_args(Keeps))
    for keeps in (most, *less):
        try:
            # All of its rounds must fit.
            told = list(planned(dataclasses.replace(training, remat_keeps=keeps)))
        except TooLargeError as error:
            if keeps == less[-1]:
                raise
            print(f"--remat-keeps {keeps}: {error}", flush=True)
            continue
        print(*told, f"  rematerialised  --remat-keeps {keeps} is the most that fits", sep="\n", flush=True)
        break
    return 0

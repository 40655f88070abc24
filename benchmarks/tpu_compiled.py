"""The TPU kernels compiled ahead of time, without a TPU: what the compiler says that they cost. An estimate.

    python -m benchmarks.tpu_compiled

Three minutes on two busy cores; needs the wheel ``libtpu`` (``pip install 'jax[tpu]'``). One JSON line for each
generation and direction:

- ``floor_ms``: the arithmetic at the matrix units' full rate;
- ``report_ms``: XLA's cost report, which takes the kernels' own word for their arithmetic and bytes, and for the newest
  generations knows no time of any custom kernel;
- ``schedule_ms``: the instruction bundles that the compiler has scheduled, each as often as it runs, at the clock. It
  knows nothing of waiting for memory.

Of one device; 12 heads of 128, 256 features, 7 chunks of 4,680 tokens, overlap 1,560.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.tpu import Blocks, attend, hybrid, tuned


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """What JAX calls a device: its published peak of bfloat16 products, and the clock that follows from it and the
    number and size of the matrix units."""

    topology: str
    tflops: float
    ghz: float


#: cloud.google.com/tpu/docs: a chip has 197, 459, 918 and 2,307 TFLOP/s. Of v5p a device is a chip, whose two cores
#: share the grid; of tpu7x it is one of a chip's two.
GENERATIONS = {
    "v5e": Generation(topology="v5e:2x2x1", tflops=197, ghz=1.5),
    "v5p": Generation(topology="v5p:2x2x1", tflops=459, ghz=1.75),
    "v6e": Generation(topology="v6e:2x2x1", tflops=918, ghz=1.75),
    "tpu7x": Generation(topology="tpu7x:2x2x1", tflops=2307 / 2, ghz=2.2),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Of one call; chunk and overlap in tokens."""

    tokens: int = 32760
    heads: int = 12
    head_dim: int = 128
    features: int = 256
    chunk: int = 4680
    overlap: int = 1560
    dtype: str = "bfloat16"

    def flops(self) -> float:
        """Of the forward: softmax, what enters the sums, and their reading."""
        softmax, linear = self._parts()
        return softmax + linear

    def flops_both_ways(self) -> float:
        """And of the backward: five products for softmax's two, two for each of the others."""
        softmax, linear = self._parts()
        return 3.5 * softmax + 3 * linear

    def _parts(self) -> tuple[float, float]:
        pairs, entering = 0, 0
        for begin in range(0, self.tokens, self.chunk):
            own = min(self.chunk, self.tokens - begin)
            pairs += own * (own + min(begin, self.overlap))
            entering += own if begin + own < self.tokens else 0
        wide = 2.0 * self.heads * self.head_dim
        return 2 * wide * pairs, wide * self.features * (self.tokens + entering)


def device(topology: str) -> Any:
    """The first of a slice that need not exist."""
    from jax.experimental import topologies

    # Several processes may compile at once, and none asks the network what machine this is.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]


def compiled(device: Any, shape: Shape, *, backward: bool, blocks: Blocks | None = None) -> Any:
    """The operator's program for a device, with the gradients to all that is given if ``backward``; with the tuning
    table's blocks where none are given."""
    widths = {"head_dim": shape.head_dim, "features": shape.features}
    blocks = blocks or tuned(device.device_kind, dtype=shape.dtype, **widths)
    sharding = jax.sharding.SingleDeviceSharding(device)

    def array(*sizes: int, dtype: Any = shape.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    wide = functools.partial(array, dtype=jnp.float32)
    heads, head_dim, features = shape.heads, shape.head_dim, shape.features
    tokens, past = (1, shape.tokens, heads), (1, shape.overlap, heads)
    arrays: dict[str, Any] = {
        **{name: array(*tokens, head_dim) for name in ("q", "k", "v")},
        **{name: array(*tokens, features) for name in ("features_q", "features_k")},
        "s": wide(1, heads, features, head_dim),
        "z": wide(1, heads, features),
        "decay": wide(heads),
        **{name: array(*past, head_dim) for name in ("past_k", "past_v")},
        "past_features_k": array(*past, features),
    }

    def forward(arrays: dict[str, Any], seen: jax.Array) -> Any:
        return hybrid(**arrays, seen=seen, chunk=shape.chunk, causal=True, stabilizer="row_max", blocks=blocks)

    def both(arrays: dict[str, Any], cotangent: jax.Array, seen: jax.Array) -> Any:
        out, transposed = jax.vjp(lambda arrays: forward(arrays, seen)[0], arrays)
        return out, transposed(cotangent)

    seen = array(dtype=jnp.int32)
    if backward:
        return jax.jit(both).lower(arrays, array(*tokens, head_dim), seen).compile()
    return jax.jit(forward).lower(arrays, seen).compile()


def scheduled_bundles(folder: pathlib.Path) -> dict[str, float]:
    """Of the kernels whose final schedules the compiler left in a folder: bundles of one run, times their number.

    A program walks its grid in a loop, a core its own share; in it, the loop over keys holds its step twice, with and
    without a mask, of which one runs. What runs for some blocks only is counted for all.
    """
    kernels: dict[str, float] = {}
    for path in folder.glob("*hybrid_*final_bundles.txt"):
        name = re.search(r"hybrid_[a-z]+(_[a-z]+)?", path.name)
        if name is None or "analysis" in path.name:
            continue
        depths, trips, grid = [0, 0, 0], 1, 1
        for line in path.read_text().splitlines():
            bundle = re.match(r"\s*(?:0x)?[0-9a-f]+\s+(?:[A-Z]{2})?\s*: (>*)", line)
            if bundle is None:
                continue
            depth = len(bundle[1])
            depths[min(depth, 2)] += 1
            if found := re.search(r", (\d+) /\* loop exit test \*/", line):
                trips, grid = (int(found[1]), grid) if depth == 2 else (trips, int(found[1]))
        kernels[name[0]] = depths[0] + grid * (depths[1] + trips * depths[2] / 2)
    return kernels


def measure(name: str, *, backward: bool, shape: Shape, blocks: Blocks | None = None) -> dict[str, Any]:
    """One line of the report, by a process of its own: the compiler reads where to leave its schedules when it is
    loaded."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        given = {
            "topology": GENERATIONS[name].topology,
            "backward": backward,
            "shape": dataclasses.asdict(shape),
            "blocks": dataclasses.asdict(blocks) if blocks else None,
        }
        code = "import sys; from benchmarks import tpu_compiled; tpu_compiled.in_this_process(sys.argv[1])"
        run = subprocess.run(
            [sys.executable, "-c", code, json.dumps(given)],
            env={**os.environ, "LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        if run.returncode:
            return {"generation": name, "error": run.stderr.strip().splitlines()[-1][:300]}
        report = json.loads(run.stdout.splitlines()[-1])
        kernels = scheduled_bundles(pathlib.Path(folder))
    generation = GENERATIONS[name]
    floor = (shape.flops_both_ways() if backward else shape.flops()) / generation.tflops / 1e9
    scheduled = sum(kernels.values()) / generation.ghz / 1e6
    return {
        "generation": name,
        "direction": "forward and backward" if backward else "forward",
        "floor_ms": round(floor, 2),
        "report_ms": report["report_ms"],
        "schedule_ms": round(scheduled, 2),
        "of_floor": round(floor / scheduled, 2) if scheduled else None,
        "temporary_mib": report["temporary_mib"],
        "kernels_ms": {kernel: round(bundles / generation.ghz / 1e6, 3) for kernel, bundles in kernels.items()},
    }


def in_this_process(given: str) -> None:
    options = json.loads(given)
    # Code that seldom runs would be counted for every block.
    attend._when_grown = lambda growth, grow: None
    blocks = Blocks(**options["blocks"]) if options["blocks"] else None
    program = compiled(
        device(options["topology"]), Shape(**options["shape"]), backward=options["backward"], blocks=blocks
    )
    seconds = program.cost_analysis().get("optimal_seconds", -1)
    # A kernel of which the report knows nothing counts for −1 s.
    report = {
        "report_ms": round(1e3 * seconds, 2) if seconds > 0 else None,
        "temporary_mib": round(program.memory_analysis().temp_size_in_bytes / 2**20),
    }
    print(json.dumps(report))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", nargs="+", choices=GENERATIONS, default=list(GENERATIONS))
    given = parser.parse_args(argv)
    for name in given.generations:
        for backward in (False, True):
            print(json.dumps(measure(name, backward=backward, shape=Shape())), flush=True)


if __name__ == "__main__":
    main()

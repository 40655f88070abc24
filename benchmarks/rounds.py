"""Rounds of any training that can be planned, run on the devices at hand with random numbers: seconds and memory.

    python -m benchmarks.rounds wan_1_3b_forcing --batch 1                     # five critic steps, one student's
    python -m benchmarks.rounds wan_1_3b_finetune --batch 1 --samples 5
    python -m benchmarks.rounds wan_14b_forcing --batch 8 --mesh.fsdp 8        # on eight devices
    python -m benchmarks.rounds wan_1_3b_forcing --batch 1 --compile           # into JAX's cache, nothing is run
    python -m benchmarks.rounds wan_1_3b_forcing --batch 2 --profile           # on all GPUs there are: NCCL's share

CONFIG and further fields are what `rehyat plan` takes; the programs are the training's own, from its stage, and no
weights or clips are needed. One JSON line a kind of round. ``gib``: of each device, arguments and temporaries by the
compiler; ``peak_gib``: what the first device had in use at most; ``compile_s``: of all kinds side by side. With
``--profile`` of one more round on a GPU: ``nccl_ms``, what the first device spends in NCCL's kernels, waiting for
others included, and ``kernels_ms``, in all.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from benchmarks import kernels
from rehyat_jax.runtime.compilation import cache_folder, keep_compiled
from train.cli.command import parse
from train.cli.plan import PlannedTraining
from train.engine.engine import Engine, compile_all

GIB = 2**30


def drawn(shape: Any, sharding: Sharding, number: int) -> jax.Array:
    """Small numbers, zeros where they are whole, keys where they are keys."""

    def draw() -> jax.Array:
        key = jax.random.key(number)
        if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
            return jax.random.split(key, shape.shape)
        if jnp.issubdtype(shape.dtype, jnp.floating):
            return (0.02 * jax.random.normal(key, shape.shape)).astype(shape.dtype)
        return jnp.zeros(shape.shape, shape.dtype)

    return jax.jit(draw, out_shardings=sharding)()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--frames", type=int, help="of every clip, in place of the configuration's")
    parser.add_argument("--size", default="832x480", help="of prepared clips, and of trajectories: WxH")
    parser.add_argument("--batch", type=int, help="clips a step, in place of the configuration's")
    parser.add_argument("--samples", type=int, default=2, help="rounds that are timed, after one that is not")
    parser.add_argument("--compile", action="store_true", help="compile alone, which JAX's cache keeps")
    parser.add_argument("--profile", action="store_true", help="the time of kernels, and NCCL's in it")
    given, fields = parser.parse_known_args(argv)
    if not re.fullmatch(r"\d+x\d+", given.size):
        parser.error(f"a size is width x height, as 832x480, not {given.size[:80]!r}")
    width, height = (int(side) for side in given.size.split("x"))
    keep_compiled(cache_folder())
    training: Any = parse("plan", given.config, fields, kinds=(PlannedTraining,))
    stage = training.planned(jax.devices(), size=(width, height), frames=given.frames, batch=given.batch)
    engine = Engine(stage, steps=training.steps, planned=True)
    begun = time.perf_counter()
    programs = compile_all([functools.partial(engine.lower, kind) for kind in engine.rounds])
    compile_s = time.perf_counter() - begun
    for (kind, each), program in zip(engine.rounds.items(), programs, strict=True):
        memory: Any = program.memory_analysis()
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        said = {
            "config": given.config,
            "round": stage.title(kind[0]),
            "steps": stage.steps_per_round,
            "devices": stage.devices.count,
            "mesh": {axis: size for axis, size in stage.devices.shape.items() if size > 1},
            "compile_s": round(compile_s, 1),
            "gib": round((held + memory.temp_size_in_bytes) / GIB, 2),
        }
        if not given.compile:
            shapes, shardings = program.args_info[0], program.input_shardings[0]
            numbers = iter(range(1 << 30))
            state, *rest = jax.tree.map(lambda x, s: drawn(x, s, next(numbers)), shapes, shardings)  # noqa: B023
            seconds = []

            def once(program: Any = program, rest: Any = rest) -> None:
                nonlocal state
                state, metrics = program(state, *rest)
                jax.block_until_ready((state, metrics))

            for _ in range(given.samples + 1):
                begun = time.perf_counter()
                once()
                seconds.append(time.perf_counter() - begun)
            stats = jax.devices()[0].memory_stats() or {}
            best = min(seconds[1:] or seconds)
            said |= {
                "seconds": [round(each, 3) for each in seconds[1:]],
                "tflops_per_s": round(each.flops / best / 1e12 / stage.devices.count, 1),
                "peak_gib": round(stats["peak_bytes_in_use"] / GIB, 2) if "peak_bytes_in_use" in stats else None,
            }
            if given.profile and (ms := kernels.times(once)):
                nccl = sum(ms[name] for name in ms if "nccl" in name.lower())
                said |= {"nccl_ms": round(nccl, 1), "kernels_ms": round(sum(ms.values()), 1)}
            del state, rest, once
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()

"""What the timed benchmarks share: how a time is taken and told, where it goes, and models of random weights."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import kernels, recorded
from rehyat_jax.runtime.platform import InferenceProgram

GIB = 1 << 30
#: What is left out when the time is over, and what is run: a name and what gives its figures.
Case = tuple[str, Callable[[], dict[str, Any]]]
M = TypeVar("M", bound=nnx.Module)


class Report:
    """JSON lines printed and kept as they come; nothing more is begun when the time is over."""

    def __init__(self, path: pathlib.Path, seconds: float) -> None:
        self.path, self.seconds, self.start = path, seconds, time.perf_counter()
        self.lines: list[dict[str, Any]] = []
        self.add("machine", device=jax.devices()[0].device_kind, jax=jax.__version__, commit=recorded.commit())

    def add(self, case: str, **figures: Any) -> None:
        before = recorded.beside(case, figures, jax.devices()[0].device_kind)
        line = {"case": case, **figures, **before, "at_s": round(time.perf_counter() - self.start, 1)}
        self.lines.append(line)
        print(json.dumps(line, ensure_ascii=False), flush=True)
        body = ",\n".join(json.dumps(line, ensure_ascii=False) for line in self.lines)
        self.path.write_text(f"[\n{body}\n]\n", encoding="utf-8")

    @property
    def over(self) -> bool:
        return time.perf_counter() - self.start > self.seconds

    def run(self, case: str, measure: Callable[[], dict[str, Any]], *, late: bool = False) -> None:
        """``late``: also when the time is over."""
        if self.over and not late:
            self.add(case, left_out="the time was over")
            return
        try:
            self.add(case, **measure(), **kernels.taken())
        except Exception as error:
            # The next case may still give a figure.
            last = traceback.extract_tb(error.__traceback__)[-1]
            self.add(case, error=f"{type(error).__name__}: {str(error)[:600]}", where=f"{last.filename}:{last.lineno}")

    def run_all(self, cases: Iterable[Case]) -> None:
        for case, measure in cases:
            self.run(case, measure)


def arguments(
    doc: str | None,
    name: str,
    argv: Sequence[str] | None,
    *,
    lengths: Sequence[int] = (),
    more: Callable[[argparse.ArgumentParser], Any] = lambda parser: None,
) -> Any:
    """``--tiny``, ``--seconds``, ``--out``, where there are any ``--lengths`` in latent frames, and what is added."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="sizes that mean nothing: to try the program itself")
    parser.add_argument("--seconds", type=float, default=500, help="after these, no case is begun")
    parser.add_argument("--profile", action="store_true", help="with each case, the kernels it goes to (GPU)")
    folder = pathlib.Path(os.environ.get("OUT", "."))
    parser.add_argument("--out", type=pathlib.Path, default=folder / f"{name}.json", help="all lines, again")
    if lengths:
        parser.add_argument("--lengths", type=int, nargs="+", default=list(lengths), help="latent frames")
    more(parser)
    given = parser.parse_args(argv)
    kernels.wanted = given.profile
    return given


def milliseconds(function: Callable[..., Any], given: Sequence[tuple[Any, ...]], *, samples: int = 10) -> float:
    """Of one call: see ``timed``."""
    return median(jax.jit(function).lower(*given[0]).compile(), given, samples)


def timed(
    function: Callable[..., Any], given: Sequence[tuple[Any, ...]], *, samples: int = 10, inference: bool = False
) -> dict[str, float]:
    """Of one call of the compiled function: the median of samples, each of several calls with one wait, on arguments in
    turn, after a warm-up; and what its program needs of memory, arguments and results included. ``inference``: with the
    compiler's options of programs that are not differentiated."""
    program = (InferenceProgram if inference else jax.jit)(function).lower(*given[0]).compile()
    return {"ms": round(median(program, given, samples), 3), "program_gib": program_gib(program)}


def median(program: Callable[..., Any], given: Sequence[tuple[Any, ...]], samples: int = 10) -> float:
    """Milliseconds of one call of what is compiled: see ``timed``."""
    jax.block_until_ready([program(*a) for a in given])
    start = time.perf_counter()
    jax.block_until_ready(program(*given[0]))
    calls = max(1, min(16, int(0.03 / (time.perf_counter() - start))))
    times = []
    for sample in range(samples):
        start = time.perf_counter()
        for i in range(calls):
            result = program(*given[(sample + i) % len(given)])
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / calls)
    kernels.take(lambda: program(*given[0]), program)
    return 1e3 * statistics.median(times)


def walked(step: Callable[[Any], tuple[Any, Any]], state: Any, *, samples: int = 10, warm_up: int = 3) -> float:
    """Milliseconds of one step of those that hand a state on: the median, each waited for, after a warm-up."""
    times = []
    for i in range(warm_up + samples):
        start = time.perf_counter()
        result, state = step(state)
        jax.block_until_ready((result, state))
        if i >= warm_up:
            times.append(time.perf_counter() - start)

    def one_more() -> Any:
        nonlocal state
        result, state = step(state)
        return result

    kernels.take(one_more)
    return 1e3 * statistics.median(times)


def program_gib(program: Any) -> float:
    memory = program.memory_analysis()
    given, made = memory.argument_size_in_bytes, memory.output_size_in_bytes
    return round((given + made + memory.temp_size_in_bytes - memory.alias_size_in_bytes) / GIB, 4)


def peak_gib() -> float | None:
    """Of the device since the process began; None where it does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    return round(stats["peak_bytes_in_use"] / GIB, 3) if "peak_bytes_in_use" in stats else None


def random_weights(make: Callable[[], M], seed: int = 0) -> M:
    """The module with parameters of a spread of 0.02, made on the device."""
    model = nnx.eval_shape(make)

    @jax.jit
    def drawn(key: jax.Array) -> Any:
        state = nnx.state(model)
        keys = iter(jax.random.split(key, len(jax.tree.leaves(state))))
        return jax.tree.map(lambda x: (0.02 * jax.random.normal(next(keys), x.shape)).astype(x.dtype), state)

    nnx.update(model, drawn(jax.random.key(seed)))
    return model


def normal(seed: int, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)

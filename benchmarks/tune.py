"""The fastest blocks of the kernels on this device, written into a table that they are looked up in.

    PYTHONPATH=. python -m benchmarks.tune --table pallas_kernels/gpu/tuning.json

For each kernel and direction the default blocks first, then those that the table has, then others, the nearest to the
default first: a JSON line each, all of them in ``$OUT/tune.json`` (or the working folder). A time is the median of 10
samples of several calls each, on two sets of inputs in turn, after a warm-up. What does not compile, or is off the
default's result by more than 1e-2, is left out, and its line says so. The fastest is timed again beside the default,
and written if it is then faster by 2 %; if the default is as good, the table's entry is taken out.

The table (``$OUT/tuning.json`` if none is named) keeps what it has of other devices and sizes, and is written after
every kernel, whole; the installed one is beside its kernels, ``pallas_kernels/gpu`` or ``tpu``. After ``--seconds``
(500) no blocks are begun, and what was found by then is written. On an H200 with 32 CPU cores the windows of Hopper and
φ, some 120 blocks that compile side by side, took 72 s (``--kernels HopperKernels FeatureKernels``). No TPU has run
it. Where there is no device, ``--tiny`` tries the program itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.hybrid_operator import TINY, Sizes
from benchmarks.timing import Report, arguments, median, normal
from pallas_kernels import gpu, tpu
from pallas_kernels.gpu.windows import Windows
from pallas_kernels.tuning import Key, Table
from rehyat_jax.attention.state import HybridState
from rehyat_jax.runtime.files import whole_file

#: ‖x − default's‖ / ‖default's‖ of every result, at most.
TOLERANCE = 1e-2
#: Programs that are compiled at once.
SIDE_BY_SIDE = min(16, os.cpu_count() or 1)
#: By which a median differs from that of the same program again.
SPREAD = 0.02
TABLES = {"gpu": gpu.TABLE, "tpu": tpu.TABLE}

Blocks = dict[str, int]
Given = list[tuple[Any, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """For some fields of one kernel's dataclass."""

    name: str
    kernels: type
    #: Sizes of each that are tried, in all combinations.
    fields: dict[str, Sequence[int]]
    #: Runs a dataclass of the kernels on a set of inputs; `given` makes two such sets.
    run: Callable[..., Any]
    given: Callable[[], Given]

    def others(self) -> list[Blocks]:
        """The nearest to the default first, so that a search which is cut has tried each size alone."""
        default = self.kernels()
        found = [dict(zip(self.fields, sizes, strict=True)) for sizes in itertools.product(*self.fields.values())]
        return sorted(found, key=lambda blocks: sum(getattr(default, name) != x for name, x in blocks.items()))


def search(report: Report, which: Search, table: Table, key: Key) -> None:
    """Leaves the table's entry with the fastest that was found; as it was, if the time ends before that was timed."""
    known = table.entries.get(key, {})
    present = {name: x for name, x in known.items() if name in which.fields}
    base = {name: x for name, x in known.items() if name not in which.fields}
    given = functools.cache(which.given)
    right: list[Any] = []
    found: list[tuple[float, Blocks, Any]] = []

    def compiled(kernels: Any) -> Callable[[], Any]:
        """Its program, or its error, to be had when it is told."""
        try:
            program = jax.jit(functools.partial(which.run, kernels)).lower(*given()[0]).compile()
        except Exception as error:
            return functools.partial(_raise, error)
        return lambda: program

    def measure(blocks: Blocks, compiled: Callable[[], Any]) -> dict[str, Any]:
        program = compiled()
        result = program(*given()[0])
        if not right:
            right.append(result)
        off = float(apart(result, right[0]))
        if not off <= TOLERANCE:
            return {"left_out": f"off the default's result by {off:.1e}"}
        ms = median(program, given())
        # The default's program, and that of the fastest.
        if len(found) < 2 or ms < found[1][0]:
            found[1:] = [(ms, blocks, program)]
        return {"ms": round(ms, 4), "off": float(f"{off:.1e}")}

    def decide() -> dict[str, Any]:
        # The fastest of many was lucky, and clocks change: again, one after the other.
        default, fastest = (median(program, given()) for _, _, program in (found[0], found[-1]))
        blocks = found[-1][1] if fastest < (1 - SPREAD) * default else {}
        table.entries.pop(key, None)
        if base or blocks:
            table.entries[key] = {**base, **blocks}
        return {"default_ms": round(default, 4), "fastest_ms": round(fastest, 4), "blocks": blocks}

    candidates: dict[Any, Blocks] = {}
    for blocks in ({}, present, *which.others()):
        candidates.setdefault(which.kernels(**base, **blocks), blocks)
    tried: set[Any] = set()
    for kernels, program in _side_by_side(compiled, list(candidates)):
        if report.over:
            report.add(which.name, left_out=f"the time was over: {len(candidates) - len(tried)} blocks")
            break
        tried.add(kernels)
        blocks = candidates[kernels]
        label = ", ".join(f"{name} {x}" for name, x in blocks.items()) or "default"
        report.run(f"{which.name}: {label}", functools.partial(measure, blocks, program))
        if not found:
            return
    if found and which.kernels(**known) in tried:
        report.run(f"{which.name}: fastest", decide, late=True)


@jax.jit
def apart(x: Any, y: Any) -> jax.Array:
    """The largest of ‖x − y‖ / ‖y‖ of the arrays of two results."""

    def norm(x: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.sum(x * x))

    wide = [[a.astype(jnp.float32) for a in jax.tree.leaves(result)] for result in (x, y)]
    return jnp.stack([norm(a - b) / jnp.maximum(norm(b), 1e-30) for a, b in zip(*wide, strict=True)]).max()


def searches(platform: str, device_kind: str, sizes: Sizes, frames: int, dtype: Any, *, tiny: bool) -> Iterator[Search]:
    """The kernels that this device is given at these sizes; interpreted, at other blocks, if ``tiny``."""
    length = frames * sizes.frame
    some = functools.cache(functools.partial(_some, (1, length, sizes.heads), dtype))
    qkv = functools.partial(some, sizes.width, sizes.width, sizes.width)
    if platform == "tpu":
        yield from _of_tpu(sizes, length, some, tiny=tiny)
        return
    windows, seen = Windows(**sizes.cut, past=0, length=length), jnp.zeros((), jnp.int32)

    def here(kernels: Any) -> Any:
        return dataclasses.replace(kernels, interpret=True) if tiny else kernels

    def forward(kernels: gpu.Kernels, q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        return here(kernels).forward(windows, q, k, v, seen)

    q = jax.ShapeDtypeStruct((1, length, sizes.heads, sizes.width), dtype)
    if not tiny and isinstance(gpu.kernels(device_kind, q, **sizes.cut), gpu.HopperKernels):
        # 64 queries are what a warpgroup's registers hold.
        fields: dict[str, Sequence[int]] = {"keys": (64, 128, 192, 256), "stages": (2, 3, 4)}
        yield Search(name="windows, Hopper", kernels=gpu.HopperKernels, fields=fields, run=forward, given=qkv)

    def backward(kernels: gpu.Kernels, *given: jax.Array) -> Any:
        *arrays, y, d_y, rows = given
        return here(kernels).backward(windows, *arrays, seen, y, d_y, rows)

    def given_backward() -> Given:
        results = jax.jit(functools.partial(forward, gpu.TritonKernels()))
        found = []
        for *arrays, d_y in some(*[sizes.width] * 4):
            y, total, _ = results(*arrays)
            found.append((*arrays, y, d_y, total))
        return found

    queries, keys = ((16,), (16, 32)) if tiny else ((32, 64, 128),) * 2
    for name, of, run, given in (("", "", forward, qkv), (", backward", "_backward", backward, given_backward)):
        fields = {f"queries{of}": queries, f"keys{of}": keys}
        yield Search(name=f"windows, Triton{name}", kernels=gpu.TritonKernels, fields=fields, run=run, given=given)

    degree, rest = divmod(sizes.features, sizes.width)
    if rest or not (tiny or gpu.feature_kernels(device_kind, q, degree=degree)):
        return
    width, wide = sizes.width, sizes.features

    def layers(seed: int) -> gpu.Layers:
        shapes = ((width, wide), (wide,), (wide, wide), (wide,))
        spreads = (width**-0.5, 0.02, wide**-0.5, 0.02)
        return gpu.Layers(
            *(
                normal(seed + i, sizes.heads, *shape, dtype=dtype) * spread
                for i, (shape, spread) in enumerate(zip(shapes, spreads, strict=True))
            )
        )

    def features(kernels: gpu.FeatureKernels, x: jax.Array, layers: gpu.Layers) -> jax.Array:
        return here(kernels).forward(degree, "softplus", x, layers, None)

    fields = (
        {"tokens": (16, 32), "stages": (3,)}
        if tiny
        else {
            "tokens": (64, 128, 256),
            "hidden": (64, 128),
            "columns": (32, 64, 128),
            "stages": (2, 3, 4),
            "warps": (4, 8),
        }
    )
    # No more than a head has: the kernel takes no more either.
    fields |= {name: sorted({min(x, width) for x in fields[name]}) for name in ("hidden", "columns") if name in fields}
    yield Search(
        name="φ",
        kernels=gpu.FeatureKernels,
        fields=fields,
        run=features,
        given=lambda: [(x, layers(4 * i)) for i, (x,) in enumerate(some(width))],
    )


def _of_tpu(sizes: Sizes, length: int, some: Callable[..., Given], *, tiny: bool) -> Iterator[Search]:
    """The whole operator, features given: its kernels are told one set of blocks. VMEM's limit is left as it is."""
    state = HybridState.zeros(
        1,
        heads=sizes.heads,
        head_dim=sizes.width,
        feature_dim=sizes.features,
        overlap=sizes.cut["overlap"],
        dtype=some(sizes.width)[0][0].dtype,
    )

    def forward(blocks: tpu.Blocks, state: HybridState, *arrays: jax.Array) -> jax.Array:
        return tpu.hybrid(
            *arrays,
            s=state.s,
            z=state.z,
            past_k=state.k,
            past_v=state.v,
            past_features_k=state.features_k,
            seen=state.seen,
            decay=jnp.ones(sizes.heads, jnp.float32),
            chunk=sizes.cut["chunk"],
            causal=True,
            stabilizer="row_max",
            blocks=blocks,
            interpret=tiny,
        )[0]

    def both(blocks: tpu.Blocks, state: HybridState, *given: jax.Array) -> Any:
        y, back = jax.vjp(functools.partial(forward, blocks, state), *given[:-1])
        return y, back(given[-1])

    def given(*after: int) -> Given:
        arrays = some(*[sizes.width] * 3, *[sizes.features] * 2, *after)
        # Features are positive, and of a size at which both parts are heard.
        return [(state, *x[:3], *(abs(phi) * 0.1 for phi in x[3:5]), *x[5:]) for x in arrays]

    if tiny:
        yield Search(name="forward", kernels=tpu.Blocks, fields={"keys": (16, 32)}, run=forward, given=given)
        return
    chunk, window = sizes.cut["chunk"], sum(sizes.cut.values())

    def up_to(longest: int, name: str, *ends: int) -> dict[str, Sequence[int]]:
        """Upper ends that are reached: of others, but the default, nothing would be known."""
        return {name: [x for x in ends if x <= longest or x == getattr(tpu.Blocks(), name)]}

    fields = up_to(chunk, "queries", 640, 1280, 2560) | up_to(window, "keys", 256, 512, 1024)
    fields |= up_to(chunk, "tokens", 780, 1560, 3120)
    yield Search(name="forward", kernels=tpu.Blocks, fields=fields, run=forward, given=given)
    fields = up_to(chunk, "queries_backward", 640, 1280, 2560) | up_to(window, "keys_backward", 256, 512, 1024)
    fields |= up_to(window, "resident", 2048, 4096, 8192)
    yield Search(
        name="forward and backward",
        kernels=tpu.Blocks,
        fields=fields,
        run=both,
        given=functools.partial(given, sizes.width),
    )


def _some(shape: tuple[int, int, int], dtype: Any, *widths: int) -> Given:
    """Two sets of arrays [1, N, H, width]."""
    return [tuple(normal(100 * i + j, *shape, width, dtype=dtype) for j, width in enumerate(widths)) for i in range(2)]


def options(parser: argparse.ArgumentParser) -> None:
    folder = pathlib.Path(os.environ.get("OUT", "."))
    parser.add_argument("--table", type=pathlib.Path, default=folder / "tuning.json", help="what it has else is kept")
    names = [kernels.__name__ for table in TABLES.values() for kernels in table.kernels]
    parser.add_argument("--kernels", nargs="+", choices=names, default=names, help="all that this device is given")
    parser.add_argument("--platform", choices=TABLES, help="with --tiny, whose kernels are interpreted")
    for name, field, of in (
        ("heads", "heads", ""),
        ("head-dim", "width", ""),
        ("features", "features", "of a head"),
        ("frame", "frame", "tokens of a latent frame"),
        ("chunk-frames", "chunk_frames", ""),
        ("overlap-frames", "overlap_frames", ""),
        ("frames", "frames", "21 in all"),
    ):
        default = getattr(Sizes(), field, None)
        parser.add_argument(f"--{name}", dest=field, type=int, metavar="N", help=f"{default or ''} {of}".strip())
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")


def main(argv: Sequence[str] | None = None) -> None:
    given = arguments(__doc__, "tune", argv, more=options)
    backend = jax.default_backend()
    platform = given.platform or (backend if backend in TABLES else "gpu")
    if not given.tiny and platform != backend:
        raise SystemExit(f"there is no {platform.upper()} here: --tiny tries the program itself")
    sizes = TINY if given.tiny else Sizes()
    changed = {field.name: getattr(given, field.name, None) for field in dataclasses.fields(sizes)}
    sizes = dataclasses.replace(sizes, **{name: x for name, x in changed.items() if x is not None})
    frames, dtype = given.frames or (6 if given.tiny else 21), jnp.dtype(given.dtype)
    kind = jax.devices()[0].device_kind
    table = TABLES[platform].at(given.table)
    # What is no table, or cannot be written, is refused before the work.
    _write(table.path, table.text() if table.path.exists() else "[]\n")
    report = Report(given.out, given.seconds)
    for which in searches(platform, kind, sizes, frames, dtype, tiny=given.tiny):
        if which.kernels.__name__ in given.kernels:
            key = table.key(which.kernels, kind, dtype, head_dim=sizes.width, features=sizes.features)
            search(report, which, table, key)
            _write(table.path, table.text())


def _side_by_side(function: Callable[[Any], Any], given: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Each of ``given`` with its result, made several at once; none is being made while the caller has one."""
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        for i in range(0, len(given), SIDE_BY_SIDE):
            some = given[i : i + SIDE_BY_SIDE]
            yield from zip(some, list(pool.map(function, some)), strict=True)


def _raise(error: Exception) -> Any:
    raise error


def _write(path: pathlib.Path, text: str) -> None:
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

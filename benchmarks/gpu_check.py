"""The GPU path of hybrid attention, checked against the dense reference in float64, then timed beside cuDNN's softmax.

    PYTHONPATH=. python -m benchmarks.gpu_check

Two minutes on an H200, compilations included. One JSON line for each case as soon as it is known, so that a run that
is cut still gives figures; all of them in ``$OUT/gpu_check.json`` (or the working folder). Where there is no GPU,
``--tiny`` tries the script itself, at sizes that mean nothing.

Shapes are Wan-1.3B's at 480×832: 12 heads of 128, 256 features, 1,560 tokens a latent frame, chunks of 3 frames after
an overlap of 1. A time is the median of 10 samples of several calls each, on rotating inputs, after a warm-up.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import gpu
from pallas_kernels.gpu.windows import Windows, attend
from rehyat_jax.attention.api import hybrid_attention

HEADS, WIDTH, FEATURES, FRAME = 12, 128, 256, 1560
CHUNK_FRAMES, OVERLAP_FRAMES = 3, 1


class Report:
    """Lines printed and kept as they come; nothing more is begun when the time is over."""

    def __init__(self, path: pathlib.Path, seconds: float) -> None:
        self.path, self.seconds, self.start = path, seconds, time.perf_counter()
        self.lines: list[dict[str, Any]] = []

    def add(self, case: str, **figures: Any) -> None:
        line = {"case": case, **figures, "at_s": round(time.perf_counter() - self.start, 1)}
        self.lines.append(line)
        print(json.dumps(line), flush=True)
        body = ",\n".join(json.dumps(line, ensure_ascii=False) for line in self.lines)
        self.path.write_text(f"[\n{body}\n]\n", encoding="utf-8")

    def run(self, case: str, measure: Callable[[], dict[str, Any]]) -> None:
        if time.perf_counter() - self.start > self.seconds:
            self.add(case, left_out="the time was over")
            return
        try:
            self.add(case, **measure())
        except Exception as error:
            # The next case may still give a figure.
            last = traceback.extract_tb(error.__traceback__)[-1]
            self.add(case, error=f"{type(error).__name__}: {str(error)[:600]}", where=f"{last.filename}:{last.lineno}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison with the reference; tokens of an earlier call, whose state goes in."""

    dtype: str = "bfloat16"
    tokens: int = 1304
    chunk: int = 480
    overlap: int = 160
    head_dim: int = 128
    features: int = 256
    stabilizer: str = "row_max"
    earlier: int = 0
    #: Where the tokens are cut into two calls, the state of the first handed to the second.
    cut: int = 0


CHECKS = {
    "bfloat16, 128": Check(),
    "float32, 64, short chunks, state": Check(
        dtype="float32", tokens=230, chunk=96, overlap=40, head_dim=64, features=96, stabilizer="lse", earlier=192
    ),
    "bfloat16, overlap over chunk, state": Check(
        tokens=600, chunk=200, overlap=330, head_dim=64, features=128, stabilizer="none", earlier=200
    ),
    "bfloat16, stream of two calls": Check(tokens=1440, chunk=480, overlap=160, cut=960),
    "float32, stream of two calls": Check(dtype="float32", tokens=330, chunk=128, overlap=64, head_dim=128, cut=256),
}


def arrays_of(check: Check) -> tuple[list[jax.Array], jax.Array]:
    rng = np.random.default_rng(check.tokens)
    shape = (2, check.earlier + check.tokens, 2)
    arrays = [rng.normal(size=(*shape, check.head_dim)) for _ in range(3)]
    # Of a size at which both parts are heard.
    arrays += [rng.uniform(0.01, 1, size=(*shape, check.features)) / check.features**0.5 for _ in range(2)]
    return [jnp.asarray(a, check.dtype) for a in arrays], jnp.asarray([1.0, 0.8], jnp.float32)


def worst_error(check: Check) -> dict[str, Any]:
    """The largest of the errors ‖x − exact‖ / ‖exact‖ of output, state and all gradients."""

    def call(implementation: Any, cut: int, arrays: Any, decay: Any, state: Any) -> Any:
        stabilizer: Any = check.stabilizer
        outputs, ends = [], [0, cut, check.tokens] if cut else [0, check.tokens]
        for begin, end in itertools.pairwise(ends):
            out, state = hybrid_attention(
                *(x[:, begin:end] for x in arrays), chunk=check.chunk, overlap=check.overlap, decay=decay,
                stabilizer=stabilizer, initial_state=state, return_state=True, implementation=implementation,
            )  # fmt: skip
            outputs.append(out)
        return jnp.concatenate(outputs, axis=1), state.s, state.z

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def gradients(implementation: str, cut: int, weights: Any, arrays: Any, decay: Any, state: Any) -> Any:
        seen = state.seen if state is not None else None
        moving = state._replace(seen=None) if state is not None else None

        def loss(arrays: Any, decay: Any, moving: Any) -> Any:
            state = moving._replace(seen=seen) if moving is not None else None
            results = call(implementation, cut, arrays, decay, state)
            return sum(jnp.sum(w * x.astype(w.dtype)) for w, x in zip(weights, results, strict=True)), results

        (_, results), found = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(arrays, decay, moving)
        return results, found

    arrays, decay = arrays_of(check)
    state = None
    if check.earlier:
        _, state = hybrid_attention(
            *(a[:, : check.earlier] for a in arrays), chunk=check.chunk, overlap=check.overlap, decay=decay,
            return_state=True, implementation="reference",
        )  # fmt: skip
    arrays = [a[:, check.earlier :] for a in arrays]
    rng = np.random.default_rng(1)
    batch, _, heads, width = arrays[2].shape
    shapes = [(arrays[2].shape, check.dtype), ((batch, heads, check.features, width), "float32"),
              ((batch, heads, check.features), "float32")]  # fmt: skip
    # The output's as coarse as the cotangent of such an output is.
    weights = [jnp.asarray(rng.normal(size=shape), dtype).astype(jnp.float32) for shape, dtype in shapes]
    poison()
    found = jax.device_get(gradients("pallas", check.cut, weights, arrays, decay, state))
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda x: jnp.asarray(np.asarray(x), jnp.float64 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype),
            (weights, arrays, decay, state),
        )
        exact = jax.device_get(gradients("reference", 0, *wide))
    errors = {}
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(exact), strict=True):
        size = np.linalg.norm(y)
        errors[jax.tree_util.keystr(path)] = float(np.linalg.norm(np.asarray(x, np.float64) - y) / size if size else 0)
    limit = 2e-5 if check.dtype == "float32" else 1e-2
    worst = max(errors, key=lambda name: float("inf") if np.isnan(errors[name]) else errors[name])
    passed = bool(errors[worst] <= limit)
    figures: dict[str, Any] = {"passed": passed, "worst": errors[worst], "of": worst, "limit": limit}
    return figures if passed else {**figures, "errors": errors}


def poison() -> None:
    """Memory that the next program's outputs may lie in is not what an earlier one left there."""
    jax.block_until_ready([jnp.full((64 << 20,), jnp.nan, jnp.float32) for _ in range(4 * (not TINY))])


TINY = False


def inputs(frames: int, *, sets: int = 2) -> list[tuple[jax.Array, ...]]:
    """q, k, v and their cotangent, some times over."""
    shape = (1, frames * FRAME, HEADS, WIDTH)

    def make(key: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jax.random.normal(k, shape, jnp.bfloat16) for k in jax.random.split(key, 4))

    return [jax.jit(make)(jax.random.key(i)) for i in range(sets)]


def features_of(frames: int, *, sets: int = 2) -> list[tuple[jax.Array, ...]]:
    shape = (1, frames * FRAME, HEADS, FEATURES)

    def make(key: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jax.random.uniform(k, shape, jnp.bfloat16) * 0.01 for k in jax.random.split(key))

    return [jax.jit(make)(jax.random.key(100 + i)) for i in range(sets)]


def milliseconds(function: Callable[..., Any], arguments: list[tuple[Any, ...]], *, samples: int = 10) -> float:
    """Of one call: the median of samples, each of several calls with one wait, on arguments in turn."""
    compiled = jax.jit(function)
    jax.block_until_ready([compiled(*a) for a in arguments])
    start = time.perf_counter()
    jax.block_until_ready(compiled(*arguments[0]))
    calls = max(1, min(16, int(0.03 / (time.perf_counter() - start))))
    times = []
    for sample in range(samples):
        start = time.perf_counter()
        for i in range(calls):
            result = compiled(*arguments[(sample + i) % len(arguments)])
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / calls)
    return 1e3 * statistics.median(times)


def rated(ms: float, flops: float) -> dict[str, float]:
    return {"ms": round(ms, 3), "tflops": round(flops / ms / 1e9, 1)}


def full_flops(frames: int) -> float:
    return 4 * HEADS * WIDTH * float(frames * FRAME) ** 2


def window_pairs(frames: int) -> float:
    """Of queries and keys, in all windows."""
    pairs = 0
    for first in range(0, frames, CHUNK_FRAMES):
        own = min(CHUNK_FRAMES, frames - first)
        pairs += own * (own + min(OVERLAP_FRAMES, first))
    return float(pairs) * FRAME**2


def window_flops(frames: int) -> float:
    return 4 * HEADS * WIDTH * window_pairs(frames)


def softmax(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, implementation="xla" if TINY else "cudnn")


def operator(q: jax.Array, k: jax.Array, v: jax.Array, features_q: jax.Array, features_k: jax.Array) -> jax.Array:
    return hybrid_attention(
        q, k, v, features_q, features_k, chunk=CHUNK_FRAMES * FRAME, overlap=OVERLAP_FRAMES * FRAME,
        implementation="pallas",
    )  # fmt: skip


def maps() -> Any:
    """φ_q and φ_k as Wan-1.3B's blocks have them, as functions of parameters."""
    from flax import nnx

    from rehyat_jax.attention.features import FeatureMap

    pair = nnx.List(
        FeatureMap(HEADS, WIDTH, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(i)) for i in range(2)
    )
    graphdef, params = nnx.split(pair)

    def with_features(params: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        of_q, of_k = nnx.merge(graphdef, params)
        return operator(q, k, v, of_q(q), of_k(k))

    def features(params: Any, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        of_q, of_k = nnx.merge(graphdef, params)
        return of_q(q), of_k(k)

    return with_features, features, params


def and_backward(function: Callable[..., jax.Array], arguments: int) -> Callable[..., Any]:
    """Forward and gradients to all arguments but the last, the cotangent."""

    def both(*given: Any) -> Any:
        def loss(*moving: Any) -> jax.Array:
            return (function(*moving).astype(jnp.float32) * given[-1].astype(jnp.float32)).sum()

        return jax.value_and_grad(loss, argnums=tuple(range(arguments)))(*given[:-1])

    return both


def timings(lengths: list[int]) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Cases in the order of what one wants to know first; a peer stands before ours of the same work."""
    frames = lengths[0]
    data = functools.cache(inputs)
    made = functools.cache(features_of)
    phi = functools.cache(maps)
    peers: dict[int, float] = {}

    def peer(frames: int) -> dict[str, Any]:
        peers[frames] = milliseconds(softmax, [x[:3] for x in data(frames)], samples=10 if frames < 50 else 3)
        return rated(peers[frames], full_flops(frames))

    def windows(kernels: gpu.Kernels, frames: int) -> dict[str, Any]:
        shape = Windows(
            chunk=CHUNK_FRAMES * FRAME, overlap=OVERLAP_FRAMES * FRAME, past=0, length=frames * FRAME
        )  # fmt: skip
        none = jnp.zeros((), jnp.int32)
        function = functools.partial(attend, kernels, shape)
        return rated(milliseconds(function, [(*x[:3], none) for x in data(frames)]), window_flops(frames))

    def windows_backward(kernels: gpu.Kernels, frames: int) -> dict[str, Any]:
        shape = Windows(
            chunk=CHUNK_FRAMES * FRAME, overlap=OVERLAP_FRAMES * FRAME, past=0, length=frames * FRAME
        )  # fmt: skip
        none = jnp.zeros((), jnp.int32)

        def function(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return attend(kernels, shape, q, k, v, none)[0]

        ms = milliseconds(and_backward(function, 3), data(frames))
        return rated(ms, 3.5 * window_flops(frames))

    def given_features(frames: int) -> dict[str, Any]:
        arguments = [(*x[:3], *y) for x, y in zip(data(frames), made(frames), strict=True)]
        return {"ms": round(milliseconds(operator, arguments), 3)}

    def whole(frames: int) -> dict[str, Any]:
        function, _, params = phi()
        ms = milliseconds(function, [(params, *x[:3]) for x in data(frames)])
        figures = {"ms": round(ms, 3), "ms_a_frame": round(ms / frames, 4)}
        return {**figures, "times_faster_than_softmax": round(peers[frames] / ms, 2)} if frames in peers else figures

    def whole_backward(frames: int) -> dict[str, Any]:
        function, _, params = phi()
        return {"ms": round(milliseconds(and_backward(function, 4), [(params, *x) for x in data(frames)]), 3)}

    def features_alone(frames: int) -> dict[str, Any]:
        _, function, params = phi()
        flops = 2 * 2 * frames * FRAME * HEADS * (WIDTH * FEATURES + FEATURES**2)
        return rated(milliseconds(function, [(params, *x[:2]) for x in data(frames)]), flops)

    def matrices() -> dict[str, Any]:
        size = 256 if TINY else 8192
        pairs = [tuple(jax.random.normal(jax.random.key(2 * i + j), (size, size), jnp.bfloat16) for j in range(2))
                 for i in range(2)]  # fmt: skip
        return rated(milliseconds(jnp.matmul, pairs), 2 * size**3)

    def cudnn_windows(frames: int) -> dict[str, Any]:
        """Chunks as a batch: what cuDNN takes for the windows alone, whose result has no maximum to merge by."""
        chunks = frames // CHUNK_FRAMES
        window = (CHUNK_FRAMES + OVERLAP_FRAMES) * FRAME
        q = jax.random.normal(jax.random.key(7), (chunks, CHUNK_FRAMES * FRAME, HEADS, WIDTH), jnp.bfloat16)
        k, v = (jax.random.normal(jax.random.key(8 + i), (chunks, window, HEADS, WIDTH), jnp.bfloat16) for i in (0, 1))
        flops = 4 * HEADS * WIDTH * chunks * CHUNK_FRAMES * (CHUNK_FRAMES + OVERLAP_FRAMES) * FRAME**2
        return rated(milliseconds(softmax, [(q, k, v)]), flops)

    def named(kernels: Any) -> str:
        return type(kernels).__name__

    yield "matrix product, 8192³", matrices
    yield f"softmax, cuDNN, {frames} frames", lambda: peer(frames)
    variants = candidates()
    for kernels in variants:
        yield f"windows, {named(kernels)}, {frames} frames", functools.partial(windows, kernels, frames)
    yield f"windows, cuDNN, chunks as batch, {frames} frames", lambda: cudnn_windows(frames)
    yield f"operator with φ, {frames} frames", lambda: whole(frames)
    yield f"operator, features given, {frames} frames", lambda: given_features(frames)
    yield f"φ alone, {frames} frames", lambda: features_alone(frames)
    yield f"operator with φ, forward and backward, {frames} frames", lambda: whole_backward(frames)
    for kernels in variants:
        case = f"windows, {named(kernels)}, forward and backward, {frames} frames"
        yield case, functools.partial(windows_backward, kernels, frames)
    yield (
        f"softmax, cuDNN, forward and backward, {frames} frames",
        lambda: rated(milliseconds(and_backward(softmax, 3), data(frames), samples=5), 3.5 * full_flops(frames)),
    )
    for longer in lengths[1:]:
        data.cache_clear()
        made.cache_clear()
        yield f"softmax, cuDNN, {longer} frames", functools.partial(peer, longer)
        yield f"operator with φ, {longer} frames", functools.partial(whole, longer)


def candidates() -> list[gpu.Kernels]:
    if TINY:
        return [gpu.TritonKernels(queries=16, keys=16, queries_backward=16, keys_backward=16, interpret=True)]
    return [gpu.HopperKernels(), gpu.TritonKernels()]


def windows_error(kernels: gpu.Kernels) -> dict[str, Any]:
    """Of the windows alone, forward, last chunk short, against XLA's softmax in float32."""
    width, chunk, overlap, length = (16, 24, 8, 60) if TINY else (128, 480, 160, 1336)
    keys = jax.random.split(jax.random.key(5), 3)
    q, k, v = (jax.random.normal(key, (2, length, 3, width), jnp.bfloat16) for key in keys)
    shape = Windows(chunk=chunk, overlap=overlap, past=0, length=length)
    poison()
    run = jax.jit(functools.partial(attend, kernels, shape))
    out, total, largest = (np.asarray(x, np.float64) for x in run(q, k, v, jnp.zeros((), jnp.int32)))
    wide = [np.asarray(x, np.float64) for x in (q, k, v)]
    token = np.arange(length)
    first = token // chunk * chunk
    seen = (token[None] >= first[:, None] - overlap) & (token[None] < first[:, None] + chunk)
    scores = np.where(seen, np.einsum("bnhd,bmhd->bhnm", *wide[:2]) * width**-0.5, -np.inf)
    top = scores.max(axis=3, keepdims=True)
    weights = np.exp(scores - top)
    sums = weights.sum(axis=3, keepdims=True)
    exact = np.einsum("bhnm,bmhd->bnhd", weights / sums, wide[2])
    error = float(np.linalg.norm(out - exact) / np.linalg.norm(exact))
    rows = float(max(np.abs(total - (top + np.log(sums))[..., 0]).max(), np.abs(largest - top[..., 0]).max()))
    return {"passed": bool(error <= 1e-2 and rows <= 1e-3), "error": error, "rows": rows}


def main() -> None:
    global TINY, HEADS, WIDTH, FEATURES, FRAME
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=110, help="after these, no case is begun")
    given = parser.parse_args()
    lengths, checks = [21, 41, 81, 161], CHECKS
    if given.tiny:
        TINY, HEADS, WIDTH, FEATURES, FRAME = True, 2, 32, 64, 16
        lengths = [6, 8]
        checks = {
            name: dataclasses.replace(
                check, tokens=check.tokens // 10, chunk=check.chunk // 10, overlap=check.overlap // 10,
                earlier=check.earlier // 10, cut=check.chunk // 10 * 2 if check.cut else 0, head_dim=32, features=32,
            )
            for name, check in CHECKS.items()
        }
    report = Report(pathlib.Path(os.environ.get("OUT", ".")) / "gpu_check.json", given.seconds)
    device = jax.devices()[0]
    report.add("machine", device=device.device_kind, jax=jax.__version__)
    for kernels in candidates():
        name = type(kernels).__name__
        report.run(f"check: windows, {name}", functools.partial(windows_error, kernels))
        if isinstance(kernels, gpu.HopperKernels) and not report.lines[-1].get("passed"):
            # What follows is of the others.
            gpu.kernels = lambda *_, **__: gpu.TritonKernels()
            report.add("note", kernels="TritonKernels stand in for HopperKernels")
    first, *others = checks.items()
    report.run(f"check: {first[0]}", functools.partial(worst_error, first[1]))
    cases = timings(lengths)
    # The figures of most interest, then the other checks, then the rest.
    for case, measure in cases:
        report.run(case, measure)
        if case.startswith("operator with φ,"):
            break
    for name, check in others:
        report.run(f"check: {name}", functools.partial(worst_error, check))
    for case, measure in cases:
        report.run(case, measure)


if __name__ == "__main__":
    main()

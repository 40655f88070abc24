"""The GPU path of hybrid attention, checked against the dense reference in float64, then timed beside cuDNN's softmax.

    PYTHONPATH=. python -m benchmarks.gpu_check

Three minutes on an H200, compilations included. One JSON line for each case as soon as it is known, so that a run that
is cut still gives figures; all of them in ``$OUT/gpu_check.json`` (or the working folder). Where there is no GPU,
``--tiny`` tries the script itself, at sizes that mean nothing. What is timed: ``benchmarks/hybrid_operator.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import hybrid_operator
from benchmarks.timing import Report, arguments
from pallas_kernels import gpu
from pallas_kernels.gpu.windows import Windows, attend
from rehyat_jax.attention.api import hybrid_attention
from rehyat_jax.attention.features import FeatureMap


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
    # Features of this size let both parts be heard.
    arrays += [rng.uniform(0.01, 1, size=(*shape, check.features)) / check.features**0.5 for _ in range(2)]
    return [jnp.asarray(a, check.dtype) for a in arrays], jnp.asarray([1.0, 0.8], jnp.float32)


def worst_error(check: Check) -> dict[str, Any]:
    """The largest of the errors ‖x − exact‖ / ‖exact‖ of output, state and all gradients."""

    def call(implementation: Any, cut: int, arrays: Any, decay: Any, state: Any) -> Any:
        stabilizer: Any = check.stabilizer
        outputs, ends = [], [0, cut, check.tokens] if cut else [0, check.tokens]
        for begin, end in itertools.pairwise(ends):
            out, state = hybrid_attention(
                *(x[:, begin:end] for x in arrays),
                chunk=check.chunk,
                overlap=check.overlap,
                decay=decay,
                stabilizer=stabilizer,
                initial_state=state,
                return_state=True,
                implementation=implementation,
            )
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
            *(a[:, : check.earlier] for a in arrays),
            chunk=check.chunk,
            overlap=check.overlap,
            decay=decay,
            return_state=True,
            implementation="reference",
        )
    arrays = [a[:, check.earlier :] for a in arrays]
    rng = np.random.default_rng(1)
    batch, _, heads, width = arrays[2].shape
    shapes = [
        (arrays[2].shape, check.dtype),
        ((batch, heads, check.features, width), "float32"),
        ((batch, heads, check.features), "float32"),
    ]
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


@functools.cache
def windows_exact() -> tuple[Windows, list[jax.Array], dict[str, np.ndarray]]:
    """Windows whose last chunk is short; q, k, v, a, n and the cotangent of y; in float64 what is right of them."""
    width, chunk, overlap, length = (16, 24, 8, 60) if TINY else (128, 480, 160, 1336)
    keys = jax.random.split(jax.random.key(5), 6)
    q, k, v, a, d_y = (jax.random.normal(key, (2, length, 3, width), jnp.bfloat16) for key in keys[:5])
    # As heavy as the window's sum of exponentials is.
    n = jax.random.uniform(keys[5], (2, length, 3), jnp.float32) * chunk
    arrays = [q, k, v, (a * jnp.asarray(chunk, a.dtype)).astype(a.dtype), n, d_y]
    wide_q, wide_k, wide_v, wide_a, wide_n, wide_d = (np.asarray(x, np.float64) for x in arrays)
    token = np.arange(length)
    first = token // chunk * chunk
    seen = (token[None] >= first[:, None] - overlap) & (token[None] < first[:, None] + chunk)
    scores = np.where(seen, np.einsum("bnhd,bmhd->bhnm", wide_q, wide_k) * width**-0.5, -np.inf)
    weights = np.exp(scores)
    sums = weights.sum(axis=3)
    softmax = np.einsum("bhnm,bmhd->bnhd", weights / sums[..., None], wide_v)
    right = {"softmax": softmax, "total": np.log2(sums), "largest": scores.max(axis=3) / np.log(2)}
    normalizer = sums + wide_n.swapaxes(1, 2)
    p, each = weights / normalizer[..., None], normalizer.swapaxes(1, 2)[..., None]
    y = np.einsum("bhnm,bmhd->bnhd", p, wide_v) + wide_a / each
    inner = (wide_d * y).sum(axis=3)
    d_scores = p * (np.einsum("bnhd,bmhd->bhnm", wide_d, wide_v) - inner.swapaxes(1, 2)[..., None]) * width**-0.5
    right |= {"y": y, "q": np.einsum("bhnm,bmhd->bnhd", d_scores, wide_k)}
    right |= {"k": np.einsum("bhnm,bnhd->bmhd", d_scores, wide_q), "v": np.einsum("bhnm,bnhd->bmhd", p, wide_d)}
    right |= {"a": wide_d / each, "n": -inner / each[..., 0]}
    return Windows(chunk=chunk, overlap=overlap, past=0, length=length), arrays, right


def windows_error(kernels: gpu.Kernels) -> dict[str, Any]:
    """Of the windows alone, forward."""
    shape, (q, k, v, *_), right = windows_exact()
    poison()
    run = jax.jit(functools.partial(kernels.forward, shape))
    out, total, largest = (np.asarray(x, np.float64) for x in run(q, k, v, jnp.zeros((), jnp.int32)))
    error = float(np.linalg.norm(out - right["softmax"]) / np.linalg.norm(right["softmax"]))
    rows = float(np.log(2) * max(np.abs(total - right["total"]).max(), np.abs(largest - right["largest"]).max()))
    return {"passed": bool(error <= 1e-2 and rows <= 1e-3), "error": error, "rows": rows}


def backward_error(kernels: gpu.Kernels) -> dict[str, Any]:
    """Of the windows with a linear part, output and all gradients."""
    shape, (*moving, d_y), right = windows_exact()
    poison()

    @jax.jit
    def run(moving: list[jax.Array], d_y: jax.Array) -> tuple[jax.Array, ...]:
        def function(q: jax.Array, k: jax.Array, v: jax.Array, a: jax.Array, n: jax.Array) -> jax.Array:
            return attend(kernels, shape, "none", q, k, v, jnp.zeros((), jnp.int32), a, n)

        y, back = jax.vjp(function, *moving)
        return y, *back(d_y)

    errors = {
        name: float(np.linalg.norm(np.asarray(x, np.float64) - right[name]) / np.linalg.norm(right[name]))
        for name, x in zip(("y", "q", "k", "v", "a", "n"), run(moving, d_y), strict=True)
    }
    return {"passed": all(error <= 1e-2 for error in errors.values()), "errors": errors}


def features_error() -> dict[str, Any]:
    """Of φ by its kernel, where there is one, last block of tokens short: output and all gradients, against float64."""
    heads, width, tokens = (2, 16, 70) if TINY else (4, 128, 1000)
    phi = FeatureMap(heads, width, level=0.5, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    exact = FeatureMap(heads, width, level=0.5, dtype=jnp.float64, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(6)
    x, d_out = (jnp.asarray(rng.normal(size=(2, tokens, heads, each)), jnp.bfloat16) for each in (width, 2 * width))
    weight = jnp.asarray(rng.uniform(0.1, 1, size=(tokens, heads)), jnp.float32)

    def run(phi: FeatureMap, given: Any, by: str) -> Any:
        graph = nnx.graphdef(phi)

        @jax.jit
        def both(params: Any, x: jax.Array, weight: jax.Array, d_out: jax.Array) -> Any:
            y, back = jax.vjp(lambda p, x, w: nnx.merge(graph, p)(x, w, implementation=by), params, x, weight)
            return y, back(d_out)

        return jax.device_get(both(*given))

    given = nnx.state(phi), x, weight, d_out
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), given)
        right = jax.tree.leaves(run(exact, wide, "scan"))
    errors = {}
    for by in ("scan", "auto"):
        poison()
        found = jax.tree.leaves(run(phi, given, by))
        errors[by] = [
            float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))
            for a, b in zip(found, right, strict=True)
        ]
    # XLA rounds the hidden layer and every product: of some gradients it is farther off than the limit.
    worst, by_xla = max(errors["auto"]), max(errors["scan"])
    figures = {"worst": worst, "worst_by_xla": by_xla, "fused": phi._kernels(x) is not None, "errors": errors["auto"]}
    return {"passed": bool(worst <= max(1e-2, by_xla)), **figures}


def use_instead(kernels: gpu.Kernels) -> None:
    """For all that follows."""
    default = gpu.kernels

    def chosen(*given: Any, **cut: Any) -> gpu.Kernels:
        return kernels if isinstance(default(*given, **cut), gpu.HopperKernels) else gpu.TritonKernels()

    gpu.kernels = chosen


def main(argv: Sequence[str] | None = None) -> None:
    global TINY
    given = arguments(__doc__, "gpu_check", argv, lengths=(21, 41, 81, 161))
    sizes, lengths, checks = hybrid_operator.Sizes(), given.lengths, CHECKS
    if given.tiny:
        TINY, sizes, lengths = True, hybrid_operator.TINY, [6, 8]
        checks = {
            name: dataclasses.replace(
                check,
                tokens=check.tokens // 10,
                chunk=check.chunk // 10,
                overlap=check.overlap // 10,
                earlier=check.earlier // 10,
                cut=check.chunk // 10 * 2 if check.cut else 0,
                head_dim=32,
                features=32,
            )
            for name, check in CHECKS.items()
        }
    report = Report(given.out, given.seconds)
    right: dict[str, gpu.Kernels] = {}
    for name, kernels in hybrid_operator.kernels_named().items():
        passed = []
        for kind, error in (("forward", windows_error), ("backward", backward_error)):
            report.run(f"check: windows, {name}, {kind}", functools.partial(error, kernels))
            passed.append(report.lines[-1].get("passed"))
        if all(passed):
            right[name] = kernels
    if right and (best := next(iter(right))) != next(iter(hybrid_operator.kernels_named())):
        use_instead(right[best])
        report.add("note", kernels=f"what follows is of the windows by {best}")
    report.run("check: φ", features_error)
    if not report.lines[-1].get("passed"):
        gpu.feature_kernels = lambda *_, **__: None
        report.add("note", features="what follows is of φ by XLA")
    first, *others = checks.items()
    report.run(f"check: {first[0]}", functools.partial(worst_error, first[1]))
    cases = hybrid_operator.cases(sizes, lengths)
    # The figures of most interest, then the other checks, then the rest.
    for case, measure in cases:
        report.run(case, measure)
        if case.startswith("operator with φ,"):
            break
    for name, check in others:
        report.run(f"check: {name}", functools.partial(worst_error, check))
    report.run_all(cases)


if __name__ == "__main__":
    main()

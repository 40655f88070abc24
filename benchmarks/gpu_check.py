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

from benchmarks import hybrid_operator
from benchmarks.timing import Report, arguments
from pallas_kernels import gpu
from pallas_kernels.gpu.windows import Windows
from rehyat_jax.attention.api import hybrid_attention


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


def windows_error(kernels: gpu.Kernels) -> dict[str, Any]:
    """Of the windows alone, forward, last chunk short, against XLA's softmax in float32."""
    width, chunk, overlap, length = (16, 24, 8, 60) if TINY else (128, 480, 160, 1336)
    keys = jax.random.split(jax.random.key(5), 3)
    q, k, v = (jax.random.normal(key, (2, length, 3, width), jnp.bfloat16) for key in keys)
    shape = Windows(chunk=chunk, overlap=overlap, past=0, length=length)
    poison()
    run = jax.jit(functools.partial(kernels.forward, shape))
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
    rows = np.stack([(top + np.log(sums))[..., 0], top[..., 0]]) - np.log(2) * np.stack([total, largest])
    worst = float(np.abs(rows).max())
    return {"passed": bool(error <= 1e-2 and worst <= 1e-3), "error": error, "rows": worst}


def main(argv: Sequence[str] | None = None) -> None:
    global TINY
    given = arguments(__doc__, "gpu_check", argv, lengths=(21, 41, 81, 161))
    sizes, lengths, checks = hybrid_operator.Sizes(), given.lengths, CHECKS
    if given.tiny:
        TINY, sizes, lengths = True, hybrid_operator.TINY, [6, 8]
        checks = {
            name: dataclasses.replace(
                check, tokens=check.tokens // 10, chunk=check.chunk // 10, overlap=check.overlap // 10,
                earlier=check.earlier // 10, cut=check.chunk // 10 * 2 if check.cut else 0, head_dim=32, features=32,
            )
            for name, check in CHECKS.items()
        }
    report = Report(given.out, given.seconds)
    for name, kernels in hybrid_operator.kernels_named().items():
        report.run(f"check: windows, {name}", functools.partial(windows_error, kernels))
        if isinstance(kernels, gpu.HopperKernels) and not report.lines[-1].get("passed"):
            # What follows is of the others.
            gpu.kernels = lambda *_, **__: gpu.TritonKernels()
            report.add("note", kernels="TritonKernels stand in for HopperKernels")
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

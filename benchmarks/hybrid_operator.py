"""The hybrid operator at Wan-1.3B's sizes beside full softmax: its parts, its length, forward and backward.

    PYTHONPATH=. python -m benchmarks.hybrid_operator

One JSON line for each case, all of them in ``$OUT/operator.json`` (or the working folder). Two minutes on an H200,
compilations included. bfloat16, batch 1, 12 heads of 128, 256 features, 1,560 tokens a latent frame (480×832), chunks
of 3 frames after an overlap of 1. A time is the median of 10 samples of several calls each, on two sets of inputs in
turn, after a warm-up.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from benchmarks.timing import Case, Report, arguments, milliseconds
from pallas_kernels import gpu
from pallas_kernels.gpu.windows import Windows
from rehyat_jax.attention.api import hybrid_attention
from rehyat_jax.attention.softmax import softmax_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of what is timed; frames are latent."""

    heads: int = 12
    width: int = 128
    features: int = 256
    #: Tokens of a frame.
    frame: int = 1560
    chunk_frames: int = 3
    overlap_frames: int = 1
    softmax: Literal["cudnn", "xla"] = "cudnn"

    @property
    def cut(self) -> dict[str, int]:
        return {"chunk": self.chunk_frames * self.frame, "overlap": self.overlap_frames * self.frame}


TINY = Sizes(heads=2, width=32, features=64, frame=16, softmax="xla")


def kernels_named() -> dict[str, gpu.Kernels]:
    """Of the windows: the default first, with cuDNN's backward, then candidates beside it."""
    if jax.default_backend() != "gpu":
        small = {"queries": 16, "keys": 16, "queries_backward": 16, "keys_backward": 16}
        return {"Triton": gpu.TritonKernels(**small, interpret=True)}
    return {
        "Hopper": gpu.HopperKernels(),
        "Hopper, backward by Triton": gpu.HopperKernels(backward_kernels=gpu.TritonKernels()),
        "Triton": gpu.TritonKernels(),
    }


def softmax(q: jax.Array, k: jax.Array, v: jax.Array, *, sizes: Sizes) -> jax.Array:
    if sizes.softmax == "xla":
        return softmax_attention(q, k, v)
    return jax.nn.dot_product_attention(q, k, v, implementation=sizes.softmax)


def maps(sizes: Sizes) -> tuple[Callable[..., Any], Any]:
    """φ_q and φ_k as Wan's blocks have them, as a function of parameters, q and k."""
    from flax import nnx

    from rehyat_jax.attention.features import FeatureMap

    kinds: dict[str, Any] = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    pair = nnx.List(FeatureMap(sizes.heads, sizes.width, **kinds, rngs=nnx.Rngs(i)) for i in range(2))
    graphdef, params = nnx.split(pair)

    def features(params: Any, q: jax.Array, k: jax.Array, by: str = "auto") -> tuple[jax.Array, jax.Array]:
        """By one kernel where there is one, or, as the plain scan would have them, by XLA."""
        of_q, of_k = nnx.merge(graphdef, params)
        return of_q(q, implementation=by), of_k(k, implementation=by)

    return features, params


def and_backward(function: Callable[..., jax.Array], moving: int) -> Callable[..., Any]:
    """Forward and gradients to the first arguments; the last is the cotangent."""

    def both(*given: Any) -> Any:
        def loss(*moved: Any) -> jax.Array:
            return (function(*moved).astype(jnp.float32) * given[-1].astype(jnp.float32)).sum()

        return jax.value_and_grad(loss, argnums=tuple(range(moving)))(*given[:-1])

    return both


def rated(ms: float, flops: float) -> dict[str, float]:
    return {"ms": round(ms, 3), "tflops": round(flops / ms / 1e9, 1)}


def cases(sizes: Sizes, lengths: Sequence[int]) -> Iterator[Case]:
    """In the order of what one wants to know first; a peer stands before ours of the same work."""
    first, widths = lengths[0], sizes.heads * sizes.width
    peers: dict[int, float] = {}
    peer_softmax = functools.partial(softmax, sizes=sizes)

    def some(count: int, width: int, frames: int, *, seed: int, uniform: bool = False) -> list[tuple[jax.Array, ...]]:
        """Two sets of so many arrays."""
        shape = (1, frames * sizes.frame, sizes.heads, width)

        @jax.jit
        def make(key: jax.Array) -> tuple[jax.Array, ...]:
            keys = jax.random.split(key, count)
            if uniform:
                return tuple(jax.random.uniform(k, shape, jnp.bfloat16) * 0.01 for k in keys)
            return tuple(jax.random.normal(k, shape, jnp.bfloat16) for k in keys)

        return [make(jax.random.key(seed + i)) for i in range(2)]

    @functools.lru_cache(maxsize=1)
    def data(frames: int) -> list[tuple[jax.Array, ...]]:
        """q, k, v and their cotangent."""
        return some(4, sizes.width, frames, seed=0)

    @functools.cache
    def phi() -> tuple[Callable[..., Any], Any]:
        return maps(sizes)

    def operator(implementation: Any, *arrays: jax.Array) -> jax.Array:
        return hybrid_attention(*arrays, **sizes.cut, implementation=implementation)  # type: ignore[call-overload]

    def with_features(implementation: str, params: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return operator(implementation, q, k, v, *phi()[0](params, q, k, implementation))

    def full_flops(frames: int) -> float:
        return 4 * widths * float(frames * sizes.frame) ** 2

    def window_flops(frames: int) -> float:
        pairs = 0
        for begin in range(0, frames, sizes.chunk_frames):
            own = min(sizes.chunk_frames, frames - begin)
            pairs += own * (own + min(sizes.overlap_frames, begin))
        return 4.0 * widths * pairs * sizes.frame**2

    def matrices() -> dict[str, Any]:
        size = 8192 if sizes.frame > 100 else 256
        pairs = [
            tuple(jax.random.normal(jax.random.key(2 * i + j), (size, size), jnp.bfloat16) for j in range(2))
            for i in range(2)
        ]
        return rated(milliseconds(jnp.matmul, pairs), 2 * size**3)

    def peer(frames: int) -> dict[str, Any]:
        peers[frames] = milliseconds(peer_softmax, [x[:3] for x in data(frames)])
        return rated(peers[frames], full_flops(frames))

    def windows(kernels: gpu.Kernels, backward: bool) -> dict[str, Any]:
        shape = Windows(**sizes.cut, past=0, length=first * sizes.frame)

        def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
            return kernels.forward(shape, q, k, v, jnp.zeros((), jnp.int32))

        def both(q: jax.Array, k: jax.Array, v: jax.Array, d_y: jax.Array) -> Any:
            y, total, _ = forward(q, k, v)
            return y, kernels.backward(shape, q, k, v, jnp.zeros((), jnp.int32), y, d_y, total)

        if backward:
            return rated(milliseconds(both, data(first)), 3.5 * window_flops(first))
        return rated(milliseconds(forward, [x[:3] for x in data(first)]), window_flops(first))

    def cudnn_windows() -> dict[str, Any]:
        """Chunks as a batch: what cuDNN takes for the windows alone, whose result has no maximum to merge by."""
        chunks = first // sizes.chunk_frames
        frames = (sizes.chunk_frames, sizes.chunk_frames + sizes.overlap_frames)
        shapes = [(chunks, count * sizes.frame, sizes.heads, sizes.width) for count in (*frames, frames[1])]
        arrays = [jax.random.normal(jax.random.key(7 + i), shape, jnp.bfloat16) for i, shape in enumerate(shapes)]
        flops = 4.0 * widths * chunks * frames[0] * frames[1] * sizes.frame**2
        return rated(milliseconds(peer_softmax, [tuple(arrays)]), flops)

    def whole(implementation: str, frames: int) -> dict[str, Any]:
        ms = milliseconds(functools.partial(with_features, implementation), [(phi()[1], *x[:3]) for x in data(frames)])
        figures = {"ms": round(ms, 3), "ms_a_frame": round(ms / frames, 4)}
        if frames not in peers:
            return figures
        return {**figures, "times_faster_than_softmax": float(f"{peers[frames] / ms:.3g}")}

    def whole_backward() -> dict[str, Any]:
        function = and_backward(functools.partial(with_features, "pallas"), 4)
        return {"ms": round(milliseconds(function, [(phi()[1], *x) for x in data(first)]), 3)}

    def given_features() -> dict[str, Any]:
        features = some(2, sizes.features, first, seed=100, uniform=True)
        arrays = [(*x[:3], *y) for x, y in zip(data(first), features, strict=True)]
        return {"ms": round(milliseconds(functools.partial(operator, "pallas"), arrays), 3)}

    def features_alone(by: str, backward: bool) -> dict[str, Any]:
        flops = 4.0 * first * sizes.frame * sizes.heads * (sizes.width * sizes.features + sizes.features**2)
        given = [(phi()[1], *x[:2]) for x in data(first)]
        function = functools.partial(phi()[0], by=by)
        if not backward:
            return rated(milliseconds(function, given), flops)
        cotangents = some(2, sizes.features, first, seed=100)

        def both(params: Any, q: jax.Array, k: jax.Array, *d: jax.Array) -> Any:
            results, back = jax.vjp(function, params, q, k)
            return results, back(d)

        return rated(milliseconds(both, [(*x, *d) for x, d in zip(given, cotangents, strict=True)]), 3 * flops)

    yield "matrix product, 8192³", matrices
    yield f"softmax, {sizes.softmax}, {first} frames", lambda: peer(first)
    named = kernels_named()
    for name, kernels in named.items():
        yield f"windows, {name}, {first} frames", functools.partial(windows, kernels, False)
    yield f"windows, {sizes.softmax}, chunks as batch, {first} frames", cudnn_windows
    yield f"operator with φ, {first} frames", lambda: whole("pallas", first)
    yield f"operator, features given, {first} frames", given_features
    for name, by in (("fused", "auto"), ("XLA", "scan")):
        yield f"φ, {name}, {first} frames", functools.partial(features_alone, by, False)
    yield f"operator with φ, plain scan, {first} frames", lambda: whole("scan", first)
    yield f"operator with φ, forward and backward, {first} frames", whole_backward
    for name, by in (("fused", "auto"), ("XLA", "scan")):
        yield f"φ, {name}, forward and backward, {first} frames", functools.partial(features_alone, by, True)
    for name, kernels in named.items():
        case = f"windows, {name}, forward and backward, {first} frames"
        yield case, functools.partial(windows, kernels, True)
    yield (
        f"softmax, {sizes.softmax}, forward and backward, {first} frames",
        lambda: rated(milliseconds(and_backward(peer_softmax, 3), data(first)), 3.5 * full_flops(first)),
    )
    for longer in lengths[1:]:
        yield f"softmax, {sizes.softmax}, {longer} frames", functools.partial(peer, longer)
        yield f"operator with φ, {longer} frames", functools.partial(whole, "pallas", longer)


def main(argv: Sequence[str] | None = None) -> None:
    given = arguments(__doc__, "operator", argv, lengths=(21, 41, 81, 161))
    sizes, lengths = (TINY, [6, 8]) if given.tiny else (Sizes(), given.lengths)
    Report(given.out, given.seconds).run_all(cases(sizes, lengths))


if __name__ == "__main__":
    main()

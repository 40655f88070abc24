"""What every implementation of hybrid attention owes, stated once: outputs, states and gradients of the reference.

``tests/attention/test_backends.py`` lists the backends. A new one is a ``Backend`` more there.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import gpu, tpu
from rehyat_jax import hybrid_attention
from rehyat_jax.attention.state import HybridState

#: The contract's figures, of the root mean square, against float64 of the same rounded inputs.
TOLERANCES = {"float32": 2e-5, "bfloat16": 1e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and options of one call. The state that it begins with is that of an earlier call."""

    tokens: int
    chunk: int
    overlap: int
    head_dim: int
    features: int
    stabilizer: str
    causal: bool = True
    #: Tokens of the earlier call; fewer than the overlap leave empty places. None: the backend is told that nothing
    #: came before.
    earlier: int | None = 0

    @property
    def seen(self) -> jax.Array:
        return jnp.asarray(min(self.earlier or 0, self.overlap), jnp.int32)

    @property
    def options(self) -> dict[str, Any]:
        return {"chunk": self.chunk, "overlap": self.overlap, "stabilizer": self.stabilizer}


@dataclasses.dataclass(frozen=True)
class Backend:
    """An implementation: ``(case, arrays, the five floating parts of a state, decay) -> (output, s, z)``."""

    run: Callable[..., tuple[Any, ...]]
    cases: tuple[Case, ...]
    #: Devices that a process of its own has; 0: it runs in the tests' process.
    devices: int = 0
    #: Whether it takes a state and gives one.
    stateful: bool = True


#: Last chunks short, whole, and the only one; overlaps none, less than, equal to and more than a chunk; the first two
#: are those of ``make test``: something came before, and a video that is not causal.
CASES = (
    Case(70, 24, 24, 128, 64, "row_max", earlier=72),
    Case(60, 33, 20, 64, 96, "row_max", causal=False, earlier=None),
    Case(100, 40, 12, 64, 64, "row_max", earlier=None),
    Case(70, 24, 20, 24, 32, "lse"),
    Case(96, 32, 0, 64, 128, "none"),
    Case(60, 24, 70, 64, 256, "row_max", earlier=48),
    Case(52, 40, 56, 64, 512, "lse", earlier=40),
    Case(50, 64, 16, 128, 128, "none", earlier=None),
)


def inputs(case: Case, dtype: str) -> tuple[list[jax.Array], HybridState, jax.Array]:
    """Of the rounded inputs, a state in which both parts are heard, and a decay."""
    earlier = case.earlier or 0
    rng = np.random.default_rng(case.tokens + case.overlap)
    shape = (1, earlier + case.tokens, 2)
    numbers = [rng.normal(size=(*shape, case.head_dim)) for _ in range(3)]
    numbers += [rng.uniform(0.01, 1, size=(*shape, case.features)) / case.features**0.5 for _ in range(2)]
    arrays = [jnp.asarray(a, dtype) for a in numbers]
    decay = jnp.asarray([1.0, 0.8] if case.causal else [1.0, 1.0], jnp.float32)
    state = HybridState.zeros(
        1, heads=2, head_dim=case.head_dim, feature_dim=case.features, overlap=case.overlap, dtype=jnp.dtype(dtype)
    )
    if earlier:
        _, state = hybrid_attention(
            *(a[:, :earlier] for a in arrays),
            chunk=case.chunk,
            overlap=case.overlap,
            decay=decay,
            initial_state=state,
            return_state=True,
            implementation="reference",
        )
    return [a[:, earlier:] for a in arrays], state, decay


def by_name(implementation: str, case: Case, arrays, state, decay):
    """The public call."""
    options = case.options | {"implementation": implementation}
    if not case.causal:
        return hybrid_attention(*arrays, causal=False, **options), None, None
    out, after = hybrid_attention(
        *arrays, decay=decay, initial_state=HybridState(*state, case.seen), return_state=True, **options
    )
    return out, after.s, after.z


by_reference = functools.partial(by_name, "reference")


#: So small that every loop over blocks runs more than once.
TRITON = gpu.TritonKernels(queries=16, keys=16, queries_backward=16, keys_backward=32, interpret=True)


def _of_kernels(case: Case, state, decay) -> dict[str, Any]:
    parts = dict(zip(("s", "z", "past_k", "past_v", "past_features_k"), state, strict=True))
    options = {"chunk": case.chunk, "causal": case.causal, "stabilizer": case.stabilizer}
    return parts | options | {"seen": case.seen, "decay": decay}


def by_gpu_kernels(case: Case, arrays, state, decay, *, kernels):
    return gpu.hybrid(*arrays, **_of_kernels(case, state, decay), kernels=kernels, begins=case.earlier is None)


def by_tpu_kernels(case: Case, arrays, state, decay, *, blocks: tpu.Blocks):
    return tpu.hybrid(*arrays, **_of_kernels(case, state, decay), blocks=blocks, interpret=True)


@functools.cache
def _compiled(run: Callable[..., Any], case: Case, stateful: bool) -> Callable[..., Any]:
    """Of a loss over the output and the state after it, the results and the gradients to every floating argument."""

    def loss(weights, *arguments):
        results = run(case, *arguments)[: 3 if stateful else 1]
        return sum(jnp.sum(w * x.astype(w.dtype)) for w, x in zip(weights, results, strict=False)), results

    def both(weights, *arguments):
        (_, results), gradients = jax.value_and_grad(
            lambda *given: loss(weights, *given), argnums=(0, 1, 2), has_aux=True
        )(*arguments)
        return results, gradients

    return jax.jit(both)


def errors(backend: Backend, case: Case, dtype: str) -> list[float]:
    """Of the output, the states after it and all gradients: distances from float64 of the same rounded inputs, as
    shares of those."""
    arrays, state, decay = inputs(case, dtype)
    stateful = backend.stateful and case.causal
    rng = np.random.default_rng(1)
    # The output's as coarse as the cotangent of a bfloat16 output is.
    weights = [
        jnp.asarray(rng.normal(size=x.shape), d).astype(jnp.float32)
        for x, d in [(arrays[2], dtype), (state.s, jnp.float32), (state.z, jnp.float32)]
    ]
    given = weights, arrays, tuple(state[:5]), decay
    outputs, gradients = _compiled(backend.run, case, stateful)(*given)
    assert outputs[0].dtype == dtype
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), given)
        exact, expected = jax.device_get(_compiled(by_reference, case, stateful)(*wide))
    if not case.causal:  # the reference has no past, whose gradient could be compared, nor a decay
        gradients, expected = gradients[:1], expected[:1]
    elif case.earlier is None:  # nothing came before: a backend that was told so has gradients of 0 to that
        gradients, expected = (gradients[0], gradients[2]), (expected[0], expected[2])
    return [
        _apart(np.asarray(x, np.float64), y)
        for x, y in zip(jax.tree.leaves((outputs, gradients)), jax.tree.leaves((exact, expected)), strict=True)
    ]


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    """The distance as a share of the other. What is nothing but zeros, as a gradient to a past in which nothing is,
    must be met exactly."""
    if not other.any():
        return float("inf") if one.any() else 0.0
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))

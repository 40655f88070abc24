"""The TPU kernels, interpreted on the CPU, against the dense reference in float64; shard_map and remat.

The interpreter fills outputs, scratch and what lies beyond an array's end with NaN before a kernel runs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tpu import Blocks, hybrid
from rehyat_jax import hybrid_attention
from rehyat_jax.attention.state import HybridState

#: So small that every loop over blocks runs more than once.
SMALL = Blocks(queries=128, queries_backward=128, keys=32, keys_backward=32, resident=64, tokens=32)


@dataclasses.dataclass(frozen=True)
class Case:
    tokens: int
    chunk: int
    overlap: int
    head_dim: int
    features: int
    stabilizer: str
    causal: bool = True
    #: Tokens of an earlier call, whose state is the initial one; fewer than the overlap leave empty places.
    earlier: int = 0
    blocks: Blocks = SMALL


#: Last chunks short, whole, and the only one; overlaps none, less than, equal to and more than a chunk; several blocks
#: of queries and of resident keys; block sizes that divide nothing; the defaults.
CASES = [
    Case(300, 140, 52, 64, 64, "row_max"),
    Case(96, 32, 0, 64, 128, "lse"),
    Case(100, 24, 70, 64, 256, "none", earlier=48),
    Case(70, 24, 24, 128, 64, "row_max", earlier=72),
    Case(52, 40, 56, 64, 512, "lse", earlier=40),
    Case(90, 33, 20, 64, 96, "row_max", causal=False),
    Case(50, 64, 16, 128, 128, "none", blocks=Blocks()),
]


def inputs(case: Case, dtype) -> tuple[list[jax.Array], HybridState, jax.Array]:
    """Of the rounded inputs, a state in which both parts are heard, and a decay."""
    rng = np.random.default_rng(abs(hash((case.tokens, case.chunk, case.overlap))) % 2**32)
    shape = (1, case.earlier + case.tokens, 2)
    arrays = [rng.normal(size=(*shape, case.head_dim)) for _ in range(3)]
    arrays += [rng.uniform(0.01, 1, size=(*shape, case.features)) / case.features**0.5 for _ in range(2)]
    arrays = [jnp.asarray(a, dtype) for a in arrays]
    decay = jnp.asarray([1.0, 0.8] if case.causal else [1.0, 1.0], jnp.float32)
    state = HybridState.zeros(
        1, heads=2, head_dim=case.head_dim, feature_dim=case.features, overlap=case.overlap, dtype=dtype
    )
    if case.earlier:
        _, state = hybrid_attention(
            *(a[:, : case.earlier] for a in arrays),
            chunk=case.chunk,
            overlap=case.overlap,
            decay=decay,
            initial_state=state,
            return_state=True,
            implementation="reference",
        )
    return [a[:, case.earlier :] for a in arrays], state, decay


def by_kernels(case: Case, arrays, state, decay):
    q, k, v, features_q, features_k = arrays
    return hybrid(
        q,
        k,
        v,
        features_q,
        features_k,
        s=state[0],
        z=state[1],
        past_k=state[2],
        past_v=state[3],
        past_features_k=state[4],
        seen=jnp.asarray(min(case.earlier, case.overlap), jnp.int32),
        decay=decay,
        chunk=case.chunk,
        causal=case.causal,
        stabilizer=case.stabilizer,
        blocks=case.blocks,
        interpret=True,
    )


def by_reference(case: Case, arrays, state, decay):
    options = {"chunk": case.chunk, "overlap": case.overlap, "stabilizer": case.stabilizer}
    options["implementation"] = "reference"
    if not case.causal:
        return hybrid_attention(*arrays, causal=False, **options), None, None
    seen = jnp.asarray(min(case.earlier, case.overlap), jnp.int32)
    out, state = hybrid_attention(
        *arrays, decay=decay, initial_state=HybridState(*state, seen), return_state=True, **options
    )
    return out, state.s, state.z


def output_and_gradients(function, case: Case, weights, arrays, state, decay):
    """Of a loss over the output and the state after it, to every floating argument."""

    def loss(*arguments):
        results = function(case, *arguments)
        used = results if case.causal else results[:1]
        return sum(jnp.sum(w * x.astype(w.dtype)) for w, x in zip(weights, used, strict=False)), used

    (_, results), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(arrays, state, decay)
    return results, gradients


@functools.cache
def compiled(function, case: Case):
    return jax.jit(
        functools.partial(output_and_gradients, function, case), compiler_options={"xla_backend_optimization_level": 0}
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-5), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.tokens}-{case.chunk}-{case.overlap}")
def test_output_state_and_gradients(case, dtype, tolerance):
    """To the contract's figures, of the root mean square, against float64 of the same rounded inputs."""
    arrays, state, decay = inputs(case, dtype)
    rng = np.random.default_rng(1)
    # The output's as coarse as the cotangent of a bfloat16 output is.
    weights = [
        jnp.asarray(rng.normal(size=x.shape), d).astype(jnp.float32)
        for x, d in [(arrays[2], dtype), (state.s, jnp.float32), (state.z, jnp.float32)]
    ]
    outputs, gradients = compiled(by_kernels, case)(weights, arrays, tuple(state[:5]), decay)
    assert outputs[0].dtype == dtype
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda x: jnp.asarray(np.asarray(x), jnp.float64), (weights, arrays, tuple(state[:5]), decay)
        )
        exact = jax.device_get(compiled(by_reference, case)(*wide))
    if not case.causal:
        # Their reference has no past, whose gradient could be compared.
        gradients, exact = gradients[:1], (exact[0][:1], exact[1][:1])
        outputs = outputs[:1]
    for x, y in zip(jax.tree.leaves((outputs, gradients)), jax.tree.leaves(exact), strict=True):
        error = np.linalg.norm(np.asarray(x, np.float64) - y)
        assert error <= tolerance * np.linalg.norm(y), x.shape

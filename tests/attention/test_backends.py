"""Every backend of hybrid attention, held to one statement of what an implementation owes (``shared/attention.py``).

The TPU kernels' interpreter fills outputs, scratch and what lies beyond an array's end with NaN before a kernel runs.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared import tiers
from shared.attention import (
    CASES,
    TOLERANCES,
    TRITON,
    Backend,
    Case,
    by_gpu_kernels,
    by_name,
    by_tpu_kernels,
    errors,
    inputs,
)
from shared.devices import on_devices

from pallas_kernels import tpu
from rehyat_jax.attention.sharded import hybrid_over_devices
from rehyat_jax.runtime.mesh_config import MeshConfig

#: So small that every loop over blocks runs more than once.
BLOCKS = tpu.Blocks(queries=128, queries_backward=128, keys=32, keys_backward=32, resident=64, tokens=32)


def over_devices(case: Case, arrays, _, decay):
    """Time in two, heads and batch whole."""
    return (hybrid_over_devices(*arrays, **case.options, causal=True, implementation="scan", decay=decay),)


BACKENDS = {
    "scan": Backend(functools.partial(by_name, "scan"), CASES),
    "gpu": Backend(functools.partial(by_gpu_kernels, kernels=TRITON), CASES),
    # Several blocks of queries and of resident keys; block sizes that divide nothing.
    "tpu": Backend(
        functools.partial(by_tpu_kernels, blocks=BLOCKS),
        (
            CASES[0],
            Case(90, 33, 20, 64, 96, "row_max", causal=False),
            Case(300, 140, 52, 64, 64, "row_max"),
            Case(96, 32, 0, 64, 128, "lse"),
            Case(100, 24, 70, 64, 256, "none", earlier=48),
            Case(52, 40, 56, 64, 512, "lse", earlier=40),
        ),
    ),
    "tpu, its own blocks": Backend(
        functools.partial(by_tpu_kernels, blocks=tpu.Blocks()), (Case(50, 64, 16, 128, 128, "none"),)
    ),
    "over devices": Backend(
        over_devices,
        (Case(96, 24, 20, 24, 32, "row_max", earlier=None), Case(96, 24, 0, 24, 32, "lse", earlier=None)),
        devices=2,
        stateful=False,
    ),
}


def parameters():
    """The first case in float32 and the second in bfloat16 for ``make test``; all others for ``make test-all``, and the
    scan's in bfloat16, whose precision is in ``test_hybrid_attention.py`` too."""
    for name, backend in BACKENDS.items():
        for number, _ in enumerate(backend.cases):
            for dtype in TOLERANCES:
                small = (number, dtype) in ((0, "float32"), (1, "bfloat16"))
                if name == "tpu, its own blocks" or (name == "scan" and number) or not small:
                    yield tiers.full(name, number, dtype)
                else:
                    yield name, number, dtype


def measure_over_devices() -> dict[str, list[float]]:
    """In a process of several devices: by number and type of a case of the tier, the errors."""
    backend = BACKENDS["over devices"]
    cases = tiers.chosen([(0, "float32"), (1, "bfloat16"), (0, "bfloat16"), (1, "float32")], test=2)
    with jax.set_mesh(MeshConfig(context=backend.devices).make(jax.devices()[: backend.devices])):
        return {f"{number} {dtype}": errors(backend, backend.cases[number], dtype) for number, dtype in cases}


@pytest.fixture(scope="module")
def measured_over_devices():
    return on_devices("test_backends", "measure_over_devices", devices=BACKENDS["over devices"].devices)


@pytest.mark.parametrize(("name", "number", "dtype"), list(parameters()))
def test_output_state_and_gradients(name, number, dtype, request):
    """To the contract's figures, of the root mean square, against float64 of the same rounded inputs."""
    backend = BACKENDS[name]
    if backend.devices:
        found = request.getfixturevalue("measured_over_devices")[f"{number} {dtype}"]
    else:
        found = errors(backend, backend.cases[number], dtype)
    assert len(found) >= 6  # the output, and gradients to q, k, v and both features
    assert max(found) <= TOLERANCES[dtype], found


#: Scores in powers of two of the six blocks of 32 keys, the last two of the overlap: what grows by less than a lag, by
#: more, and by so much that nothing of before counts; late, early, after all, and between.
GROWTHS = {
    "late": [0, 40, 80, 120, 160, 200],
    "early": [200, 80, 40, 20, 0, 0],
    "small": [0, 5, 10, 15, 20, 25],
    "at the end": [0, 0, 0, 0, 5, 200],
    "far, then a little": [0, 140, 145, 150, 0, 157],
}


@pytest.mark.full
def test_maxima_that_grow_over_the_blocks_of_the_tpu_kernel():
    """Against the equation in float64; half of the queries have the scores with the other sign, and the unseen half of
    the overlap, in a block that is masked, larger scores than any. Float32 rounds scores of 200 to 2e-5, and has
    no weight of 2¹²⁸."""
    case = Case(128, 128, 64, 64, 32, "row_max", earlier=48)
    (q, k, v, features_q, features_k), state, decay = inputs(case, "float32")
    sign = jnp.where(jnp.arange(128) % 2, 1.0, -1.0)[None, :, None]
    q = q.at[..., 0].set(sign * 64**0.5 * math.log(2))
    run = jax.jit(lambda *given: by_tpu_kernels(case, *given, decay, blocks=BLOCKS)[0])
    wide = jax.jit(functools.partial(by_name, "reference", case))
    for name, levels in GROWTHS.items():
        own, past = (jnp.repeat(jnp.asarray(x, jnp.float32), 32) for x in (levels[:4], levels[4:]))
        # The past's last 48 places hold a token.
        past = jnp.where(jnp.arange(64) < 16, 500.0, past)
        arrays = [q, k.at[..., 0].set(own[None, :, None]), v, features_q, features_k]
        given = state._replace(k=state.k.at[..., 0].set(past[None, :, None]))
        found = np.asarray(run(arrays, given[:5]), np.float64)
        with jax.enable_x64(True):
            as64 = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), (arrays, given[:5], decay))
            exact = np.asarray(wide(*as64)[0])
        assert np.linalg.norm(found - exact) <= 1e-4 * np.linalg.norm(exact), name

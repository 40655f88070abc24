"""Time cut over devices: one function and one gradient with the uncut, and what goes between the devices for it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared import tiers
from shared.devices import on_devices

from rehyat_jax.attention.api import hybrid_attention
from rehyat_jax.attention.sharded import hybrid_over_devices, softmax_over_devices
from rehyat_jax.attention.softmax import softmax_attention
from rehyat_jax.runtime.mesh_config import MeshConfig

CHUNK = 3
#: Devices along time; overlap in tokens, up to more than two devices have; stabiliser; decay.
CASES = [
    (2, 2, "row_max", False),
    (4, 3, "lse", True),
    (4, 0, "row_max", True),
    (8, 2, "none", False),
    (8, 14, "row_max", True),
]


#: Of softmax attention.
SOFTMAX_DEVICES = (2, 4, 8)


def _inputs(tokens: int, heads: int = 3):
    rng = np.random.default_rng(0)
    sizes = (4, 4, 4, 6, 6)
    arrays = [jnp.asarray(rng.uniform(size=(2, tokens, heads, width)), jnp.float32) for width in sizes]
    return *arrays, jnp.asarray(rng.uniform(0.5, 1, size=heads), jnp.float32)


def _apart(a, b) -> float:
    """Largest difference, as a share of the largest value."""
    return max(
        float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(x)))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def _with_gradient(function, arrays, mesh=None):
    def loss(*arrays):
        y = function(*arrays)
        return jnp.sum(jnp.sin(y)), y

    def run():
        gradient = jax.value_and_grad(loss, argnums=tuple(range(len(arrays))), has_aux=True)
        return jax.device_get(jax.jit(gradient)(*arrays))

    if mesh is None:
        return run()
    with jax.set_mesh(mesh):
        return run()


def hybrid_differences():
    found = []
    for devices, overlap, stabilizer, decays in tiers.chosen(CASES):
        arrays = _inputs(2 * CHUNK * devices)
        options = {
            "chunk": CHUNK,
            "overlap": overlap,
            "causal": True,
            "stabilizer": stabilizer,
            "implementation": "scan",
        }

        def attend(attention, q, k, v, features_q, features_k, decay, options=options, decays=decays):
            return attention(q, k, v, features_q, features_k, decay=decay if decays else None, **options)

        mesh = MeshConfig(context=devices).make(jax.devices()[:devices])
        expected = _with_gradient(lambda *x, attend=attend: attend(hybrid_attention, *x), arrays)
        got = _with_gradient(lambda *x, attend=attend: attend(hybrid_over_devices, *x), arrays, mesh)
        if not decays:  # whose gradient is 0
            expected, got = ((x[0], x[1][:-1]) for x in (expected, got))
        found.append(_apart(expected, got))
    return found


def softmax_differences():
    """Three heads on two, four and eight devices, with padding at the end."""
    found = []
    for devices in tiers.chosen(SOFTMAX_DEVICES):
        arrays, real = _inputs(24)[:3], 21
        mesh = MeshConfig(context=devices).make(jax.devices()[:devices])
        expected = _with_gradient(lambda *x, n=real: softmax_attention(*(a[:, :n] for a in x)), arrays)
        got = _with_gradient(lambda *x, n=real: softmax_over_devices(*x, tokens=n)[:, :n], arrays, mesh)
        found.append(_apart(expected, got))
    return found


def measure():
    return {"hybrid": hybrid_differences(), "softmax": softmax_differences(), "traffic": traffic()}


#: Sizes of the operator whose collectives are counted: no two numbers alike.
TRAFFIC = {"batch": 1, "tokens": 8 * 2 * 5, "heads": 3, "width": 4, "features": 6, "chunk": 5, "overlap": 2}


def traffic():
    """Collectives of the compiled operator and its gradient: kind, and shapes sent."""
    arrays = _inputs(TRAFFIC["tokens"])[:5]
    mesh = MeshConfig(context=8).make()

    def loss(*x):
        return jnp.sum(
            hybrid_over_devices(
                *x,
                chunk=TRAFFIC["chunk"],
                overlap=TRAFFIC["overlap"],
                causal=True,
                stabilizer="row_max",
                implementation="scan",
                decay=None,
            )
        )

    from jax.sharding import NamedSharding

    from rehyat_jax.runtime.mesh import spec

    tokens = NamedSharding(mesh, spec(None, "time", None, None))
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4)), in_shardings=(tokens,) * 5)
        return [list(x) for x in collectives(gradient.lower(*arrays).compile().as_text())]


def collectives(program: str) -> list[tuple[str, str]]:
    """Of a compiled program's text: every collective and its result's type."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return [(kind, shape) for shape, kind in re.findall(rf"= (\S.*?) ({kinds})(?:-start)?\(", program)]


@pytest.fixture(scope="module")
def measured():
    return on_devices("test_context_parallel", "measure")


@pytest.mark.parametrize(
    "case", tiers.breadth(range(len(CASES))), ids=[f"{c[0]} devices, overlap {c[1]}, {c[2]}" for c in CASES]
)
def test_hybrid_attention_is_the_uncut_one(measured, case):
    """Sums over tokens in another order: a few float32 roundings, forward and in every gradient."""
    assert measured["hybrid"][case] <= 1e-5


@pytest.mark.parametrize("case", tiers.breadth(range(3)), ids=["2 devices", "4 devices", "8 devices"])
def test_softmax_attention_is_the_uncut_one(measured, case):
    assert measured["softmax"][case] <= 1e-5


def test_only_overlaps_and_states_travel(measured):
    """Eight devices of ten tokens: permutes of at most the overlap's two tokens or one state, and sums of scalars."""
    overlap = TRAFFIC["overlap"] * TRAFFIC["heads"] * TRAFFIC["features"]
    state = TRAFFIC["heads"] * TRAFFIC["features"] * TRAFFIC["width"]
    sizes = {"collective-permute": 2 * max(overlap, state), "all-reduce": 1}
    assert measured["traffic"]
    for kind, shape in measured["traffic"]:
        numbers = [int(np.prod([int(n) for n in dims.split(",") if n])) for dims in re.findall(r"\[([\d,]*)\]", shape)]
        assert kind in sizes, (kind, shape)
        assert max(numbers) <= sizes[kind], (kind, shape)

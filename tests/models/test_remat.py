"""What a rematerialised block keeps, by the program of a gradient."""

import collections
from typing import get_args

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from benchmarks.tpu_compiled import device
from rehyat_jax.attention.api import hybrid_attention
from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.remat import Keeps, rematerialised
from rehyat_jax.models.wan.transformer import WanTransformer

CONFIG = WanConfig(num_layers=2, num_attention_heads=2, attention_head_dim=16, ffn_dim=48, text_dim=8, freq_dim=16)
#: With weights, in a block's forward pass: four of attention, four of the text's, two of the feed-forward.
PRODUCTS = 10


def every(program):
    """All operations in a program and in what it calls, the kernels' own aside."""
    for equation in program.eqns:
        yield equation
        for part in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns") and equation.primitive.name != "pallas_call":
                yield from every(inner)


def operations(program) -> collections.Counter:
    return collections.Counter(equation.primitive.name for equation in every(program))


def program(keeps, pattern="all"):
    """Of a gradient of the model's."""
    hybrid = HybridConfig(chunk_frames=2, overlap_frames=1, blocks=pattern)
    graph, params = nnx.split(nnx.eval_shape(lambda: WanTransformer(CONFIG, hybrid=hybrid, rngs=nnx.Rngs(0))))
    arrays = [jax.ShapeDtypeStruct(x, jnp.float32) for x in ((2, 6, 4, 4, 16), (2,), (2, 5, 8))]

    def loss(params, *x):
        return jnp.sum(jnp.square(nnx.merge(graph, params)(*x, remat=keeps)))

    return jax.make_jaxpr(jax.grad(loss))(params, *arrays).jaxpr


def test_products_kept_are_not_computed_again():
    """With weights and without a batch; the last one's result is no part of any gradient."""
    products = {keeps: operations(program(keeps))["dot_general"] for keeps in get_args(Keeps)}
    assert products["nothing"] >= products["attention"] >= products["products"] + PRODUCTS - 1


@pytest.mark.parametrize(("pattern", "barriers"), [("all", False), ((1,), True)])
def test_in_a_loop_no_barriers_are_needed(pattern, barriers):
    """Two blocks of one kind are a loop; of two kinds they stand one after the other, and the compiler could take what
    the first pass made for what is to be made again."""
    found = [equation for equation in every(program("attention", pattern)) if "prevent_cse" in equation.params]
    assert {equation.params["prevent_cse"] for equation in found if equation.params["policy"]} == {barriers}


@pytest.mark.full
def test_attention_kept_runs_its_forward_kernel_once():
    """By the program compiled for a TPU that need not be here: what nothing reads is gone."""
    sharding = jax.sharding.SingleDeviceSharding(device("v5e:2x2x1"))
    x, weights = (jax.ShapeDtypeStruct(y, jnp.bfloat16, sharding=sharding) for y in ((1, 768, 2, 128), (4, 128, 128)))

    def kernels(keeps):
        def layer(x, weight):
            features = jax.nn.softplus(x @ weight)
            how = {"chunk": 256, "overlap": 128, "implementation": "pallas"}
            return jnp.tanh(hybrid_attention(jnp.sin(x), x, x, features, features, **how) @ weight)

        def body(x, weight):
            return x + rematerialised(layer, keeps, in_loop=True)(x, weight), None

        def loss(x, weights):
            return jax.lax.scan(body, x, weights)[0].astype(jnp.float32).sum()

        text = jax.jit(jax.grad(loss, (0, 1))).lower(x, weights).compile().as_text()
        return sum("tpu_custom_call" in line and "hybrid_forward" in line for line in text.splitlines())

    assert [kernels(keeps) for keeps in get_args(Keeps)] == [2, 1, 1]

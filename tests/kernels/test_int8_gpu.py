"""Hopper's int8 product: lowered without the device, at a layer's own sizes; what it lacks is named."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from pallas_kernels.gpu import Int8Product
from rehyat_jax.adapters import int8
from rehyat_jax.adapters.linear import Linear
from rehyat_jax.runtime.variables import ScaleParam, kernel


@pytest.mark.parametrize("sizes", [(1536, 8960), (8960, 1536)])
def test_a_layer_in_int8_is_one_kernel_on_hopper(sizes, monkeypatch):
    """With tokens that no block divides; on another platform the same program has XLA's product."""
    monkeypatch.setattr(int8, "device_kind", lambda: "NVIDIA H200")
    monkeypatch.setattr(int8, "whole_on_each_device", lambda: True)
    kinds = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    how = {"kernel_init": nnx.initializers.zeros_init(), "kernel_metadata": kernel("width", "hidden")}
    layer = nnx.eval_shape(lambda: Linear(*sizes, **kinds, **how, rngs=nnx.Rngs(0)))
    layer.kernel.set_value(jax.ShapeDtypeStruct(sizes, jnp.int8))
    layer.scale, layer.rounds_inputs = ScaleParam(jax.ShapeDtypeStruct(sizes[1:], jnp.float32)), True
    graph, weights = nnx.split(layer)
    traced = jax.jit(lambda weights, x: nnx.merge(graph, weights)(x, gelu=True)).trace(
        weights, jax.ShapeDtypeStruct((1, 4680, sizes[0]), jnp.bfloat16)
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    assert "dot_general" not in text
    assert "dot_general" in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_sizes_that_it_lacks_are_named():
    assert Int8Product().lacking(4680, 1536, 8960) is None
    assert Int8Product().lacking(13, 128, 256) == "13 rows: they must be a multiple of 8"
    assert Int8Product().lacking(8, 100, 256) == "100 inputs: they must be a multiple of 128"
    with pytest.raises(NotImplementedError, match="lacks 1000 outputs: they must be a multiple of 256"):
        Int8Product()(
            jnp.zeros((8, 128), jnp.int8),
            jnp.ones(8),
            jnp.zeros((1000, 128), jnp.int8),
            jnp.ones(1000),
            jnp.ones(1000),
            gelu=False,
            dtype=jnp.bfloat16,
        )

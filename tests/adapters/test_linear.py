"""The project's linear layer against ``flax.nnx.Linear``, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from shared.tiers import breadth

from rehyat_jax.adapters.linear import Linear
from rehyat_jax.runtime.variables import axes_of, kernel


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "use_bias"),
    breadth([(jnp.bfloat16, jnp.float32, True), (jnp.float32, jnp.bfloat16, False), (jnp.float16, jnp.float16, True)]),
)
def test_it_is_flax_linear_bit_for_bit(dtype, param_dtype, use_bias):
    kinds = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype}
    kinds |= {"kernel_init": nnx.initializers.xavier_uniform(), "kernel_metadata": kernel("width", "hidden")}
    rngs = nnx.Rngs(3), nnx.Rngs(3)
    ours, theirs = Linear(24, 40, rngs=rngs[0], **kinds), nnx.Linear(24, 40, rngs=rngs[1], **kinds)
    # The same first values, the same paths, and the same values of what is made next.
    ours_flat, theirs_flat = (dict(nnx.to_flat_state(nnx.state(module))) for module in (ours, theirs))
    assert ours_flat.keys() == theirs_flat.keys()
    for path, variable in ours_flat.items():
        np.testing.assert_array_equal(variable.get_value(), theirs_flat[path].get_value())
        assert axes_of(variable) == axes_of(theirs_flat[path])
    assert jax.random.key_data(rngs[0].params()).tolist() == jax.random.key_data(rngs[1].params()).tolist()
    if use_bias:
        ours.bias[...] = theirs.bias[...] = jnp.linspace(-1, 1, 40, dtype=param_dtype)
    x = jax.random.normal(jax.random.key(0), (2, 5, 24), jnp.float32)
    got, wanted = ours(x), theirs(x)
    assert got.dtype == wanted.dtype == dtype
    np.testing.assert_array_equal(got, wanted)

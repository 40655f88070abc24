"""A mean that goes through in parts, over devices or both is the whole batch's: numerators and denominators are summed.

Against the same gradient in float64 on the whole batch, by NumPy.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from shared.devices import on_devices

from rehyat_jax.runtime.devices import Devices
from rehyat_jax.runtime.mesh_config import MeshConfig
from rehyat_jax.runtime.variables import kernel
from train.engine.gradients import gradients_of, means_of
from train.stages.flow import Batch, flow_loss

#: data, fsdp, context, tensor.
MESHES = [(4, 1, 1, 1), (1, 4, 1, 1), (2, 1, 2, 1)]
#: Of the second mean, whose rows all count the same, beside the first.
_SECOND = 0.3


def _batch() -> Batch:
    """Clips whose frames count more and more seldom: no two parts of the batch count the same."""
    rng = np.random.default_rng(0)
    noisy, velocity = rng.normal(size=(2, 16, 3, 2, 2, 4)) * np.linspace(1, 4, 16)[:, None, None, None, None]
    weights = rng.random((16, 3)) < np.linspace(0.95, 0.1, 16)[:, None]
    arrays = (noisy, np.zeros(16), np.zeros((16, 1)), velocity, weights)
    return Batch(*(jnp.asarray(x, jnp.float32) for x in arrays))


def _params() -> dict:
    return {
        "w": nnx.Param(jnp.asarray(np.random.default_rng(1).normal(size=(4, 4)), jnp.float32), **kernel("width", None))
    }


def _loss(params, batch):
    velocity = batch.noisy @ params["w"][...]
    return {
        "loss": flow_loss(velocity, batch.velocity, batch.weights),
        "second": flow_loss(velocity, jnp.zeros_like(velocity), weight=_SECOND),
        "logged": flow_loss(velocity, batch.velocity, 1 - batch.weights, weight=0.0),
    }


def _exact() -> tuple[np.ndarray, dict[str, float]]:
    """The gradient and the means in float64."""
    x, _, _, target, weights = (np.asarray(a, np.float64) for a in _batch())
    y = x @ np.asarray(_params()["w"][...], np.float64)

    def over(weights):
        return weights[:, :, None, None, None] / weights.sum() / 16  # 2 x 2 x 4 values of a frame

    even = np.ones_like(weights)
    slope = 2 * over(weights) * (y - target) + _SECOND * 2 * over(even) * y
    values = {
        "loss": np.sum(over(weights) * np.square(y - target)),
        "second": np.sum(over(even) * np.square(y)),
        "logged": np.sum(over(1 - weights) * np.square(y - target)),
    }
    return np.einsum("btxyi,btxyo->io", x, slope), values


def _apart(parts: int, devices: Devices) -> float:
    """The largest difference of the gradient and the means, as a share of the largest number."""
    params, batch = devices.parameters(_params()), devices.batch(_batch(), _batch())
    out = None if devices.mesh is None else (devices.parameter_shardings(params), devices.replicated)
    program = devices.lower(lambda p, b: gradients_of(_loss, p, b, parts=parts), params, batch, out=out).compile()
    gradients, values = jax.device_get(program(params, batch))
    gradient, means = _exact()
    apart = [np.abs(gradients["w"][...] - gradient).max() / np.abs(gradient).max()]
    return max(apart + [abs(values[name] / mean - 1) for name, mean in means.items()])


def measure() -> list[list[float]]:
    found = []
    for sizes in MESHES:
        mesh = MeshConfig(**dict(zip(("data", "fsdp", "context", "tensor"), sizes, strict=True))).make()
        found.append([float(_apart(parts, Devices(mesh))) for parts in (1, 2, 4)])
    return found


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_accumulated_parts_are_the_batch(parts):
    """float32: 2e-6, some roundings of sums of 768 numbers."""
    assert _apart(parts, Devices(None)) <= 2e-6


@pytest.mark.full
def test_parts_on_meshes_are_the_batch():
    assert np.max(on_devices("test_means_in_parts", "measure", devices=4)) <= 2e-6


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_a_measured_mean_is_the_batchs(parts):
    found = jax.jit(lambda batch: means_of(lambda part: _loss(_params(), part), batch, parts=parts))(_batch())
    for name, value in _exact()[1].items():
        assert abs(float(found[name]) / value - 1) <= 2e-6


def test_nothing_that_counts_is_a_mean_of_0_and_no_gradient():
    batch = _batch()._replace(weights=jnp.zeros((16, 3)))
    gradients, values = gradients_of(lambda p, b: {"loss": _loss(p, b)["loss"]}, _params(), batch, parts=2)
    assert float(values["loss"]) == 0
    assert not np.any(gradients["w"][...])

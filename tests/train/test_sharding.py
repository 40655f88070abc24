"""Every rule set on eight virtual devices: the loss and the gradients of one device; and meshes that do not fit."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from shared.devices import largest_difference, on_devices

from rehyat_jax.errors import ConfigError
from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.sharding import check_mesh
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.runtime.mesh import AXES, spec
from rehyat_jax.runtime.mesh_config import MeshConfig
from rehyat_jax.runtime.sharding import on_mesh, parameter_specs
from train.engine.engine import compile_all
from train.engine.optimizer import OptimizerConfig
from train.stages.flow import flow_loss

WAN = WanConfig(
    num_layers=2,
    num_attention_heads=4,
    attention_head_dim=16,
    ffn_dim=32,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=16,
    patch_size=(1, 2, 2),
)
HYBRID = HybridConfig(chunk_frames=3, overlap_frames=1, decay=True, length_norm=True)
#: data, fsdp, context, tensor; converted blocks; latent frames. Nine frames are three chunks, which two devices fill
#: up with padding.
CASES = [((2, 2, 2, 1), "all", 9), ((1, 2, 2, 2), (0,), 24), ((1, 1, 8, 1), (0,), 24)]


def _names(case) -> str:
    return " x ".join(map(str, case[0])) + f", blocks {case[1]}"


def _model(blocks):
    """Random numbers everywhere, so that no gradient is 0."""
    hybrid = HybridConfig(**{**HYBRID.__dict__, "blocks": blocks})
    graph, params = nnx.split(nnx.eval_shape(lambda: WanTransformer(WAN, hybrid=hybrid, rngs=nnx.Rngs(0))), nnx.Param)
    rng = np.random.default_rng(0)

    def numbers(path, leaf):
        share = leaf.shape[-2] ** -0.5 if "kernel" in str(path) else 0.5
        return jnp.asarray(rng.normal(size=leaf.shape) * share, leaf.dtype)

    return graph, jax.tree_util.tree_map_with_path(numbers, params)


def _batch(frames):
    rng = np.random.default_rng(1)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    sizes = (4 if frames > 9 else 8, frames, 4, 6, 4)
    return normal(*sizes), jnp.linspace(50.0, 950.0, sizes[0]), normal(sizes[0], 5, 16), normal(*sizes)


def _step(graph):
    def loss(params, noisy, timesteps, text, target):
        return flow_loss(nnx.merge(graph, params)(noisy, timesteps, text, remat="nothing"), target).value

    return jax.value_and_grad(loss)


def measure():
    whole = {(blocks, frames): None for _, blocks, frames in CASES}
    programs = compile_all([*(functools.partial(_lower, *case) for case in [((1,) * 4, *w) for w in whole] + CASES)])
    expected = dict(zip(whole, programs, strict=False))
    found = []
    for (_, blocks, frames), program in zip(CASES, programs[len(whole) :], strict=True):
        one, got = (
            jax.device_get(p(*jax.device_put(_arguments(blocks, frames), p.input_shardings[0])))
            for p in (expected[blocks, frames], program)
        )
        found.append(
            {
                "loss": largest_difference(one[0], got[0]),
                "gradient": largest_difference(one[1], got[1], least=1e-3),
                "gathered": re.findall(r"= (\S+) all-gather(?:-start)?\(", program.as_text()),
            }
        )
    return found


def _arguments(blocks, frames):
    return _model(blocks)[1], *_batch(frames)


def _lower(sizes, blocks, frames):
    """Loss and gradients on a mesh."""
    mesh = MeshConfig(**dict(zip(AXES, sizes, strict=True))).make(jax.devices()[: math.prod(sizes)])
    params, *batch = _arguments(blocks, frames)
    cut = on_mesh(mesh, parameter_specs(params))
    with jax.set_mesh(mesh):
        return jax.jit(
            _step(_model(blocks)[0]),
            in_shardings=(cut, *on_mesh(mesh, [spec("batch", *[None] * (x.ndim - 1)) for x in batch])),
            out_shardings=(None, cut),
        ).lower(params, *batch)


@pytest.fixture(scope="module")
def measured():
    return on_devices("test_sharding", "measure")


@pytest.mark.parametrize("case", range(len(CASES)), ids=[_names(case) for case in CASES])
@pytest.mark.full
def test_loss_and_gradients_of_one_device(measured, case):
    """Sums in another order: some float32 roundings."""
    assert measured[case]["loss"] <= 1e-5
    assert measured[case]["gradient"] <= 1e-5


@pytest.mark.full
def test_converted_blocks_gather_weights_alone(measured):
    """Of the model cut into two pieces of time: nothing gathered has time's 12 frames (padded) or 72 tokens."""
    shapes = [shape.split("[")[1].split("]")[0] for shape in measured[0]["gathered"]]
    gathered = [[int(n) for n in shape.split(",")] for shape in shapes]
    assert [64, 64] in gathered
    assert not [shape for shape in gathered if {9, 12, 72} & set(shape)]


@pytest.mark.parametrize("config", [WanConfig.t2v_1_3b(), WanConfig.t2v_14b()], ids=["1.3B", "14B"])
def test_all_but_two_thousandths_of_a_training_state_are_cut(config):
    """Parameters, moving average and moments, for both optimisers."""
    model = nnx.eval_shape(lambda: WanTransformer(config, hybrid=HybridConfig(), rngs=nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    for method in ("adamw", "muon"):
        state = jax.eval_shape(OptimizerConfig(method=method).init, params)
        whole = _bytes(state, whole_alone=True)
        assert whole < 2e-3 * _bytes(state)


def _bytes(tree, *, whole_alone=False) -> int:
    specs = jax.tree.leaves(parameter_specs(tree), is_leaf=lambda s: isinstance(s, PartitionSpec))
    leaves = zip(jax.tree.leaves(tree), specs, strict=True)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x, s in leaves if not (whole_alone and any(s)))


@pytest.mark.parametrize(
    ("devices", "batch", "expected"),
    [
        (8, None, (1, 8, 1, 1)),
        (64, None, (1, 64, 1, 1)),
        (256, None, (1, 256, 1, 1)),
        (512, None, (2, 256, 1, 1)),
        (64, 32, (1, 32, 2, 1)),
        (512, 128, (2, 64, 4, 1)),
    ],
)
@pytest.mark.parametrize("config", [WanConfig.t2v_1_3b(), WanConfig.t2v_14b()], ids=["1.3B", "14B"])
def test_default_meshes_fit_both_models(config, devices, batch, expected):
    mesh = MeshConfig.for_devices(devices, chunks=7, batch=batch)
    assert mesh.sizes(devices) == expected
    sizes = dict(zip(AXES, expected, strict=True))
    check_mesh(sizes, config, hybrid=HybridConfig(), batch=batch or devices, latent_frames=21)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"tensor": 8}, "12 heads do not divide by tensor = 8"),
        ({"fsdp": 5, "tensor": 1}, "1536 channels do not divide by fsdp x context = 5"),
        ({"fsdp": 16, "data": 2}, "16 clips of a batch do not divide by data x fsdp = 32"),
        ({"context": 8}, "21 latent frames cannot be cut by context = 8"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model(sizes, said):
    mesh = {axis: sizes.get(axis, 1) for axis in AXES}
    with pytest.raises(ConfigError, match=said):
        check_mesh(mesh, WanConfig.t2v_1_3b(), hybrid=HybridConfig(), batch=16, latent_frames=21)


def test_a_mesh_that_does_not_divide_the_devices():
    with pytest.raises(ConfigError, match="data 3, fsdp the rest, context 1 and tensor 1 does not divide 8 devices"):
        MeshConfig(data=3).sizes(8)
    with pytest.raises(ConfigError, match="fsdp 2, context 2 and tensor 1 does not divide 8 devices"):
        MeshConfig(fsdp=2, context=2).sizes(8)
    with pytest.raises(ConfigError, match="64 devices cannot share 4 clips of 7 chunks"):
        MeshConfig.for_devices(64, chunks=7, batch=4)
    with pytest.raises(ConfigError, match="the mesh's tensor must be at least 1"):
        MeshConfig(tensor=0)

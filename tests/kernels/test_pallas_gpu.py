"""The GPU path beside its parity (tests/attention/test_backends.py): parts of its backward, feature maps, lowering."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from shared import tiers
from shared.attention import TRITON, Case, by_gpu_kernels, inputs
from shared.devices import on_devices

from pallas_kernels import gpu
from pallas_kernels.gpu import CudnnBackward, FeatureKernels, Layers, TritonKernels, cudnn, feature_map
from pallas_kernels.gpu.hybrid import _states
from pallas_kernels.gpu.windows import Windows, attend
from rehyat_jax import hybrid_attention
from rehyat_jax.attention import features
from rehyat_jax.attention.features import FeatureMap
from rehyat_jax.attention.sharded import hybrid_over_devices
from rehyat_jax.runtime.mesh_config import MeshConfig


@dataclasses.dataclass(frozen=True)
class Backward:
    """A kernel's forward and another's backward."""

    backward_kernels: CudnnBackward | TritonKernels

    def forward(self, *arguments):
        return TRITON.forward(*arguments)

    def backward(self, *arguments):
        return self.backward_kernels.backward(*arguments)


def dense_backward(q, k, v, rows, y, d_y):
    """What cuDNN is asked for, as its documentation has it."""
    q, k, v, y, d_y = (x.astype(jnp.float32) for x in (q, k, v, y, d_y))
    p = jnp.exp(jnp.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[3] ** -0.5 - rows[..., None])
    d_p = jnp.einsum("bnhd,bmhd->bhnm", d_y, v) - jnp.einsum("bnhd,bnhd->bhn", d_y, y)[..., None]
    d_scores = p * d_p * q.shape[3] ** -0.5
    dq, dk = jnp.einsum("bhnm,bmhd->bnhd", d_scores, k), jnp.einsum("bhnm,bnhd->bmhd", d_scores, q)
    return tuple(x.astype(jnp.bfloat16) for x in (dq, dk, jnp.einsum("bhnm,bnhd->bmhd", p, d_y)))


@pytest.mark.parametrize(
    ("by", "length", "chunk", "overlap", "calls", "stabilizer", "sign"),
    [
        ("cudnn", 100, 32, 12, 3, "lse", 1),
        tiers.full("cudnn", 96, 32, 12, 2, "row_max", 1),
        tiers.full("cudnn", 100, 32, 0, 2, "none", 1),
        tiers.full("cudnn", 100, 24, 70, 5, "none", -1),
        tiers.full("cudnn", 60, 64, 8, 1, "row_max", 1),
        ("triton", 100, 32, 12, 0, "row_max", 1),
        tiers.full("triton", 100, 32, 12, 0, "none", -1),
    ],
)
def test_windows_and_linear_part_as_one(by, length, chunk, overlap, calls, stabilizer, sign, monkeypatch):
    """Gradients to q, k, v, a and n as of the formula in float64; the linear part empty for the first chunk, and of a
    negative normaliser too. Of cuDNN's backward the calls' cuts and sums: its kernel is stood in for."""
    called = []

    def stand_in(*arguments):
        called.append(arguments)
        return dense_backward(*arguments)

    monkeypatch.setattr(cudnn, "attention_backward", stand_in)
    kernels = Backward(CudnnBackward(otherwise=TRITON) if by == "cudnn" else TRITON)
    windows = Windows(chunk=chunk, overlap=overlap, past=0, length=length)
    rng = np.random.default_rng(length)
    q, k, v, a, d_y = (jnp.asarray(rng.normal(size=(2, length, 2, 16)), jnp.bfloat16) for _ in range(5))
    token = np.arange(length)
    first = token // chunk * chunk
    seen = (token[None] >= first[:, None] - overlap) & (token[None] < first[:, None] + chunk)
    heard = jnp.asarray(first > 0)[None, :, None]
    size = sign * (500 if stabilizer == "none" else 1)
    n = jnp.where(heard, jnp.asarray(size * rng.uniform(1, 1.5, size=(2, length, 2)), jnp.float32), 0.0)
    a = jnp.where(heard[..., None], a * size, jnp.zeros_like(a))

    def exact(q, k, v, a, n):
        scores = jnp.where(jnp.asarray(seen), jnp.einsum("bnhd,bmhd->bnhm", q, k).swapaxes(1, 2) * 0.25, -jnp.inf)
        top, total = jnp.max(scores, axis=3), jax.nn.logsumexp(scores, axis=3)
        c = jax.lax.stop_gradient({"row_max": top, "lse": total, "none": jnp.zeros_like(top)}[stabilizer])
        weight = jnp.exp(c).swapaxes(1, 2)
        sums = jnp.einsum("bhnm,bmhd->bnhd", jnp.exp(scores), v) + weight[..., None] * a
        return sums / (jnp.exp(total).swapaxes(1, 2) + weight * n)[..., None]

    def ours(q, k, v, a, n):
        return attend(kernels, windows, stabilizer, q, k, v, jnp.zeros((), jnp.int32), a, n)

    y, back = jax.vjp(ours, q, k, v, a, n)
    found = y, *back(d_y)
    assert len(called) == calls
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in (q, k, v, a, n, d_y)]
        expected, back = jax.vjp(exact, *wide[:5])
        expected = expected, *back(wide[5])
    for x, z in zip(found, jax.device_get(expected), strict=True):
        assert np.linalg.norm(np.asarray(x, np.float64) - z) <= 1e-2 * np.linalg.norm(z), x.shape


def _an_h200():
    """To lower for, without one."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device))


@pytest.mark.parametrize("head_dim", [128, tiers.full(64)])
@pytest.mark.parametrize("begins", [True, False])
def test_lowers_for_an_h200_without_one(head_dim, begins):
    """Forward by Mosaic GPU, backward by cuDNN, of the first chunk and the others, or by Triton's two kernels where
    something came before: past the checks of layouts and types of all."""
    case = Case(1440, 480, 160, head_dim, 64, "row_max", earlier=None if begins else 0)
    arrays, state, _ = jax.eval_shape(lambda: inputs(case, "bfloat16"))
    kernels = gpu.kernels("NVIDIA H200", arrays[0], chunk=case.chunk, overlap=case.overlap)
    assert isinstance(kernels, gpu.HopperKernels)

    def loss(arrays, state):
        return by_gpu_kernels(case, arrays, state, jnp.ones(2), kernels=kernels)[0].astype(jnp.float32).sum()

    with _an_h200():
        lowered = jax.jit(jax.grad(loss)).trace(arrays, state[:5]).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    targets = ("mosaic_gpu_v2", "__cudnn$fmhaSoftmaxBackward", "__gpu$xla.gpu.triton")
    assert [text.count(f"@{target}(") for target in targets] == ([1, 2, 0] if begins else [1, 0, 2])


@pytest.mark.parametrize(
    ("tokens", "chunk", "overlap", "dtype"),
    [
        (1440, 480, 160, "float32"),
        (1440, 200, 80, "bfloat16"),
        (1444, 480, 160, "bfloat16"),
        (1500, 480, 0, "bfloat16"),
        (1440, 480, 164, "bfloat16"),
    ],
)
def test_what_hopper_kernels_lack_goes_to_triton(tokens, chunk, overlap, dtype):
    """Other dtypes, chunks under 256 tokens, also the last, and what is not a multiple of 8."""
    q = jax.ShapeDtypeStruct((1, tokens, 2, 128), dtype)
    assert gpu.HopperKernels().unsupported(q, chunk=chunk, overlap=overlap)
    assert isinstance(gpu.kernels("NVIDIA H200", q, chunk=chunk, overlap=overlap), TritonKernels)


SMALL_MAP = FeatureKernels(tokens=32, hidden=64, columns=32, interpret=True)


def map_and_gradients(phi: FeatureMap, x, weight, d_out):
    """Output of φ, and gradients to inputs, parameters and weights."""
    graph, params = nnx.split(phi)

    @jax.jit
    def both(params, x, weight, d_out):
        y, back = jax.vjp(lambda params, x, weight: nnx.merge(graph, params)(x, weight), params, x, weight)
        return y, back(d_out)

    return both(params, x, weight, d_out)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 1e-2)])
@pytest.mark.parametrize(
    ("head_dim", "degree", "positive", "tokens", "weighted"),
    [
        tiers.full(128, 2, "softplus", 70, True),
        tiers.full(64, 3, "exp", 48, False),
        (16, 1, "softplus", 33, True),
    ],
)
def test_fused_feature_map(head_dim, degree, positive, tokens, weighted, dtype, tolerance, monkeypatch):
    """As the plain formula in float64 of the same rounded inputs, last block of tokens short, with all gradients."""
    phi = FeatureMap(3, head_dim, degree=degree, positive=positive, level=0.5, dtype=dtype, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(tokens)

    def some(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    nnx.update(phi, jax.tree.map(lambda p: (p.astype(dtype) + 0.02 * some(*p.shape)).astype(p.dtype), nnx.state(phi)))
    x, d_out = some(2, tokens, 3, head_dim), some(2, tokens, 3, degree * head_dim)
    weight = jnp.asarray(rng.uniform(0.1, 1, size=(tokens, 3)), jnp.float32) if weighted else None
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), (phi, x, weight, d_out))
        wide[0].dtype = jnp.float64
        for layer in wide[0].layers:
            layer.dtype = jnp.float64
        exact = jax.device_get(map_and_gradients(*wide))
    monkeypatch.setattr(gpu, "feature_kernels", lambda *_, **__: SMALL_MAP)
    monkeypatch.setattr(features, "whole_on_each_device", lambda: True)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *given, cuda, default: cuda(*given))
    found = map_and_gradients(phi, x, weight, d_out)
    assert found[0].dtype == dtype
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert np.linalg.norm(np.asarray(a, np.float64) - b) <= tolerance * np.linalg.norm(b), a.shape


@pytest.mark.parametrize(("head_dim", "degree"), tiers.breadth([(128, 2), (128, 3), (64, 2), (16, 1)]))
def test_feature_map_lowers_for_cuda(head_dim, degree):
    """One kernel forward, at the sizes that are used; the gradients are XLA's."""
    width, heads = head_dim * degree, 12

    def like(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    layers = Layers(like(heads, head_dim, width), like(heads, width), like(heads, width, width), like(heads, width))

    def loss(x, layers):
        return feature_map(FeatureKernels(), degree, "softplus", x, layers, None).astype(jnp.float32).sum()

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    with _an_h200():
        lowered = gradient.trace(like(1, 1000, heads, head_dim), layers).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@__gpu$xla.gpu.triton(") == 1


@pytest.mark.parametrize(
    ("options", "head_dim", "dtype"),
    [
        ({}, 24, "bfloat16"),
        ({}, 128, "float32"),
        ({"degree": 4}, 128, "bfloat16"),
        ({"layers": 3}, 128, "bfloat16"),
        ({"activation": "relu"}, 128, "bfloat16"),
        ({"positive": "none"}, 128, "bfloat16"),
    ],
)
def test_what_feature_kernels_lack_goes_to_xla(options, head_dim, dtype, monkeypatch):
    monkeypatch.setattr(features, "device_kind", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(features, "whole_on_each_device", lambda: True)

    def kernels(head_dim, dtype, **options):
        phi = nnx.eval_shape(lambda: FeatureMap(2, head_dim, **options, dtype=dtype, rngs=nnx.Rngs(0)))
        return phi._kernels(jax.ShapeDtypeStruct((1, 64, 2, head_dim), dtype))

    assert isinstance(kernels(128, "bfloat16"), FeatureKernels)
    assert kernels(head_dim, dtype, **options) is None


def over_devices():
    """On two by two devices by the GPU's path: how far from the reference, and what is kept for the gradient."""
    gpu.kernels = lambda *_, **__: TRITON
    jax.lax.platform_dependent = lambda *given, cuda, **_: cuda(*given)
    rng = np.random.default_rng(0)
    sizes = (16, 16, 16, 32, 32)
    arrays = [jnp.asarray(rng.uniform(0.1, 1, size=(2, 96, 2, width)), jnp.float32) for width in sizes]
    options = {"chunk": 16, "overlap": 8, "causal": True, "stabilizer": "row_max"}

    def loss(attention, implementation, *arrays):
        y = attention(*arrays, **options, implementation=implementation, decay=None)
        return jnp.sum(jnp.sin(y)), y

    def traced(attention, implementation):
        gradient = jax.value_and_grad(functools.partial(loss, attention, implementation), (0, 1, 2, 3, 4), has_aux=True)
        return jax.jit(gradient).trace(*arrays)

    exact = traced(hybrid_attention, "reference").lower().compile()(*arrays)
    with jax.set_mesh(MeshConfig(fsdp=2, context=2).make(jax.devices()[:4])):
        here = traced(hybrid_over_devices, "pallas")
        found = here.lower().compile()(*arrays)
    kept = [var.aval.shape for each in here.jaxpr.eqns if each.primitive.name == "shard_map" for var in each.invars]
    apart = [
        float(np.linalg.norm(x - y) / np.linalg.norm(y))
        for x, y in zip(*(map(np.asarray, jax.tree.leaves(r)) for r in (found, exact)), strict=True)
    ]
    return {"apart": max(apart), "empty": sum(len(shape) > 1 and 0 in shape for shape in kept), "kept": len(kept)}


@pytest.mark.full
def test_over_devices():
    """Empty arrays among a backward ``shard_map``'s arguments end JAX 0.11.2 by a segmentation fault (in Shardy)."""
    found = on_devices("test_pallas_gpu", "over_devices", devices=4)
    assert found["apart"] <= 2e-5
    assert found["kept"] > 10
    assert found["empty"] == 0


@pytest.mark.parametrize("chunks", [1, 2, 3, 4, 7])
def test_sums_make_no_empty_arrays(chunks):
    """Nor their gradients: a scan over layers would compute those once, and give them to its body's ``shard_map``."""

    def loss(first, entering, decay):
        return sum(jnp.sum(x * x) for x in jax.tree.leaves(_states(first, entering, decay)))

    first = jnp.ones((1, 2, 4, 3)), jnp.ones((1, 2, 4))
    entering = jnp.ones((1, 2, chunks, 4, 3)), jnp.ones((1, 2, chunks, 4))
    made = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(first, entering, jnp.ones(2))
    empty = re.findall(r"\w+\[(?:\d+,)*0(?:,\d+)*\]", str(made))
    assert not empty

"""Training on eight virtual devices: a step of one device; a checkpoint on other numbers of them; impossible meshes."""

import dataclasses
import math
import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from shared.devices import largest_difference, on_devices
from shared.training import HYBRID, WAN, distillation, finetuning, random_module

from rehyat_jax.errors import ConfigError
from rehyat_jax.models.wan.config import VAEConfig
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.runtime.devices import Devices
from rehyat_jax.runtime.mesh_config import MeshConfig
from train.data.clips import Bucket
from train.data.pools import Captions, SpriteFeed
from train.data.sources import Source
from train.engine.checkpoint import Checkpoints
from train.engine.gradients import gradients_of
from train.engine.stage import Models
from train.stages.flow import Batch

#: data, fsdp, context, tensor.
MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 2, 2, 2), (2, 1, 4, 1)]
VAE = VAEConfig(
    base_dim=4,
    z_dim=4,
    dim_mult=(1, 1),
    temperal_downsample=(True,),
    num_res_blocks=1,
    latents_mean=(0.0,) * 4,
    latents_std=(1.0,) * 4,
)


def _mesh(sizes) -> MeshConfig:
    return MeshConfig(**dict(zip(("data", "fsdp", "context", "tensor"), sizes, strict=True)))


def _finetuning(**options):
    return finetuning(
        Path("unused"),
        Path("unused"),
        teacher_frames=9,
        buckets=(Bucket(kind="plain", frames=9, batch=16),),
        accumulate=2,
        **options,
    )


def _differences():
    """Of a finetune step with a teacher, in two parts, each frame at its own time and a part of them learned, on each
    mesh: the largest, of the loss and the gradients, from those of one device."""
    student, teacher = (
        random_module(lambda hybrid=hybrid: WanTransformer(WAN, hybrid=hybrid, rngs=nnx.Rngs(0)), seed)
        for seed, hybrid in ((0, HYBRID), (1, None))
    )
    (graph, params), (teacher_graph, frozen) = nnx.split(student, nnx.Param), nnx.split(teacher, nnx.Param)
    frozen, rng = {"teacher": frozen}, np.random.default_rng(0)
    noisy, velocity, text = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((16, 5, 16, 16, 4), (16, 5, 16, 16, 4), (16, 7, 16))
    )
    times, learned = rng.uniform(0, 1000, (16, 5)), rng.random((16, 5)) < 0.7
    batch = Batch(noisy, jnp.asarray(times, jnp.float32), text, velocity, jnp.asarray(learned, jnp.float32))
    training = _finetuning()
    graphs = {"student": graph, "teacher": teacher_graph}

    def step(params, frozen, batch):
        def loss(params, part):
            return training.loss(Models(graphs, params={"student": params}, frozen=frozen), part, longest=5)

        return gradients_of(loss, params, batch, parts=training.accumulate)

    def on(devices):
        arrays = devices.parameters(params), devices.parameters(frozen), devices.batch(batch, batch)
        out = None if devices.mesh is None else (devices.parameter_shardings(params), devices.replicated)
        program = devices.lower(step, *arrays, out=out).compile()
        return jax.device_get(program(*arrays))

    one, found = on(Devices(None)), []
    for sizes in MESHES:
        devices = dataclasses.replace(training, mesh=_mesh(sizes)).devices(VAE, WAN, HYBRID)
        found.append(largest_difference(one, on(devices)))
    return found


def _restored():
    """A checkpoint of a state on eight devices, on one, two and eight: whether it is the same, and how many hold it."""
    params = nnx.state(random_module(lambda: WanTransformer(WAN, hybrid=HYBRID, rngs=nnx.Rngs(0)), 0), nnx.Param)
    optimizer, found = _finetuning().optimizer, []
    eight = Devices(_mesh((1, 4, 2, 1)).make())
    state = eight.made(optimizer.init, eight.parameters(params))
    with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder)) as checkpoints:
        checkpoints.save(8, state)
        for devices in (Devices(None), Devices(MeshConfig(fsdp=2).make(jax.devices()[:2])), eight):
            template = devices.made(optimizer.init, devices.parameters(jax.tree.map(jnp.zeros_like, params)))
            got = checkpoints.restore(template)
            same = jax.tree.map(lambda x, y: bool(np.array_equal(np.asarray(x), np.asarray(y))), got, state)
            placed = max(len(x.sharding.device_set) for x in jax.tree.leaves(got))
            found.append([all(jax.tree.leaves(same)), placed])
    return found


def _said_of_minibatches() -> str:
    """Of trajectories that divide by four devices, in parts that do not."""
    source = Source(frames=9, batch=4)
    try:
        distillation(
            Path("unused"),
            Path("unused"),
            sources=(source,),
            minibatches=4,
            held_out=4,
            guidance_scale=5.0,
            mesh=MeshConfig(fsdp=4, context=2),
        ).devices(WAN, [(5, 16, 16, 4)])
    except ConfigError as error:
        return str(error)
    return ""


def _encoding():
    """A round's clips on four devices: how far from one device's, and a device's operations as a share of its."""
    vae = random_module(lambda: WanVAE(VAE, rngs=nnx.Rngs(0)), 0)
    feed = SpriteFeed(
        Bucket(kind="plain", frames=5, batch=128),
        count=128,
        seed=0,
        vae=vae,
        read=lambda _, tokens: tokens,
        tokens=lambda texts: Captions(*jnp.zeros((2, len(texts), 3), jnp.int32)),
    )

    def on(devices):
        arrays = devices.batch(feed.host_batch(0), feed.host_batch_shapes()), devices.replicate(feed.frozen)
        program = devices.lower(
            lambda host_batch, frozen: feed.pool(host_batch, frozen, None).latents, *arrays
        ).compile()
        turns = re.findall(r'"known_trip_count":\{"n":"(\d+)"\}', program.as_text())
        return np.asarray(program(*arrays)), program.cost_analysis()["flops"] * math.prod(map(int, turns))

    (one, whole), (found, own) = on(Devices(None)), on(Devices(MeshConfig(data=2, fsdp=2).make(jax.devices()[:4])))
    return largest_difference(one, found), own / whole


def _streaming():
    """A chunk of four videos and what it sees of their texts, on eight devices: how far from one device's, and the
    share of the texts that a device has."""
    graph, params = nnx.split(random_module(lambda: WanTransformer(WAN, hybrid=HYBRID, rngs=nnx.Rngs(0)), 0))
    rng = np.random.default_rng(0)
    latents, text = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4, 1, 16, 16, 4), (4, 7, 16)))

    def read(params, text):
        return nnx.merge(graph, params).precompute_text_kv(text)

    def chunk(params, latents, text):
        model = nnx.merge(graph, params)
        return model.stream(latents, jnp.linspace(50.0, 950.0, 4), text, model.init_state(4, 16, 16), first_frame=0)[0]

    def on(devices):
        def run(function, params, *arrays):
            return devices.lower(function, params, *arrays).compile()(params, *arrays)

        given = devices.parameters(params)
        seen = run(read, given, devices.batch(text, text))
        return seen, run(chunk, given, devices.batch(latents, latents), seen)

    one, eight = on(Devices(None)), on(Devices(_mesh((2, 2, 1, 2)).make()))
    apart = largest_difference(*map(jax.device_get, (one, eight)))
    return apart, [math.prod(x.sharding.shard_shape(x.shape)) / x.size for x in jax.tree.leaves(eight[0])]


def measure():
    return {
        "differences": _differences(),
        "restored": _restored(),
        "minibatches": _said_of_minibatches(),
        "encoding": _encoding(),
        "streaming": _streaming(),
    }


@pytest.fixture(scope="module")
def measured():
    return on_devices("test_mesh_training", "measure")


@pytest.mark.parametrize("case", range(len(MESHES)), ids=[" x ".join(map(str, sizes)) for sizes in MESHES])
@pytest.mark.full
def test_a_finetune_step_is_that_of_one_device(measured, case):
    """Sums in another order: a few float32 roundings."""
    assert measured["differences"][case] <= 1e-5


@pytest.mark.full
def test_a_checkpoint_is_restored_on_one_two_and_eight_devices(measured):
    assert measured["restored"] == [[True, 1], [True, 2], [True, 8]]


@pytest.mark.full
def test_a_device_encodes_its_own_clips_alone(measured):
    apart, share = measured["encoding"]
    assert apart <= 1e-5
    assert share == pytest.approx(1 / 4, rel=0.01)


@pytest.mark.full
def test_a_stream_is_that_of_one_device_and_its_texts_are_cut_by_batch_and_heads(measured):
    apart, shares = measured["streaming"]
    assert apart <= 1e-5
    assert shares == [1 / 8, 1 / 8]


@pytest.mark.full
def test_minibatches_that_do_not_divide(measured):
    assert measured["minibatches"] == ("2 points of a minibatch (8 in 4) do not divide by data x fsdp = 4 of the mesh")


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((3, 1, 1, 1), "a mesh of data 3, fsdp 1, context 1 and tensor 1 does not divide 1 devices"),
        ((1, 2, 1, 1), "fsdp 2, context 1 and tensor 1 does not divide 1 devices"),
    ],
)
def test_a_mesh_that_does_not_divide_the_devices(sizes, said):
    with pytest.raises(ConfigError, match=said) as raised:
        _finetuning(mesh=_mesh(sizes)).devices(VAE, WAN, HYBRID)
    assert "\n" not in str(raised.value)
    with pytest.raises(ConfigError, match=said):
        distillation(Path("unused"), Path("unused"), mesh=_mesh(sizes)).devices(WAN, [(5, 16, 16, 4)])

"""Training on own videos, and through the state on clips, on eight virtual devices: one device's, to rounding."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from shared.devices import largest_difference, on_devices
from shared.training import WAN, forcing, random_module

from rehyat_jax.errors import ConfigError
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.runtime.devices import Devices
from rehyat_jax.runtime.mesh_config import MeshConfig
from rehyat_jax.sampling import FlowSchedule
from train.data.clips import Bucket
from train.data.pools import Pool
from train.data.rollouts import Rollouts
from train.engine.gradients import gradients_of
from train.engine.optimizer import OptimizerConfig
from train.engine.stage import Models
from train.stages.aims import aim_mean
from train.stages.forced import ForcedTraining
from train.stages.planned import PlannedFeed
from train.stages.windows import Windows

#: data, fsdp, tensor.
MESHES = [(2, 2, 2), (1, 8, 1)]
SHAPE = (4, 16, 16, 4)


def _models(hybrid):
    made = {
        "student": random_module(lambda: WanTransformer(WAN, hybrid=hybrid, rngs=nnx.Rngs(0)), 0),
        "critic": random_module(lambda: WanTransformer(WAN, rngs=nnx.Rngs(0)), 1),
        "teacher": random_module(lambda: WanTransformer(WAN, rngs=nnx.Rngs(0)), 2),
    }
    parts = {role: nnx.split(model, nnx.Param, ...) for role, model in made.items()}
    graphs = {role: graph for role, (graph, _, _) in parts.items()}
    return made["student"], graphs, {role: params for role, (_, params, _) in parts.items()}


def _on(params, step, *arrays):
    """Of a step from the learners' parameters and rows, on each mesh: the largest difference from one device's."""

    def on(devices):
        rows = [devices.batch(x, jax.eval_shape(lambda x=x: x)) for x in arrays]
        given = devices.parameters(params), *rows
        program = devices.lower(step, *given, out=devices.replicated).compile({"xla_backend_optimization_level": 0})
        return jax.device_get(program(*given))

    one, found = on(Devices(None)), []
    for data, fsdp, tensor in MESHES:
        mesh = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
        found.append(largest_difference(one, on(Devices(mesh.make())), least=1e-3))
    return found


def _own_videos():
    """Rows that go on with a window; the gradients of both learners on it."""
    rollouts = Rollouts(clips=Bucket(kind="plain", frames=7, batch=8), windows=2, given=1)
    training = forcing(Path("unused"), Path("unused"), buckets=(rollouts,), accumulate=1)
    student, graphs, params = _models(training.hybrid)
    feed = PlannedFeed(8, SHAPE, WAN.text_dim, jnp.float32)
    rng = np.random.default_rng(0)
    host_batch = {name: jnp.asarray(rng.normal(size=x.shape), x.dtype) for name, x in feed.host_batch_shapes().items()}
    host_batch["text"] = host_batch["text"].at[:, 3:].set(0)
    feed.frozen = {"empty": jnp.zeros((1, *host_batch["text"].shape[1:]))}
    roller = training.roller(rollouts, FlowSchedule(shift=3.0), shape=SHAPE, chunk=2)
    alone = dataclasses.replace(rollouts, windows=1)
    windows = Windows(training, alone, feed, roller=roller, student=student, place=lambda index: index)
    host = host_batch, jax.random.key(1), np.asarray([0, 0], np.int32)

    def step(params, host_batch, key, numbers):
        models = Models(graphs, params=params)
        batch = windows.draw(models, None, (host_batch, key, numbers), feed.frozen)[1](jnp.int32(0))
        found = {"video": batch.video}
        for role, loss in (("critic", training.critic_loss), ("student", training.student_loss)):

            def of_role(own, part, role=role, loss=loss):
                return loss(models.with_params(role, own), part)

            found[role] = gradients_of(of_role, params[role], batch, parts=1)
        return found

    try:
        dataclasses.replace(training, mesh=MeshConfig(context=8, fsdp=1)).devices(student, [4])
    except ConfigError as error:
        return _on(params, step, *host), str(error)


def _on_clips():
    """A step of consistency on clips, through the state."""
    training = ForcedTraining(
        out=Path("unused"),
        source=Path("unused"),
        hybrid=forcing(Path("unused"), Path("unused")).hybrid,
        buckets=(Bucket(kind="plain", frames=7, batch=8),),
        steps_per_round=1,
        reuse=1,
        dtype="float32",
        optimizer=OptimizerConfig(),
    )
    _, graphs, params = _models(training.hybrid)
    params, graphs = {"student": params["student"]}, {"student": graphs["student"], "guide": graphs["student"]}
    rng = np.random.default_rng(0)
    latents, text = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((8, *SHAPE), (8, 3, WAN.text_dim)))

    def step(params, latents, text, key):
        models = Models(graphs, params=params | {"guide": params["student"]}, averages=params)
        batch = training.batch(Pool(latents, text), jnp.zeros((1, *text.shape[1:])), key)

        def loss(own, part):
            now = models.with_params("student", own)
            aim = jax.tree.map(jax.lax.stop_gradient, training.aim_of(now, part))
            velocity = training.velocity(now["student"], part, part.noisy, part.sigma, part.text)
            return {"loss": aim_mean(velocity, aim)}

        return gradients_of(loss, params["student"], batch, parts=1)

    return _on(params, step, latents, text, jax.random.key(0))


@pytest.mark.full
def test_own_videos_and_their_gradients_are_one_devices() -> None:
    found, said = on_devices("test_forcing_mesh", "_own_videos")
    assert len(found) == len(MESHES)
    assert max(found) < 1e-5
    assert "time cannot be cut over devices" in said


@pytest.mark.full
def test_consistency_through_the_state_is_one_devices() -> None:
    found = on_devices("test_forcing_mesh", "_on_clips")
    assert len(found) == len(MESHES)
    assert max(found) < 1e-5

"""What training takes, by its sizes, against XLA's own account of a step; and a run that is refused before it loads."""

import dataclasses
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from shared.tiers import full
from shared.training import distillation, finetuning, write_teacher

from rehyat_jax.errors import ConfigError
from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.remat import Keeps
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.runtime import memory
from rehyat_jax.runtime.memory import Room
from train.engine.memory import backward_bytes, learner_bytes
from train.engine.optimizer import OptimizerConfig

MODEL = WanConfig(num_layers=6, num_attention_heads=4, attention_head_dim=32, ffn_dim=512, text_dim=64, freq_dim=64)
HYBRID = HybridConfig(chunk_frames=3, overlap_frames=1)


@pytest.mark.parametrize(
    ("hybrid", "remat"),
    [(HYBRID, "nothing"), full(HYBRID, "products"), full(HYBRID, None), full(None, None), full(None, "nothing")],
)
def test_a_step_is_estimated_to_a_factor_of_three(hybrid, remat):
    dtype = "float32"
    module = nnx.eval_shape(lambda: WanTransformer(MODEL, hybrid=hybrid, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))
    graph, params = nnx.split(module)
    optimizer, clips, shape = OptimizerConfig(), 2, (9, 32, 32)

    def step(state, latents, t, text, rate):
        def loss(params):
            velocity = nnx.merge(graph, params)(latents, t, text, text_tokens=512, remat=remat)
            return jnp.mean(jnp.square(velocity.astype(jnp.float32)))

        return optimizer.apply(state, jax.grad(loss)(state.params), rate)

    shapes = [(clips, *shape, 16), (clips,), (clips, 512, MODEL.text_dim), ()]
    state = jax.eval_shape(optimizer.init, params)
    arrays = [jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes]
    found = jax.jit(step, donate_argnums=0).lower(state, *arrays).compile().memory_analysis()
    true = found.temp_size_in_bytes + found.argument_size_in_bytes
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    estimate = learner_bytes(parameters, optimizer)
    estimate += backward_bytes(MODEL, tokens=9 * 16 * 16, clips=clips, dtype=dtype, remat=remat)
    assert 1 / 3 < estimate / true < 3, (estimate, true)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("training", [finetuning, distillation])
def test_a_training_without_room_is_refused_before_it_loads(model, tmp_path, monkeypatch, training):
    run = training(model, tmp_path / "out")
    need = run.memory_need()
    assert need is not None
    room = Room(host=need.on_device + need.host - 1, device=None, shared=True)
    monkeypatch.setattr(memory.Room, "here", classmethod(lambda cls: room))
    monkeypatch.setattr(type(run), "stage", lambda self: pytest.fail("it was begun"))
    with pytest.raises(ConfigError, match=r"its rounds need about .* GB are free: --force goes on all the same"):
        run.run()
    assert not list(tmp_path.iterdir())


def test_what_makes_a_step_smaller_makes_its_estimate_smaller(model, tmp_path):
    run = finetuning(model, tmp_path / "out")

    def bytes_of(**changes: object) -> int:
        need = dataclasses.replace(run, **changes).memory_need()
        return need.on_device

    assert bytes_of(accumulate=2) < bytes_of()
    kept = [bytes_of(remat=True, remat_keeps=keeps) for keeps in get_args(Keeps)]
    assert kept == sorted(set(kept))
    assert kept[-1] < bytes_of()
    assert bytes_of(teacher=None, teacher_weight=0.0) < bytes_of()

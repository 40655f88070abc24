"""The loop beside its steps: updates without finite gradients, schedules, what is logged and at what rate."""

import json
import struct
from io import StringIO
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from rehyat_jax.errors import RehyatError
from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.runtime.variables import kernel
from train.engine import loop
from train.engine.arithmetic import forward_flops
from train.engine.loop import Rhythm, run
from train.engine.optimizer import OptimizerConfig

_TOY = OptimizerConfig(learning_rate=0.05, warmup_steps=0)


def _params():
    return {"kernel": nnx.Param(jnp.arange(6.0).reshape(2, 3), **kernel(None, None)), "bias": nnx.Param(jnp.ones(3))}


def _apply(config: OptimizerConfig):
    return jax.jit(lambda state, gradients: config.apply(state, gradients, jnp.float32(0.05)))


@pytest.mark.parametrize("method", ["adamw", "muon"])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, 1e30])  # 1e60, its square, is beyond float32
def test_a_step_without_finite_gradients_changes_nothing_but_the_counts(method, bad):
    apply = _apply(OptimizerConfig(method=method))
    good = jax.tree.map(jnp.ones_like, _params())
    before = apply(OptimizerConfig(method=method).init(_params()), good)
    after = apply(before, good | {"bias": nnx.Param(jnp.array([0.0, bad, 0.0]))})
    assert [int(x) for x in (after.step, *after.skipped)] == [2, 1, 1]
    chex.assert_trees_all_equal(after[2:], before[2:])
    # As if it had not been, but for the average, which counts steps.
    later, expected = apply(after, good), apply(before, good)
    assert [int(x) for x in (later.step, *later.skipped)] == [3, 1, 0]
    chex.assert_trees_all_equal((later.params, later.optimizer), (expected.params, expected.optimizer))


@pytest.mark.parametrize(("schedule", "halfway", "end"), [("linear", 0.55, 0.1), ("constant", 1.0, 1.0)])
def test_other_schedules(schedule, halfway, end):
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=9, final_share=0.1, schedule=schedule)
    rates = [config.rate(step, 109) for step in (0, 9, 59, 109)]
    np.testing.assert_allclose(rates, [0.1, 1.0, halfway, end], rtol=1e-12)


def _run(folder: Path, *, steps: int, bad=(), most_skipped=20, validate_steps=0, **options):
    """A step a round; those in ``bad`` have no finite gradient."""
    console, step_of = Console(file=StringIO(), width=200), _apply(_TOY)

    def advance(state, step):
        gradients = jax.tree.map(lambda p: jnp.where(step in bad, jnp.nan, 0.1) * p, state.params)
        loss = jnp.where(step in bad, jnp.nan, 1.0 * step)
        return step_of(state, gradients), {"loss": loss[None]}

    state = run(
        _TOY.init(_params()),
        advance,
        Rhythm(
            steps=steps,
            steps_per_advance=1,
            checkpoint_seconds=0.0,
            most_skipped=most_skipped,
            validate_steps=validate_steps,
        ),
        folder=folder,
        console=console,
        **options,
    )
    return state, console.file.getvalue()


def _log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_skipped_steps_are_counted_and_said(tmp_path):
    state, said = _run(tmp_path, steps=6, bad=(1, 2, 4), most_skipped=3)
    assert int(state.skipped.total) == 3
    assert "steps skipped so far, for gradients that are not finite: 3" in said
    assert [entry["skipped"] for entry in _log(tmp_path)] == [0, 1, 2, 2, 3, 3]
    assert [entry["loss"] for entry in _log(tmp_path)] == [0.0, None, None, 3.0, None, 5.0]


def test_too_many_in_a_row_end_the_run(tmp_path):
    with pytest.raises(RehyatError, match=r"the last 2 steps before step 5 had no finite gradients") as raised:
        _run(tmp_path, steps=9, bad=(1, 3, 4, 5), most_skipped=2)
    assert "\n" not in str(raised.value)
    # The count goes on from a checkpoint: one more is enough again.
    with pytest.raises(RehyatError, match="the last 2 steps before step 5"):
        _run(tmp_path, steps=9, bad=(4,), most_skipped=2)


def test_validation_comes_on_its_schedule_and_at_the_end(tmp_path):
    seen = []

    def validate(state, step):
        seen.append((step, int(state.step)))
        return {"validation/loss": 10.0 * step}

    _run(tmp_path, steps=7, validate=validate, validate_steps=3)
    assert seen == [(3, 3), (6, 6), (7, 7)]
    assert [entry.get("validation/loss") for entry in _log(tmp_path)] == [None, None, 30.0, None, None, 60.0, 70.0]


def test_the_rate_in_tflops_and_its_share_of_the_peak(tmp_path, monkeypatch):
    _, said = _run(
        tmp_path / "unknown", steps=2, lines=loop.Lines(work=lambda step: loop.Work(flops=1e12 * (step + 1)))
    )
    assert "the peak arithmetic of a device 'cpu' is not known here: its utilisation is not shown" in said
    assert "TFLOP/s" in said
    for step, entry in enumerate(_log(tmp_path / "unknown")):
        np.testing.assert_allclose(entry["tflops_per_s"], entry["steps_per_s"] * (step + 1), rtol=1e-6)
        assert "utilisation" not in entry
    monkeypatch.setitem(loop.PEAK_TFLOPS, "cpu", 2.0)
    _, said = _run(tmp_path / "known", steps=2, lines=loop.Lines(work=lambda step: loop.Work(flops=1e12)))
    assert "not known" not in said
    assert "% of peak" in said
    for entry in _log(tmp_path / "known"):
        np.testing.assert_allclose(entry["utilisation"], entry["tflops_per_s"] / 2 / jax.device_count(), rtol=1e-6)


def _events(folder: Path) -> list[Event]:
    """Records of TensorFlow's format: a length, its checksum, the record, its checksum."""
    events = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            events.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return events


def test_tensorboard_reads_the_same_numbers(tmp_path):
    _run(tmp_path, steps=3, bad=(1,))
    scalars = [(e.step, v.tag, v.simple_value) for e in _events(tmp_path / "tensorboard") for v in e.summary.value]
    assert [x for x in scalars if x[1] == "loss"] == [(1, "loss", 0.0), (3, "loss", 2.0)]
    assert [x for x in scalars if x[1] == "skipped"] == [(1, "skipped", 0.0), (2, "skipped", 1.0), (3, "skipped", 1.0)]


@pytest.mark.parametrize(
    "hybrid",
    [None, HybridConfig(chunk_frames=5, overlap_frames=0), HybridConfig(kind="linear", chunk_frames=5)],
    ids=["softmax", "hybrid", "linear"],
)
def test_the_arithmetic_is_what_xla_counts(hybrid):
    """One layer and one chunk, so that no loop hides anything; XLA counts element by element work too: 10 % here."""
    config = WanConfig(
        num_layers=1, num_attention_heads=2, attention_head_dim=64, ffn_dim=512, text_dim=128, freq_dim=64
    )
    model = nnx.eval_shape(lambda: WanTransformer(config, hybrid=hybrid, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(model)
    shapes = ((1, 5, 16, 16, 16), (1,), (1, 64, 128))
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    lowered = jax.jit(lambda params, *inputs: nnx.merge(graph, params)(*inputs)).lower(params, *inputs)
    counted = lowered.cost_analysis()["flops"]
    ours = forward_flops(config, hybrid, shape=(5, 16, 16), text_tokens=64)
    assert 1.0 <= counted / ours < 1.1, (counted, ours)

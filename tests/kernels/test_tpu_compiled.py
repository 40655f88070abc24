"""The TPU kernels compiled ahead of time for each generation, whose machines need not be there: tiles, types, VMEM."""

import dataclasses
import functools

import jax
import pytest

from benchmarks import tpu_compiled
from benchmarks.tpu_compiled import GENERATIONS, Shape, compiled
from pallas_kernels.tpu import Blocks

#: Wan-1.3B's chunk and overlap at 480×832: blocks as long as in use. Fewer heads and chunks: the kernels are the same.
SHAPE = Shape(tokens=2 * 4680, heads=2)

device = functools.cache(tpu_compiled.device)


@pytest.mark.full
@pytest.mark.parametrize("generation", GENERATIONS)
def test_forward_and_backward_fit_every_generation(generation):
    program = compiled(device(GENERATIONS[generation].topology), SHAPE, backward=True)
    kernels = program.as_text().count('custom_call_target="tpu_custom_call"')
    assert kernels == 5  # forward, sums, and the backward of softmax, reading and sums
    # No scores: of the pairs of two chunks' queries and keys, in float32, they would take 0.7 GB a head and chunk.
    assert program.memory_analysis().temp_size_in_bytes < 150e6


@pytest.mark.full
@pytest.mark.parametrize(
    "shape",
    [
        Shape(tokens=900, heads=2, head_dim=64, features=512, chunk=400, overlap=0),
        Shape(tokens=300, heads=1, features=64, chunk=70, overlap=200, dtype="float32"),
    ],
    ids=["no overlap, 64, 512", "overlap over chunk, float32"],
)
def test_awkward_shapes_compile(shape):
    compiled(device("v5e:2x2x1"), shape, backward=True)


@pytest.mark.full
def test_a_kernel_over_its_memory_is_refused():
    """What the tests above rely on: 8,192 resident keys and values of 128 need over 4 MiB."""
    blocks = Blocks(vmem=4 << 20)
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        compiled(device("v5e:2x2x1"), dataclasses.replace(SHAPE, heads=1), backward=False, blocks=blocks)


def test_bundles_of_a_schedule(tmp_path):
    """One line before the grid's loop of 4, two in it, and a loop of 3 over keys with its step in two variants of 5."""
    lines = ["     0   :  { }", "   0x1 LB: > { }"]
    lines += [f"   0x{i:x}   : >> {{ }}" for i in range(2, 11)]
    lines += ["   0xb PF: >> { %p = scmp.ge.s32.totalorder %s, 3 /* loop exit test */ }"]
    lines += ["   0xc   : > { %p = scmp.ge.s32.totalorder %s, 4 /* loop exit test */ }"]
    (tmp_path / "17-jvp_hybrid_forward_.1-72-final_bundles.txt").write_text("\n".join(lines))
    (tmp_path / "17-jvp_hybrid_forward_.1-71-schedule-analysis_final_bundles.txt").write_text("Schedule analysis:")
    assert tpu_compiled.scheduled_bundles(tmp_path) == {"hybrid_forward": 1 + 4 * (2 + 3 * 5)}

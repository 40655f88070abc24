"""Plans: a step compiled for a slice that is not there; its program's text, read; what does not fit, refused."""

import re
import subprocess
import sys

import pytest

from rehyat_jax.errors import ConfigError
from rehyat_jax.runtime.hlo import work
from train.cli.plan import main

_CONFIG = """
from pathlib import Path

from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.mixers.config import HybridConfig
from train.stages.finetune import FinetuneTraining
from train.engine.optimizer import OptimizerConfig
from train.data.prepared import PreparedClips
from rehyat_jax.runtime.mesh_config import MeshConfig

config = FinetuneTraining(
    out=Path("out"), source=Path("nowhere"), hybrid=HybridConfig(), steps_per_round=1, reuse=1, remat=True,
    model=WanConfig(num_layers=2, num_attention_heads=2, attention_head_dim=128, ffn_dim=512),
    optimizer=OptimizerConfig(method="adamw"),
    buckets=(PreparedClips(folder=Path("nowhere"), frames=25, batch=8),), mesh=MeshConfig(automatic=True),
)
"""

#: Four devices; a loop of three turns that gathers 4 KiB, with a fusion of 1,000 cycles beside it; one all-reduce.
_PROGRAM = """HloModule jit_step, entry_computation_layout={()->()}

%body.1 (p: (s32[], bf16[512,4])) -> (s32[], bf16[512,4]) {
  %start.1 = f32[8]{0} parameter(0)
  %async-collective-start.1 = (f32[256]{0}, u32[]) fusion(%start.1), kind=kCustom, calls=%fused.1
  %fusion.2 = f32[8]{0} fusion(%start.1), kind=kLoop, calls=%async_collective_fusion.2, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %async-collective-done.1 = f32[1024]{0} fusion(%start.1), kind=kCustom, calls=%fused.3
}

%fused.1 (q: f32[256]) -> f32[1024] {
  ROOT %all-gather.1 = f32[1024]{0} all-gather(%q), replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={0}
}

%async_collective_fusion.2 (q: f32[256]) -> f32[1024] {
  ROOT %all-gather.2 = f32[1024]{0} all-gather(%q), replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={0}
}

%fused.3 (q: f32[256]) -> f32[1024] {
  ROOT %all-gather.3 = f32[1024]{0} all-gather(%q), replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={0}
}

%condition.1 (p: (s32[], bf16[512,4])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(3)
  ROOT %lt.1 = pred[]{:T(512)} compare(%p, %constant.1), direction=LT
}

%all-reduce-scatter.1 (q: bf16[64]) -> bf16[16] {
  ROOT %all-reduce.9 = bf16[64]{0} all-reduce(%q), replica_groups={{0,1,2,3}}, to_apply=%add
}

ENTRY %main.1 (x: f32[8]) -> f32[8] {
  %while.1 = (s32[], bf16[512,4]) while(%x), condition=%condition.1, body=%body.1
  %all-reduce.1 = (f32[100]{0}, bf16[10]{0}) all-reduce(%x, %x), replica_groups={{0,1},{2,3}}, to_apply=%add
  %fusion.3 = bf16[16]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %kernel.1 = bf16[16]{0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"500"}}
  ROOT %collective-permute-start.1 = (f32[32]{0}, f32[32]{0}) collective-permute-start(%x), source_target_pairs={{0,1}}
}
"""  # noqa: E501


def test_a_programs_text():
    """A device receives three quarters of what four gather, thrice; all of a sum twice but its own half, of two."""
    found = work(_PROGRAM, devices=4)
    assert found.cycles == 3000
    assert found.kernel_flops == 500
    assert found.bytes_by_kind() == {
        "all-gather": 3 * 4096 * 0.75,
        "all-reduce": 2 * 420 * 0.5,
        "reduce-scatter": 128 * 0.75,
        "collective-permute": 128.0,
    }
    assert [(c.kind, c.group, c.overlaps) for c in found.collectives] == [
        ("all-gather", 4, True),
        ("all-reduce", 2, False),
        ("reduce-scatter", 4, False),
        ("collective-permute", 2, True),
    ]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(_CONFIG)
    return str(path)


def _plan(*argv: str) -> subprocess.CompletedProcess[str]:
    """As the command does it."""
    program = "import sys; from rehyat_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", program, "plan", *argv], capture_output=True, text=True)


@pytest.mark.full
def test_a_step_for_eight_chips(config):
    done = _plan(config, "--topology", "v5e:2x4", "--size", "128x128")
    assert done.returncode == 0, done.stderr
    said = done.stdout
    for words in (
        "8 clips of 25 frames: 8 chips, fsdp 8",
        "GiB: state and batch",
        "all-gather",
        "kernels",
        "% of 197",
        "--remat-keeps products is the most that fits",
    ):
        assert words in said, said


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--topology", "v9z:2x4"], "v9z:2x4 is no slice"),
        (["--topology", "v5e"], "named as v5e:16x16"),
        (["--topology", "v5e:2x4", "--size", "wide"], "width x height"),
        (["--topology", "v5e:2x4", "--size", "100x100"], "do not fit the VAE"),
        (["--topology", "v5e:2x4", "--batch", "1"], "cannot share 1 clips"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(config, given, words):
    with pytest.raises(ConfigError, match=words) as raised:
        main([config, *given])
    assert "\n" not in str(raised.value)


@pytest.mark.full
def test_what_does_not_fit_is_refused_and_its_largest_arrays_named(config):
    """256 clips of 12,285 tokens on four chips: 1.5 GiB each in the smallest array of all tokens."""
    done = _plan(config, "--topology", "v5e:2x2", "--batch", "256", "--frames", "41", "--remat-keeps", "nothing")
    assert done.returncode == 2, done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(r"it does not fit: \S+ of \S+ a chip .* the largest arrays .* are \w+\[[\d,]+\] [\d.]+ GiB;", last)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--model", "nobody"], "--model must be one of wan_1_3b"),
        (["--size", "100x64"], "--size must be multiples of 16 and 16"),
        (["--frames", "80"], "--frames must be 4k . 1"),
        (["--sweep", "per-chunk", "--hybrid", "none"], "the softmax teacher cannot stream"),
        (["--steps", "0"], "--steps must be 1 to 1000"),
        (["--vae-tile", "20"], "--vae-tile must be a multiple of 32 pixels"),
        (["--vae-tile", "32", "--vae-devices", "2"], "give one of them"),
        (["--vae-devices", "4"], "vae_devices 4 beside the transformer's one are 5 devices, and there are 4"),
    ],
)
def test_impossible_plans_of_generation_are_sentences(asked, said):
    with pytest.raises(ConfigError, match=said):
        main(["generate", "--topology", "v5e:2x2", *asked])


@pytest.mark.full
@pytest.mark.parametrize("sweep", ["per-step", "per-chunk"])
def test_a_plan_of_generation(sweep, capsys):
    """Four chips, of which a stream's are by heads; what a small model's weights and decoder take of a chip."""
    asked = ["--model", "mini_sprites", "--topology", "v5e:2x2", "--size", "64x64", "--frames", "33", "--steps", "4"]
    tiled = ["--vae-tile", "32"] if sweep == "per-chunk" else []
    assert main(["generate", *asked, "--sweep", sweep, *tiled]) == 0
    said = capsys.readouterr().out
    assert ("tensor 4" if sweep == "per-chunk" else "fsdp 2 x context 2") in said
    assert re.search(r"memory a chip   0\.\d\d of 15\.75 GiB", said)
    assert ("a stream        first frame after" if sweep == "per-chunk" else "a video         ") in said

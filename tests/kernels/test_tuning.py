"""Tables of block sizes: what is read, refused, used by each platform's kernels, and found by the command."""

import json

import jax
import pytest

from benchmarks import tune
from pallas_kernels import gpu, tpu
from pallas_kernels.gpu import CudnnBackward, FeatureKernels, HopperKernels, TritonKernels
from pallas_kernels.tpu import Blocks, blocks

H100 = "NVIDIA H100 80GB HBM3"
ENTRY = {"kernel": "HopperKernels", "device_kind": H100, "dtype": "bfloat16", "head_dim": 128}
ENTRIES = [
    {**ENTRY, "blocks": {"keys": 64, "stages": 4}},
    {**ENTRY, "kernel": "TritonKernels", "blocks": {"queries": 64}},
    {**ENTRY, "kernel": "FeatureKernels", "features": 256, "blocks": {"tokens": 64, "warps": 4}},
]


def table_of(path, entries, like=gpu.TABLE):
    path.write_text(json.dumps(entries))
    return like.at(path)


def like(tokens, *, head_dim=128, dtype="bfloat16"):
    return jax.ShapeDtypeStruct((1, tokens, 2, head_dim), dtype)


@pytest.mark.parametrize("table", [gpu.TABLE, tpu.TABLE], ids=["gpu", "tpu"])
def test_shipped_tables_are_well_formed(table):
    assert table.at(table.path).text() == table.path.read_text()


def test_found_and_outside_the_table(tmp_path):
    table = table_of(tmp_path / "tuning.json", ENTRIES)
    wanted = {"kernels": HopperKernels, "device_kind": H100, "dtype": "bfloat16", "head_dim": 128}
    # What a kernel's blocks do not depend on may be named.
    assert table.blocks(**wanted, features=256) == {"keys": 64, "stages": 4}
    for other in ({"device_kind": "NVIDIA H100 PCIe"}, {"dtype": "float16"}, {"head_dim": 64}):
        assert table.blocks(**{**wanted, **other}) == {}
    assert table_of(tmp_path / "again.json", json.loads(table.text())).entries == table.entries


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({}, "not a list"),
        ([1], "entry 1 is not an object"),
        ([{**ENTRIES[0], "kernel": "Blocks"}], "is of no kernel of HopperKernels, FeatureKernels, TritonKernels"),
        ([{**ENTRIES[0], "chunk": 4680}], "nothing else"),
        ([{**ENTRIES[2], "kernel": "HopperKernels"}], "nothing else"),
        ([ENTRY], "and blocks"),
        ([{**ENTRIES[0], "head_dim": "128"}], "widths that are positive"),
        ([{**ENTRIES[0], "dtype": "bf16"}], "dtype"),
        ([{**ENTRIES[0], "blocks": {}}], "must have blocks of queries, keys, stages"),
        ([{**ENTRIES[0], "blocks": {"key": 64}}], "must have blocks of queries, keys, stages"),
        ([{**ENTRIES[0], "blocks": {"backward_kernels": 1}}], "must have blocks of queries, keys, stages"),
        ([{**ENTRIES[1], "blocks": {"interpret": 1}}], "queries_backward, keys_backward, and no others"),
        ([{**ENTRIES[0], "blocks": {"keys": 64.0}}], "not a positive integer"),
        ([{**ENTRIES[0], "blocks": {"keys": True}}], "not a positive integer"),
        ([ENTRIES[1], ENTRIES[0], ENTRIES[1]], "entry 3 is there twice"),
    ],
)
def test_what_is_no_table_is_refused(entries, said, tmp_path):
    table = table_of(tmp_path / "tuning.json", entries)
    with pytest.raises(ValueError, match=said) as refused:
        table.blocks(HopperKernels, H100, "bfloat16", head_dim=128)
    assert str(table.path) in str(refused.value)


def test_what_is_no_json_is_refused(tmp_path):
    (tmp_path / "tuning.json").write_text("[")
    with pytest.raises(ValueError, match="not JSON"):
        gpu.TABLE.at(tmp_path / "tuning.json").text()


def test_gpu_kernels_are_tuned(tmp_path, monkeypatch):
    """The windows' of both kinds, one within the other; the default blocks where the table's lack something."""
    monkeypatch.setattr(gpu, "TABLE", table_of(tmp_path / "tuning.json", ENTRIES))
    triton = TritonKernels(queries=64)
    backward = CudnnBackward(otherwise=triton)

    def chosen(tokens, chunk, device_kind=H100, **options):
        return gpu.kernels(device_kind, like(tokens, **options), chunk=chunk, overlap=160)

    assert chosen(1440, 480) == HopperKernels(keys=64, stages=4, backward_kernels=backward)
    assert chosen(1440, 200) == triton
    assert chosen(1440, 480, head_dim=64) == chosen(1440, 480, "NVIDIA H200") == HopperKernels()
    assert chosen(1440, 480, "NVIDIA A100-SXM4-80GB") == TritonKernels()
    long = {**ENTRIES[0], "blocks": {"keys": 256}}
    monkeypatch.setattr(gpu, "TABLE", table_of(tmp_path / "long.json", [long, ENTRIES[1]]))
    assert chosen(2400, 800) == HopperKernels(keys=256, backward_kernels=backward)
    # Chunks of fewer than 2 · 256 tokens.
    assert chosen(1440, 480) == HopperKernels(backward_kernels=backward)
    assert chosen(1440, 200) == triton


def test_feature_kernels_are_tuned(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "TABLE", table_of(tmp_path / "tuning.json", ENTRIES))
    assert gpu.feature_kernels(H100, like(100), degree=2) == FeatureKernels(tokens=64, warps=4)
    assert gpu.feature_kernels(H100, like(100), degree=1) == FeatureKernels()
    assert gpu.feature_kernels("NVIDIA H200", like(100), degree=2) == FeatureKernels()
    assert gpu.feature_kernels("NVIDIA A100-SXM4-80GB", like(100), degree=2) is None


def test_tpu_blocks_are_tuned(tmp_path, monkeypatch):
    entry = {**ENTRY, "kernel": "Blocks", "device_kind": "TPU v6e", "features": 256, "blocks": {"keys": 1024}}
    monkeypatch.setattr(blocks, "TABLE", table_of(tmp_path / "tuning.json", [entry], tpu.TABLE))
    widths = {"dtype": "bfloat16", "head_dim": 128, "features": 256}
    assert tpu.tuned("TPU v6e", **widths) == Blocks(keys=1024)
    assert tpu.tuned("TPU v6e", **{**widths, "dtype": "float32"}) == tpu.tuned("TPU v5p", **widths) == Blocks()


@pytest.fixture
def command(tmp_path, monkeypatch):
    """A run of it, every program faster than the one before by a tenth (or ``faster``); table and lines."""
    path = tmp_path / "tuning.json"

    def run(*more, faster=0.9):
        times = iter(faster**i for i in range(100))
        monkeypatch.setattr(tune, "median", lambda *_: next(times))
        tune.main(["--tiny", "--table", str(path), "--out", str(tmp_path / "tune.json"), *more])
        return json.loads(path.read_text()), json.loads((tmp_path / "tune.json").read_text())[1:]

    return run


@pytest.mark.full
def test_command_adds_to_the_gpu_table(command, tmp_path):
    other = {**ENTRIES[0], "blocks": {"keys": 64}}
    table_of(tmp_path / "tuning.json", [other])
    entries, lines = command("--kernels", "TritonKernels")
    assert not any("error" in line or "left_out" in line for line in lines)
    found = gpu.TABLE.at(tmp_path / "tuning.json").blocks
    here = {"device_kind": jax.devices()[0].device_kind, "dtype": "bfloat16", "head_dim": 32, "features": 64}
    both_ways = {"queries": 16, "keys": 32, "queries_backward": 16, "keys_backward": 32}
    assert found(TritonKernels, **here) == both_ways
    assert other in entries
    assert len(entries) == 2
    assert command("--seconds", "0")[0] == entries


@pytest.mark.full
def test_command_fills_the_tpu_table(command, tmp_path):
    _, lines = command("--platform", "tpu")
    assert not any("error" in line or "left_out" in line for line in lines)
    kind = jax.devices()[0].device_kind
    found = tpu.TABLE.at(tmp_path / "tuning.json").blocks(Blocks, kind, "bfloat16", head_dim=32, features=64)
    assert found == {"keys": 32}


def test_command_on_a_table_of_its_own(command):
    """What it has is timed after the default, and taken out where the default is as good."""
    only = ["--kernels", "FeatureKernels"]
    ((entry,), _) = command(*only)
    assert (entry["kernel"], entry["blocks"]) == ("FeatureKernels", {"tokens": 32, "stages": 3})
    _, lines = command(*only)
    tried = ["default", "tokens 32, stages 3", "tokens 16, stages 3", "fastest"]
    assert [line["case"] for line in lines] == [f"φ: {blocks}" for blocks in tried]
    assert command(*only, faster=0.99)[0] == []


def test_command_leaves_out_what_is_wrong(command, monkeypatch):
    """Blocks that give another result, or none."""
    forward = FeatureKernels.forward

    def wrong(kernels, *given):
        if kernels.tokens == 16:
            raise NotImplementedError("blocks of 16")
        return forward(kernels, *given) * (1 if kernels.tokens == FeatureKernels().tokens else 1.1)

    monkeypatch.setattr(FeatureKernels, "forward", wrong)
    entries, (_, of_16, of_32, fastest) = command("--kernels", "FeatureKernels")
    assert entries == []
    assert "blocks of 16" in of_16["error"]
    assert "off the default's result by 1.0e-01" in of_32["left_out"]
    assert fastest["blocks"] == {}


def test_command_needs_a_device(tmp_path):
    with pytest.raises(SystemExit, match="no TPU here"):
        tune.main(["--platform", "tpu", "--table", str(tmp_path / "tuning.json")])

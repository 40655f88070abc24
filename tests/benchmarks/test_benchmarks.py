"""The timed benchmarks run, at sizes that mean nothing: every case gives figures and none an error."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from shared.training import write_teacher

from benchmarks import (
    ablations,
    bench,
    eight_bits,
    generation,
    hybrid_operator,
    peers,
    recorded,
    rounds,
    stream,
    timing,
)
from benchmarks import dit as of_dit
from benchmarks import vae as of_vae
from rehyat_jax import cli


def lines_of(path):
    machine, *lines = json.loads(path.read_text())
    assert machine["case"] == "machine"
    return lines


def test_a_case_is_told_beside_what_was_recorded(tmp_path, capsys):
    """Of this kind of device alone; a run slower by more than 5 % says so."""
    for name, device, ms in (("a", "X1", 10.0), ("b", "X2", 1.0)):
        lines = [{"case": "machine", "device": device, "commit": "abc"}, {"case": "forward", "ms_a_chunk": ms}]
        (tmp_path / f"{name}.json").write_text(json.dumps(lines))
    told = recorded.beside("forward", {"ms_a_chunk": 10.4}, "X1", tmp_path)
    assert told == {"recorded_ms": 10.0, "recorded_commit": "abc", "of_recorded": 1.04}
    assert capsys.readouterr().err == ""
    recorded.beside("forward", {"ms_a_chunk": 10.6}, "X1", tmp_path)
    assert capsys.readouterr().err == "SLOWER by 6 %: forward: 10.6 ms, 10.0 at commit abc\n"
    assert recorded.beside("another", {"ms_a_chunk": 1.0}, "X1", tmp_path) == {}
    assert recorded.beside("forward", {"error": "none"}, "X1", tmp_path) == {}


def test_the_recorded_lines_say_their_commit():
    """Of the figures in docs/notebook/performance.md: its cases are found by the names that they have now."""
    of_h200 = recorded.recorded("NVIDIA H200")
    assert of_h200["hybrid, forward, 21 frames"] == (256.493, "1a76642")
    names = [name for name, _ in stream.cases(of_dit.WanConfig.t2v_1_3b(), of_vae.VAEConfig(), (60, 104))]
    assert names[0] in of_h200


def test_operator_beside_its_peer(tmp_path):
    cases = dict(hybrid_operator.cases(hybrid_operator.TINY, [6]))
    peer, ours = "softmax, xla, 6 frames", "operator with φ, 6 frames"
    report = timing.Report(tmp_path / "operator.json", 600)
    report.run_all([(peer, cases[peer]), (ours, cases[ours]), ("none", lambda: {"ms": 1 / 0})])
    first, second, third = lines_of(report.path)
    assert second["times_faster_than_softmax"] == pytest.approx(first["ms"] / second["ms"], rel=0.1)
    assert "ZeroDivisionError" in third["error"]
    timing.Report(tmp_path / "late.json", 0).run("late", lambda: {"ms": 1})
    assert lines_of(tmp_path / "late.json")[0]["left_out"]


@pytest.mark.full
def test_transformer_forward():
    cases = dict(of_dit.cases(of_dit.TINY, [4], (4, 4)))
    figures = cases["hybrid, forward, 4 frames"]()
    assert figures["ms"] > 0
    assert 0 < figures["program_gib"] < 0.1


def test_peers():
    assert peers.attention(hybrid_operator.TINY, "MATH", 2)["ms"] > 0
    assert peers.forward(of_dit.TINY, (4, 4), 2, compiled=False)["ms"] > 0
    figures = peers.autoencoder(of_vae.TINY, (2, 2), 5, way="decode")
    assert figures["frames_a_second"] == pytest.approx(5e3 / figures["ms"], rel=0.01)


@pytest.mark.full
def test_a_transformer_in_eight_bits(tmp_path):
    found = {each["kind"]: each for each in eight_bits.measured(of_dit.TINY, tmp_path / "wan", size=(4, 4))}
    fp8, int8, weights = found["fp8"], found["int8"], found["int8-weights"]
    assert fp8["bytes"] == int8["bytes"] == weights["bytes"]
    assert 0 < weights["velocity_differs_by"] < int8["velocity_differs_by"] < 0.1
    assert weights["velocity_differs_by"] < fp8["velocity_differs_by"] < 0.1


@pytest.mark.full
def test_a_stream_of_the_transformer():
    cases = dict(stream.cases(of_dit.TINY, of_vae.TINY, (4, 4)))
    figures = cases["stream, 4 steps, transformer alone"]()
    # Twelve frames of video a chunk; milliseconds are rounded to 0.01.
    assert figures["frames_a_second"] == pytest.approx(12e3 / figures["ms_a_chunk"], rel=0.02)


def test_every_row_of_the_ablations_is_a_training(tmp_path):
    study = ablations.Study(out=tmp_path)
    jobs = study.jobs()
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)
    assert {job.row for job in jobs} == set(ablations.ROWS)
    made = set()
    for name, row in ablations.ROWS.items():
        work = ablations.Work(study, ablations.Job(name, 0))
        distillation = work.distillation() if "distill" in row.stages else None
        finetuning = work.finetuning(Path("source")) if "finetune" in row.stages else None
        made.add(
            (
                distillation and (distillation.hybrid, distillation.loss),
                finetuning and (finetuning.hybrid, finetuning.history),
            )
        )
        assert finetuning is None or finetuning.anew == (distillation is None)
        assert finetuning is None or (finetuning.remember == "steps") == (not row.history.share)
    assert len(made) == len(ablations.ROWS)  # "teacher" has no training, "softmax" no conversion


def tiny_study(folder, *more):
    """The command on random networks; the lines after it."""
    teacher = folder / "teacher"
    if not teacher.exists():
        write_teacher(teacher)
    given = ["--out", str(folder / "study"), "--model", str(teacher), "--tiny", "--dtype", "float32"]
    ablations.main([*given, *more])
    kept = folder / "study" / "ablations.jsonl"
    return [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []


@pytest.fixture
def kept_programs(tmp_path, monkeypatch):
    """The study keeps its programs as a user's does: all of them, in its own folder, where nobody else's are."""
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.delenv(name, raising=False)  # of the workers, which are processes of their own
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    reset_cache()
    yield lambda: {path.name for path in (tmp_path / "study" / "cache" / "xla").glob("*-cache")}
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


@pytest.mark.full
def test_a_row_of_the_ablations(tmp_path, monkeypatch, capsys, kept_programs):
    """From the teacher to its figures; a run again does what is missing, and another seed compiles nothing new."""
    fewer = dataclasses.replace(ablations.TINY, occlusion_batch=0, occlusions=0, long_clips=0)
    monkeypatch.setattr(ablations, "TINY", fewer)
    _, line = tiny_study(tmp_path, "--only", "base", "--seeds", "1")
    assert (line["row"], line["seed"], line.get("error")) == ("base", 0, None)
    assert line["distillation"]["error"] > 0
    assert (line["plain"]["clips"], line["plain"]["frames"]) == (2, 21)
    assert {"compile", "train"} <= line["seconds"]["finetune"].keys()
    assert not any((tmp_path / "study" / "students").iterdir())
    compiled = kept_programs()
    assert compiled
    kept = ablations.Lines(tmp_path / "study" / "ablations.jsonl")
    with kept.path.open("a") as file:
        file.write('{"row": "base", "se')  # killed while it wrote
    with pytest.raises(json.JSONDecodeError):
        tiny_study(tmp_path, "--only", "base", "--seeds", "2")
    assert [(line["row"], line["seed"]) for line in kept.read()] == [("base", 0), ("base", 1)]
    assert kept_programs() == compiled
    capsys.readouterr()
    ablations.main(["--out", str(tmp_path / "study"), "--table"])
    assert "| base | 2 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other settings"):
        ablations.main(["--out", str(tmp_path / "study"), "--only", "base"])
    with pytest.raises(SystemExit, match="no row 'basis'"):
        tiny_study(tmp_path, "--only", "basis")


@pytest.mark.full
def test_workers_do_rows_of_every_kind(tmp_path, kept_programs):
    """With pillars and streams, and without; what is warmed is what is run. Each kind is compiled in a worker's own
    process and folder and run in another."""
    rows = ["--only", "window", "softmax", "--seeds", "1", "--workers", "2"]
    assert tiny_study(tmp_path, *rows, "--warm") == []
    compiled = kept_programs()
    assert compiled
    _, *lines = tiny_study(tmp_path, *rows)
    assert kept_programs() == compiled
    found = {line["row"]: line for line in lines}
    assert found.keys() == {"window", "softmax"}
    assert not any("error" in line for line in lines)
    assert {row for row, line in found.items() if "long" in line} == {"window"}
    assert all(line["wait 0"]["clips"] == 1 for line in lines)


def test_a_row_that_fails_is_a_line(tmp_path):
    study = ablations.Study(out=tmp_path, model=tmp_path / "nothing")
    line = ablations.line_of(study, ablations.Job("base", 0))
    assert "nothing" in line["error"]
    lines = ablations.Lines(study.lines_file)
    lines.begin(study.settings)
    lines.append(line)
    assert lines.read() == []  # it is tried again


def test_the_command_names_its_mistakes(tmp_path, capsys):
    assert cli.main(["bench", "--parts", "cuisine"]) == 2
    assert "cuisine" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert cli.main(["bench", "--tiny", "--out", str(tmp_path / "file")]) == 2


@pytest.mark.full
@pytest.mark.parametrize("what", ["--stream", "--teacher", "--no-teacher"])
def test_generation(capsys, what):
    generation.main(["--model", "tiny", "--size", "64x32", "--frames", "9", "--samples", "1", what])
    said = json.loads(capsys.readouterr().out)
    assert (len(said["seconds"]), said["mesh"], "frames_a_second" in said) == (1, {}, what == "--stream")


@pytest.mark.full
def test_rounds_of_a_planned_training(tmp_path, capsys):
    """A whole training's own programs, without weights or clips."""
    config = tmp_path / "tiny.py"
    config.write_text(
        "import dataclasses\n"
        "from configs.wan_1_3b_finetune import config as published\n"
        "from rehyat_jax.mixers.config import HybridConfig\n"
        "from rehyat_jax.models.wan.config import WanConfig\n"
        "model = WanConfig(num_layers=1, num_attention_heads=2, attention_head_dim=12, ffn_dim=24, text_dim=8)\n"
        "hybrid = HybridConfig(implementation='scan')\n"
        "from rehyat_jax.runtime.mesh_config import MeshConfig\n"
        "config = dataclasses.replace(published, model=model, hybrid=hybrid, mesh=MeshConfig(), dtype='float32')\n"
    )
    sizes = ["--batch", "1", "--frames", "9", "--size", "32x32", "--samples", "1"]
    rounds.main([str(config), *sizes])
    (said,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (said["devices"], said["mesh"], len(said["seconds"])) == (1, {}, 1)
    assert said["seconds"][0] > 0
    assert said["tflops_per_s"] >= 0


@pytest.mark.full
def test_every_case_of_every_part(tmp_path):
    bench.main(["--tiny", "--out", str(tmp_path)])
    for part in bench.PARTS:
        assert all("error" not in line for line in lines_of(tmp_path / f"{part}.json"))

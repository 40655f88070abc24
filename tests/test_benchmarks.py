"""The timed benchmarks run, at sizes that mean nothing: every case gives figures and none an error."""

import json

import pytest

from benchmarks import ablations, bench, hybrid_operator, peers, stream, timing
from benchmarks import dit as of_dit
from benchmarks import vae as of_vae
from rehyat_jax import cli


def lines_of(path):
    machine, *lines = json.loads(path.read_text())
    assert machine["case"] == "machine"
    return lines


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


def test_a_stream_of_the_transformer():
    cases = dict(stream.cases(of_dit.TINY, of_vae.TINY, (4, 4)))
    figures = cases["stream, 4 steps, transformer alone"]()
    # Twelve frames of video a chunk; milliseconds are rounded to 0.01.
    assert figures["frames_a_second"] == pytest.approx(12e3 / figures["ms_a_chunk"], rel=0.02)


def test_every_row_of_the_ablations_is_a_training(tmp_path):
    rows = [row for rows in ablations.ROWS.values() for row in rows]
    made = [ablations.training(tmp_path, row, steps=8, batch=4, seed=0, dtype="float32") for row in rows]
    assert len({(each.hybrid, each.loss) for each in made}) == len(rows)


def test_the_command_names_its_mistakes(tmp_path, capsys):
    assert cli.main(["bench", "--parts", "cuisine"]) == 2
    assert "cuisine" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert cli.main(["bench", "--tiny", "--out", str(tmp_path / "file")]) == 2


@pytest.mark.slow
def test_every_case_of_every_part(tmp_path):
    bench.main(["--tiny", "--out", str(tmp_path)])
    for part in bench.PARTS:
        assert all("error" not in line for line in lines_of(tmp_path / f"{part}.json"))

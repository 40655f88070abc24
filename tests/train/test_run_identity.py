"""A run knows itself: its settings and what it reads, more steps of one that is done, its metrics and checkpoints."""

import dataclasses
import importlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest
from shared.training import problem

from rehyat_jax.errors import CheckpointError, ConfigError, RehyatError, RehyatWarning
from rehyat_jax.mixers import BlockMixers, Hybrid, Window
from train.engine import checkpoint
from train.engine.checkpoint import Checkpoints
from train.engine.folder import RunFolder
from train.engine.identity import compare, differences, identity_of, keep, may_change, settings_of
from train.engine.metrics import Metrics
from train.engine.optimizer import OptimizerConfig

PAGE = Path(__file__).parents[2] / "docs" / "extend" / "stage.md"


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Iterator[Path]:
    """The smallest stage, as docs/extend/stage.md has it."""
    folder = tmp_path_factory.mktemp("toy")
    module, config = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (folder / "gaussian.py").write_text(module)
    (folder / "narrow.py").write_text(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        sys.modules.pop("gaussian", None)
        yield folder / "narrow.py"


@pytest.fixture
def run(toy, tmp_path):
    def run(*options: object) -> int:
        argv = [toy, "--out", tmp_path / "result", "--checkpoint-seconds", "1e9", *options]
        return importlib.import_module("gaussian").main([str(x) for x in argv])

    return run


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of every kind that a configuration has."""

    out: Path = Path("out")
    source: Path = Path("source")
    data: tuple[Path, ...] = ()
    optimizer: OptimizerConfig = OptimizerConfig()
    prompts: str = "plain"
    shift: float = 3.0
    seed: int = 0
    steps: int = 100
    checkpoint_seconds: float = 60.0


def test_every_setting_is_in_the_identity_and_what_says_where_alone_is_not(tmp_path):
    identity = identity_of(Settings())
    assert {"source", "data.length", "optimizer.learning_rate", "prompts", "shift", "seed", "steps"} <= identity.keys()
    assert identity_of(Settings(out=Path("elsewhere"), checkpoint_seconds=1.0)) == identity
    for name, value in [("shift", 5.0), ("seed", 1), ("prompts", "occlusion"), ("data", (Path("x"),))]:
        (found, *_) = differences(identity, identity_of(dataclasses.replace(Settings(), **{name: value})))
        assert found.split(".")[0] == name


@pytest.mark.parametrize("kind", ["model", "file"])
def test_what_is_read_is_known_by_its_content_wherever_it_lies(tmp_path, kind):
    def made(place: str, content: bytes) -> Path:
        path = tmp_path / place / ("model" if kind == "model" else "prompts.txt")
        file = path / "model.safetensors" if kind == "model" else path
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
        return path

    first, moved, other = made("a", b"1" * 5000), made("b", b"1" * 5000), made("c", b"1" * 4999 + b"2")
    one, same, another = (identity_of(Settings(source=path)) for path in (first, moved, other))
    assert one["source"] != same["source"]  # people read the path
    assert differences(one, same) == []
    assert differences(one, another) == ["source"]


def test_what_is_missing_is_like_nothing_but_itself():
    one, other = identity_of(Settings(source=Path("x"))), identity_of(Settings(source=Path("y")))
    assert differences(one, one) == []
    assert differences(one, other) == ["source"]


@pytest.mark.parametrize(
    ("name", "may"),
    [
        ("steps", True),
        ("optimizer.learning_rate", True),
        ("critic.learning_rate", True),
        ("mesh.fsdp", True),
        ("validation.every", True),
        ("seed", False),
        ("shift", False),
        ("buckets.0.batch", False),
        ("source", False),
        ("optimizer.method", False),
    ],
)
def test_which_settings_may_change(name, may):
    assert may_change(name) == may


def test_a_folder_of_another_run_is_refused_by_the_first_difference(tmp_path):
    before = identity_of(Settings())
    keep(tmp_path, before, step=None)
    assert compare(tmp_path, before) == []
    for changed, words in [
        (Settings(seed=1), "seed was 0 and is 1; choose another --out"),
        (Settings(steps=200), "steps was 100 and is 200; --change goes on so, or choose another --out"),
    ]:
        with pytest.raises(ConfigError, match=words):
            compare(tmp_path, identity_of(changed))
    with pytest.raises(ConfigError, match="seed was 0 and is 1"):
        compare(tmp_path, identity_of(Settings(seed=1)), change=True)
    now = identity_of(Settings(steps=200))
    assert compare(tmp_path, now, change=True) == ["steps was 100 and is 200"]
    keep(tmp_path, now, step=64)
    written = json.loads((tmp_path / "run.json").read_text())
    assert written["changes"] == [{"step": 64, "name": "steps", "before": 100, "now": 200}]
    assert compare(tmp_path, now) == []
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ConfigError, match=r"run\.json is damaged"):
        compare(tmp_path, now)


def test_a_run_that_is_done_goes_on_with_more_steps_and_keeps_its_result(run, tmp_path, capsys):
    result, log = tmp_path / "result", tmp_path / "result-train" / "metrics.jsonl"
    assert run("--steps", 10) == 0
    first = (result / "gaussian.json").read_bytes()
    with pytest.raises(RehyatError, match="is there already"):
        run("--steps", 10)
    with pytest.raises(ConfigError, match="result-train is of another run: seed was "):
        run("--steps", 20, "--seed", 5, "--change")
    capsys.readouterr()
    with pytest.warns(RehyatWarning, match="steps was 10 and is 20, from step 10 on"):
        assert run("--steps", 20, "--change") == 0
    assert "resumed from step 10" in capsys.readouterr().err
    assert (tmp_path / "result-10-steps" / "gaussian.json").read_bytes() == first
    assert result.is_dir()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20]
    for line in lines:
        assert {"student/learning_rate", "critic/learning_rate", "critic/gradient_norm", "steps_per_s"} <= line.keys()
    changes = json.loads((tmp_path / "result-train" / "run.json").read_text())["changes"]
    assert [(change["name"], change["step"]) for change in changes] == [("steps", 10)]


def test_a_run_without_checkpoints_binds_nobody(run, tmp_path):
    keep(tmp_path / "result-train", {"seed": 77}, step=None)
    assert run("--steps", 5) == 0
    assert "seed" in json.loads((tmp_path / "result-train" / "run.json").read_text())["settings"]


def test_metrics_never_go_back_after_a_kill(tmp_path):
    folder = RunFolder(tmp_path)
    with Metrics(folder, first_step=0) as log:
        for step in (8, 16, 24):
            log.write(step, {"loss": 1.0})
    with folder.metrics.open("a") as file:
        file.write('{"step": 32, "lo')  # killed while it wrote
    with Metrics(folder, first_step=16) as log:
        log.write(20, {"loss": 2.0})
    steps = [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()]
    assert steps == [8, 16, 20]


def test_the_newest_and_those_of_every_so_many_steps_are_kept(tmp_path):
    state = OptimizerConfig().init(problem())
    with Checkpoints(tmp_path, keep=3, always=lambda step: step % 20 < 8) as checkpoints:
        for step in range(8, 88, 8):
            checkpoints.save(step, state)
    # 24, 40, 64 and 80 are the first at or after 20, 40, 60 and 80.
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [24, 40, 64, 72, 80]


def test_keep_every_makes_a_checkpoint_when_it_is_due(run, tmp_path):
    assert run("--steps", 30, "--keep-every", 10, "--keep-last", 1) == 0
    kept = sorted(int(path.name) for path in (tmp_path / "result-train" / "checkpoints").iterdir())
    assert kept == [10, 20, 30]


def test_an_export_during_a_run_takes_the_newest_whole_checkpoint(tmp_path):
    state = {"step": jnp.asarray(1, jnp.int32), "params": {"w": jnp.arange(4.0)}}
    with Checkpoints(tmp_path) as writing:
        writing.save(8, state)
        writing.save(16, state | {"step": jnp.asarray(2, jnp.int32)})
        (tmp_path / "16" / "seal.json").unlink()  # written, and not sealed yet
        (tmp_path / "24.orbax-checkpoint-tmp").mkdir()
        with Checkpoints(tmp_path) as reading:
            chex.assert_trees_all_equal(reading.read(jax.eval_shape(lambda: state)), state)
            with pytest.raises(CheckpointError, match="16 is damaged or was not finished"):
                reading.read(jax.eval_shape(lambda: state), step=16)
        assert (tmp_path / "24.orbax-checkpoint-tmp").is_dir()
        (tmp_path / "8" / "seal.json").unlink()
        with Checkpoints(tmp_path) as reading, pytest.raises(CheckpointError, match="is whole"):
            reading.read(jax.eval_shape(lambda: state))


@pytest.mark.full
def test_exports_while_checkpoints_are_written_and_removed_all_succeed(tmp_path):
    state = {"params": {"w": jnp.arange(1000.0)}}
    ended = threading.Event()

    def write() -> None:
        with Checkpoints(tmp_path) as writing:
            for step in range(2, 40):
                writing.save(step, state)
        ended.set()

    with Checkpoints(tmp_path) as first:
        first.save(1, state)
    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    while not ended.is_set():
        with Checkpoints(tmp_path) as reading:
            chex.assert_trees_all_equal(reading.read(jax.eval_shape(lambda: state)), state)
        reads += 1
    writer.join()
    assert reads > 3


@pytest.mark.parametrize("bytes_read", [1 << 30, 1 << 22])
def test_sealing_reads_a_bounded_number_of_bytes(tmp_path, monkeypatch, bytes_read):
    monkeypatch.setattr(checkpoint, "SEALED_BYTES", bytes_read)
    state = {"w": jax.random.normal(jax.random.key(0), (3 << 20,), jnp.float32)}  # 12 MB that no compression helps
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        chex.assert_trees_all_equal(checkpoints.restore(state), state)
    largest = max((path for path in tmp_path.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    said: list[str] = []
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(state, report=said.append) is None
    assert len(said) == 1


def test_what_changed_is_said_by_a_library_call_too(toy, tmp_path):
    gaussian = importlib.import_module("gaussian")
    names = {}
    exec(compile(toy.read_text(), str(toy), "exec"), names)
    config = dataclasses.replace(names["config"], out=tmp_path / "result", steps=5)
    assert isinstance(config, gaussian.RunConfig)
    config.run()
    with pytest.warns(RehyatWarning, match="steps was 5 and is 10, from step 5 on"):
        dataclasses.replace(config, steps=10).run(change=True)


def test_mixers_of_equal_fields_are_told_apart_by_their_names():
    """Both have a chunk and no more that differs: in a run's identity, and in its record."""

    @dataclasses.dataclass(frozen=True)
    class Run:
        hybrid: BlockMixers

    one, other = (Run(BlockMixers((mixer(chunk_frames=2),))) for mixer in (Hybrid, Window))
    assert "hybrid.blocks.0.mixer" in differences(identity_of(one), identity_of(other))
    assert [settings_of(run)["hybrid"]["blocks"][0]["mixer"] for run in (one, other)] == ["hybrid", "window"]

"""``rehyat pretrain``: a run of tiny networks from file to video, killed and resumed, and what each mistake says."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from shared.tiers import tier

from rehyat_jax import TextToVideo, cli
from rehyat_jax.models.checkpoints import save_vae
from rehyat_jax.models.wan.config import VAEConfig
from rehyat_jax.models.wan.vae import WanVAE
from train.cli.config_files import bundled_configs, load_config
from train.stages.diffusion import DiffusionTraining
from train.stages.vae import VAETraining

TINY = '''"""A model that trains in seconds, for tests."""
import os, signal
from pathlib import Path
from rehyat_jax.models.umt5.config import TextEncoderConfig
from rehyat_jax.models.wan.config import WanConfig
from train.engine.checkpoint import Checkpoints
from train.data.clips import Bucket
from train.stages.diffusion import DiffusionTraining
from train.engine.optimizer import OptimizerConfig

config = DiffusionTraining(
    out=Path("unused"),
    model=WanConfig(num_layers=2, num_attention_heads=2, attention_head_dim=12, ffn_dim=32, in_channels=4,
                    out_channels=4, text_dim=16, freq_dim=16, patch_size=(1, 4, 4)),
    text_encoder=TextEncoderConfig(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2),
    buckets=(Bucket(kind="occlusion", frames=5, batch=4, longest_wait=4),),
    steps=32,
    steps_per_round=8,
    reuse=4,
    dtype="float32",
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=4),
    checkpoint_seconds=0.0,
    defaults={"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 2.0},
)

if death := os.environ.get("DIE_AFTER"):
    save = Checkpoints.save

    def save_and_die(self, step, state):
        save(self, step, state)
        if step == int(death):
            os.kill(os.getpid(), signal.SIGKILL)

    Checkpoints.save = save_and_die
'''

#: Stops itself by the signal in $SIGNAL in its second round; no network, no compilation.
TOY = '''"""Stops itself."""
import os
from pathlib import Path
import jax.numpy as jnp
from train.engine.loop import Rhythm, run
from train.stages.vae import VAETraining


class Toy(VAETraining):
    def run(self, phases=None):
        def advance(state, step):
            if step == 8 and "SIGNAL" in os.environ:
                os.kill(os.getpid(), int(os.environ["SIGNAL"]))
            return state._replace(step=state.step + 8), {"loss": jnp.ones(1)}

        state = self.optimizer.init({"kernel": jnp.ones(3)})
        run(state, advance, Rhythm(steps=self.steps, steps_per_advance=8), folder=self.train_folder)
        self.result.mkdir()


config = Toy(out=Path("unused"), steps=32)
'''


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Programs compiled once, and kept for the next run in this or another process."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REHYAT_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture
def rehyat(capsys):
    """Run the program in this process: (exit code, standard output, standard error)."""

    def run(*argv: object):
        code = cli.main([str(argument) for argument in argv])
        return code, *capsys.readouterr()

    return run


def write_vae(out: Path) -> None:
    """A VAE of random numbers that halves sides and time once, where Wan's does it three times and twice."""
    config = VAEConfig(
        base_dim=4,
        z_dim=4,
        dim_mult=(1, 1),
        temperal_downsample=(True,),
        num_res_blocks=1,
        latents_mean=(0.0,) * 4,
        latents_std=(1.0,) * 4,
    )
    graph, state = nnx.split(nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def numbers(path, leaf):
        kind = path[-2].key if hasattr(path[-1], "name") else path[-1].key
        if kind == "kernel":
            return jax.numpy.asarray(rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1])), leaf.dtype)
        return (jax.numpy.ones if kind == "scale" else jax.numpy.zeros)(leaf.shape, leaf.dtype)

    save_vae(nnx.merge(graph, jax.tree_util.tree_map_with_path(numbers, state)), out / "vae")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(TINY)
    return path


def pretrain_alone(config: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: bits are compared between such alone, which have compiled the same."""
    command = [sys.executable, "-m", "rehyat_jax", "pretrain", str(config), "--out", str(out)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny) -> Path:
    """Four rounds without a stop; in a process of its own where its bits are compared with another's."""
    out = tmp_path_factory.mktemp("whole")
    write_vae(out)
    if tier not in ("rest", "all"):
        assert cli.main(["pretrain", str(tiny), "--out", str(out)]) == 0
        return out
    done = pretrain_alone(tiny, out)
    assert done.returncode == 0, done.stderr
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_sentence(result, *words: str) -> None:
    """Exit code 2, and the last line on the standard error says these words."""
    code, _, error = result
    assert code == 2
    last = error.strip().split("\n")[-1]
    assert last.startswith("rehyat: ")
    assert "Traceback" not in error
    for word in words:
        assert word in last


def test_training_lowers_the_loss_and_makes_a_model_that_opens(trained):
    losses = [json.loads(line)["loss"] for line in (trained / "train-dit" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4
    # The target is noise of variance 1 less a clip's latents.
    assert losses[-1] < 0.9 * losses[0]
    pipe = TextToVideo.from_pretrained(trained)
    video = pipe("a lemon moving down slowly on a blue background", seed=1)
    assert video.shape == (5, 32, 32, 3)
    assert pipe.defaults.guidance_scale == 2.0
    assert pipe.schedule.shift == 3.0


def test_the_record_says_how_the_model_was_made(trained, tiny):
    record = json.loads((trained / "transformer.json").read_text())
    assert record["command"] == "rehyat pretrain"
    assert record["settings"]["config"] == str(tiny)
    assert (record["settings"]["out"], record["settings"]["seed"]) == (str(trained), 0)
    assert record["settings"]["buckets"] == [
        {
            "kind": "occlusion",
            "frames": 5,
            "batch": 4,
            "share": 1.0,
            "during": [0.0, 1.0],
            "longest_wait": 4,
            "hidden": "learned",
            "pairs": 0.5,
            "columns": None,
        }
    ]
    assert {"compile", "train", "save"} == set(record["phases"])
    assert (record["last"]["step"], record["last"]["from_step"]) == (32, 0)


@pytest.mark.full
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(trained, tiny, tmp_path):
    """Two rounds, SIGKILL, then another process's two: parameters, optimiser and written model are those of four."""
    write_vae(tmp_path)
    killed = pretrain_alone(tiny, tmp_path, DIE_AFTER="16")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    checkpoints = tmp_path / "train-dit" / "checkpoints"
    assert set(os.listdir(checkpoints)) == {"8", "16"}
    assert not (tmp_path / "transformer").exists()
    # And the newest was torn: the one before it serves.
    largest = max((checkpoints / "16").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    resumed = pretrain_alone(tiny, tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.strip() == str(tmp_path / "transformer")
    assert "checkpoints/16 is damaged" in resumed.stderr
    assert "resumed from step 8" in resumed.stderr
    for part in ("transformer", "text_encoder", "tokenizer", "scheduler"):
        assert files(tmp_path / part) == files(trained / part)
    mine, whole = (_newest(folder / "train-dit") for folder in (tmp_path, trained))
    student = {name.removeprefix("['learners']['student']").split("]")[0] + "]" for name in whole}
    assert student == {"['step']", "['skipped']", "['params']", "['ema']", "['optimizer']"}
    assert mine.keys() == whole.keys()
    for name, array in whole.items():
        assert mine[name].tobytes() == array.tobytes(), name


def _newest(folder: Path) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint, as Orbax reads it by itself."""
    with ocp.StandardCheckpointer() as reader:
        tree = reader.restore(folder / "checkpoints" / "32" / "default")
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.full
def test_the_last_checkpoint_exports_the_model_of_the_run(trained, tiny, tmp_path, rehyat):
    out = tmp_path / "exported"
    assert rehyat("export", tiny, out, "--", "--out", trained)[0] == 0
    exported = files(out)
    for part in ("transformer", "text_encoder", "tokenizer", "vae", "scheduler"):
        for name, content in files(trained / part).items():
            assert exported[f"{part}/{name}"] == content, name
    assert exported["model_index.json"] == (trained / "model_index.json").read_bytes()


@pytest.mark.full
def test_a_trained_model_is_gone_on_from(trained, tiny, tmp_path, rehyat):
    """At a learning rate of 0 the result is what it began with, VAE included; of other sizes it is refused."""
    out, still = tmp_path / "out", ("--optimizer.learning-rate", 0, "--steps", 16)
    assert rehyat("pretrain", tiny, "--out", out, "--init", trained, *still)[0] == 0
    for part in ("transformer", "text_encoder", "tokenizer", "vae"):
        assert files(out / part) == files(trained / part), part
    other = rehyat("pretrain", tiny, "--out", tmp_path / "other", "--init", trained, "--model.num-layers", 1)
    assert_sentence(other, "other sizes")
    assert_sentence(rehyat("pretrain", tiny, "--out", tmp_path / "none", "--init", tmp_path / "no"), "no folder")


def test_a_finished_model_is_not_trained_over(trained, tiny, rehyat):
    before = files(trained)
    assert_sentence(rehyat("pretrain", tiny, "--out", trained), str(trained), "already")
    assert files(trained) == before


def test_checkpoints_of_another_model_are_refused(tmp_path, rehyat, monkeypatch):
    toy, out = tmp_path / "toy.py", tmp_path / "out"
    toy.write_text(TOY)
    monkeypatch.setenv("SIGNAL", str(int(signal.SIGTERM)))
    assert rehyat("pretrain", toy, "--out", out)[0] == 143
    toy.write_text(TOY.replace("ones(3)", "ones(4)"))
    words = "another model", "kernel", "float32[3] there and float32[4] here", "--out"
    assert_sentence(rehyat("pretrain", toy, "--out", out), *words)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_says_so_and_goes_on(tmp_path, rehyat, monkeypatch, number, expected):
    toy, out = tmp_path / "toy.py", tmp_path / "out"
    toy.write_text(TOY)
    monkeypatch.setenv("SIGNAL", str(int(number)))
    code, output, error = rehyat("pretrain", toy, "--out", out)
    assert (code, output) == (expected, "")
    assert "step 16 is saved, and the same command continues" in error
    assert "Traceback" not in error
    assert sorted(os.listdir(out)) == ["train-vae"]
    code, output, error = rehyat("pretrain", toy, "--out", out)
    assert (code, output) == (0, f"{out / 'vae'}\n")
    assert "resumed from step 16" in error
    record = json.loads((out / "vae.json").read_text())
    assert (record["last"]["step"], record["last"]["from_step"]) == (32, 16)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["config.py", "sprites_vae"]),
        ("", ["does not define config"]),
        ("config = 3", ["VAETraining or DiffusionTraining", "int"]),
        ("config =", ["SyntaxError"]),
        ("import no_such_module", ["ModuleNotFoundError", "no_such_module"]),
        ("from train.data.clips import *\nconfig = Bucket(kind='plain', frames=0, batch=1)", ["frames"]),
        (b"\xff\xfe\x00", ["config.py"]),
    ],
    ids=["missing", "empty", "another kind", "syntax", "import", "impossible", "bytes"],
)
def test_a_file_that_is_no_configuration(rehyat, tmp_path, content, words):
    path = tmp_path / "config.py"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_sentence(rehyat("pretrain", path), "config.py", *words)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--nope", "3"], ["--nope", "sprites_vae --help"]),
        (["--buckets.9.batch", "3"], ["--buckets.9.batch"]),
        (["--steps", "0"], ["steps"]),
        (["--optimizer.learning-rate", "nan"], ["learning_rate"]),
        (["--buckets.0.frames", "18", "--buckets.1.frames", "18"], ["18 frames"]),
        (["--model.base-dim", "0"], ["base_dim"]),
        (["--buckets.0.pairs", "0.4"], ["pairs", "0.5 to 1"]),
    ],
)
def test_an_impossible_field_is_one_sentence(rehyat, tmp_path, argv, words):
    assert_sentence(rehyat("pretrain", "sprites_vae", "--out", tmp_path / "out", *argv), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv", [["--steps", "many"], ["--dtype", "int8"], ["--steps"]])
def test_a_value_of_the_wrong_kind_exits_with_2(rehyat, argv):
    code, output, error = rehyat("pretrain", "sprites_vae", *argv)
    assert (code, output) == (2, "")
    assert argv[0] in error
    assert "Traceback" not in error


def test_other_mistakes(rehyat, tmp_path, tiny):
    assert_sentence(rehyat("pretrain", "no_such_name"), "no_such_name", "sprites_dit")
    assert_sentence(rehyat("pretrain", "--steps", "3", "sprites_vae"), "before")
    assert_sentence(rehyat("pretrain", "\0"), "no path")
    assert_sentence(rehyat("pretrain", tmp_path), "folder")
    (tmp_path / "file").write_text("")
    assert_sentence(rehyat("pretrain", tiny, "--out", tmp_path / "file"), "file, not a folder")
    assert_sentence(rehyat("pretrain", tiny, "--out", tmp_path / "empty"), "vae")  # the transformer needs one
    write_vae(tmp_path)
    assert_sentence(rehyat("pretrain", tiny, "--out", tmp_path, "--model.in-channels", 8), "4 channels", "8 in")
    assert_sentence(rehyat("pretrain", tiny, "--out", tmp_path, "--buckets.0.frames", 6), "6 frames are not 2k + 1")


def test_help_tells_configurations_and_fields(rehyat):
    code, output, _ = rehyat("pretrain", "--help")
    assert code == 0
    assert "sprites_vae" in output
    assert "executed" in output
    code, output, error = rehyat("pretrain")
    assert (code, output) == (2, "")
    assert "usage: rehyat pretrain CONFIG" in error
    code, output, _ = rehyat("pretrain", "sprites_dit", "--help")
    assert code == 0
    for field in ("--out", "--steps", "--optimizer.learning-rate", "--buckets.3.longest-wait", "--model.num-layers"):
        assert field in output
    assert "Cost: one H200" in output


@pytest.mark.parametrize(("name", "kind"), [("sprites_vae", VAETraining), ("sprites_dit", DiffusionTraining)])
def test_the_configurations_that_ship(name, kind):
    assert name in bundled_configs()
    config, about = load_config(name, kinds=(kind,))
    assert config.out == Path("out/mini-sprites")
    for word in (f"rehyat pretrain {name}", "Cost:", "Result:"):
        assert word in about

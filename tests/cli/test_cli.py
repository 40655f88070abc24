"""The program as a user meets it: what it makes, and what each mistake says."""

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from importlib.metadata import EntryPoint
from pathlib import Path

import av
import jax
import pytest
from shared import tiers
from shared.checkpoint import save_tiny_checkpoint

from rehyat_jax import __version__, cli
from rehyat_jax.models.folder import find_model
from rehyat_jax.runtime.outputs import locked
from rehyat_jax.video.io import read_video

SMALL = ["--frames", "5", "--size", "32x16", "--steps", "2", "--guidance", "1"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_checkpoint(folder)
    return folder


@pytest.fixture
def rehyat(capsys):
    """Run the program in this process: (exit code, standard output, standard error)."""

    def run(*argv: object):
        code = cli.main([str(argument) for argument in argv])
        return code, *capsys.readouterr()

    return run


def program(*argv: object, **kwargs) -> list[str]:
    return [sys.executable, "-m", "rehyat_jax", *map(str, argv)]


def assert_sentence(result, *words: str) -> None:
    """Exit code 2, one line on the standard error that says these words, and no traceback."""
    code, _, error = result
    assert code == 2
    last = error.strip().split("\n")[-1]
    assert last.startswith("rehyat: ")
    assert "Traceback" not in error
    for word in words:
        assert word in last


def test_generate_writes_video_sheet_and_record(rehyat, checkpoint, tmp_path):
    out = tmp_path / "new" / "a.mp4"
    code, output, error = rehyat("generate", "a cat", "--model", checkpoint, *SMALL, "--seed", 7, "--out", out)
    assert code == 0, error
    assert str(out) in output
    assert sorted(os.listdir(out.parent)) == ["a.json", "a.mp4", "a.png"]
    assert read_video(out).shape == (5, 256, 512, 3)
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["settings"]["seed"] == 7
    assert record["settings"]["prompt"] == "a cat"
    assert (record["settings"]["width"], record["settings"]["height"]) == (32, 16)
    assert record["settings"]["schedule"]["shift"] == 3.0
    assert {"load", "text", "denoise", "decode", "write"} == set(record["phases"])
    assert record["versions"]["jax"] == jax.__version__
    assert "denoise: 2/2" in error


@pytest.mark.parametrize(
    "name", tiers.breadth(["file:50%d.mp4", "-ä b'.mp4", "12:30.mp4", "50%d.mp4", "-a.mp4"], test=2)
)
def test_any_name_is_a_name(rehyat, checkpoint, tmp_path, monkeypatch, name):
    """None is a protocol, a pattern or an option."""
    monkeypatch.chdir(tmp_path)
    code, _, error = rehyat("generate", "a cat", "--model", checkpoint, *SMALL, f"--out={name}")
    assert code == 0, error
    assert sorted(os.listdir()) == sorted([name, *(name.replace(".mp4", ending) for ending in (".json", ".png"))])
    assert len(read_video(name)) == 5
    with av.open(os.path.abspath(name)) as container:
        assert container.metadata["parameters"].startswith("a cat\nSteps: 2, Sampler: UniPC")
        assert json.loads(container.metadata["comment"])["model"] == str(checkpoint)


@pytest.mark.parametrize("name", ["a.png", "a.json"])
def test_users_files_beside_the_video_are_kept(rehyat, checkpoint, tmp_path, name):
    (tmp_path / name).write_text("mine")
    generate = ["generate", "a cat", "--model", "none", *SMALL, "--out", tmp_path / "a.mp4"]
    for options in ([], ["--overwrite"]):
        assert_sentence(rehyat(*generate, *options), name, "not made by rehyat for a.mp4")
    assert (tmp_path / name).read_text() == "mine"
    assert os.listdir(tmp_path) == [name]


def test_users_files_a_video_is_replaced_when_told(rehyat, checkpoint, tmp_path):
    out = tmp_path / "a.mp4"
    out.write_bytes(b"mine")
    generate = ["generate", "a cat", "--model", checkpoint, *SMALL, "--out", out]
    assert_sentence(rehyat(*generate), "a.mp4 exists already", "--overwrite")
    assert out.read_bytes() == b"mine"
    for _ in range(2):  # its own sheet and record are no obstacle
        code, _, error = rehyat(*generate, "--overwrite")
        assert code == 0, error
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.mp4", "a.png"]


def test_one_owner_of_a_video(rehyat, checkpoint, tmp_path):
    with locked(tmp_path / "a.mp4", command="rehyat generate"):
        result = rehyat("generate", "a cat", "--model", "none", *SMALL, "--out", tmp_path / "a.mp4")
        assert_sentence(result, "another process is writing it", f"process {os.getpid()} on")


def test_leftovers_of_a_killed_run_are_named(rehyat, checkpoint, tmp_path):
    left = tmp_path / ".a.mp4.01234567.partial"
    left.write_bytes(bytes(2000))
    code, _, error = rehyat("generate", "a cat", "--model", checkpoint, *SMALL, "--out", tmp_path / "a.mp4")
    assert code == 0, error
    assert f"rehyat: removed {left}, which a run that was killed left (2.0 kB)" in error
    assert not left.exists()


def test_prompts_that_are_cut_are_said_once(rehyat, checkpoint, tmp_path):
    code, _, error = rehyat("generate", "x " * 700, "--model", checkpoint, *SMALL, "--out", tmp_path / "a.mp4")
    assert code == 0, error
    assert error.count("cut off") == 1
    assert "rehyat: a prompt has 1401 tokens, and Wan reads 512" in error


def test_sampling_options_are_resolved(rehyat, checkpoint, tmp_path):
    out = tmp_path / "a.mp4"
    options = ["--solver", "euler", "--grid", "official", "--shift", "8", "--negative", "static", "--guidance", "2"]
    code, _, error = rehyat("generate", "a cat", "--model", checkpoint, *SMALL, *options, "--out", out)
    assert code == 0, error
    settings = json.loads(out.with_suffix(".json").read_text())["settings"]
    assert settings["solver"] == "Euler()"
    assert settings["schedule"] == {"grid": "official", "shift": 8.0, "num_train_timesteps": 1000}
    assert (settings["negative"], settings["guidance_scale"]) == ("static", 2.0)


@pytest.mark.parametrize(
    "prompt",
    [
        pytest.param("x " * 50_000, id="100,000 characters"),
        pytest.param("😀\ud800\0\n\u202e", id="odd"),
        tiers.full("", id="empty"),
    ],
)
def test_any_prompt_makes_a_video(rehyat, checkpoint, tmp_path, prompt):
    out = tmp_path / "a.mp4"
    code, _, error = rehyat("generate", prompt, "--model", checkpoint, *SMALL, "--out", out)
    assert code == 0, error
    assert len(read_video(out)) == 5


def test_sizes_that_do_not_divide_are_cut_and_said(rehyat, checkpoint, tmp_path):
    options = [*SMALL, "--frames", "7", "--size", "33x31", "--out", tmp_path / "a.mp4"]
    code, output, error = rehyat("generate", "a cat", "--model", checkpoint, *options)
    assert code == 0, error
    assert "rehyat: this model makes 4k + 1 frames: 5 instead of 7" in error
    assert "32x16 instead of 33x31" in error
    assert "5 frames of 32x16" in output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--size", "0x16"], ["width"]),
        (["--size", "8x8"], ["too small"]),
        (["--size", "99999x99999"], ["height"]),
        (["--size", "64"], ["--size", "832x480"]),
        (["--size", "-16x16"], ["--size"]),
        (["--frames", "0"], ["num_frames"]),
        (["--frames", "-5"], ["num_frames"]),
        (["--frames", "999999999999"], ["num_frames"]),
        (["--steps", "0"], ["steps"]),
        (["--steps", "5000"], ["steps"]),
        (["--guidance", "nan"], ["finite"]),
        (["--shift", "0"], ["shift"]),
        (["--shift", "inf"], ["shift"]),
        (["--seed", "-1"], ["seed"]),
        (["--remember", "1.5"], ["remember", "1.5"]),
        (["--remember", "clean"], ["--remember", "clean"]),
        (["--grid", "diffusers-euler"], ["UniPC"]),
        (["--out", "a.avi"], ["--out", ".mp4"]),
        (["--model", "no-such-model"], ["no-such-model", "bundled"]),
        (["--model", "/no/such/folder"], ["/no/such/folder"]),
        (["--model", "/dev/null"], ["/dev/null"]),
    ],
)
def test_a_mistake_is_one_sentence_and_no_file(rehyat, checkpoint, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    assert_sentence(rehyat("generate", "a cat", "--model", checkpoint, *SMALL, *options), *words)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "argv",
    [
        ["generate"],
        ["generate", "a", "b"],
        ["generate", "a", "--frames", "many"],
        ["generate", "a", "--nope"],
        ["generate", "a", "--dtype", "int8"],
        ["generate", "a", "--sweep", "per-week"],
        ["info"],
        ["convert", "a"],
        ["dance"],
        [""],
        [],
    ],
)
def test_wrong_arguments_exit_with_2(rehyat, argv):
    code, output, error = rehyat(*argv)
    assert (code, output) == (2, "")
    assert error
    assert "Traceback" not in error


def test_paths_that_cannot_be_written_are_known_before_the_work(rehyat, checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    for out, words in [("file/a.mp4", ["is a file, not a folder"]), ("folder.mp4", ["is a folder"])]:
        # The model does not exist either: the output is looked at first.
        assert_sentence(rehyat("generate", "a", "--model", "none", "--out", tmp_path / out), *words)


def test_a_disk_that_fills_up_is_one_sentence_and_no_file(rehyat, checkpoint, tmp_path, monkeypatch):
    """Every file of the run goes to /dev/full, where each write says that no space is left."""
    monkeypatch.setattr("rehyat_jax.runtime.record.write_record", lambda path, **_: Path("/dev/full").write_text("x"))
    result = rehyat("generate", "a cat", "--model", checkpoint, *SMALL, "--out", tmp_path / "a.mp4")
    assert_sentence(result, "no space is left on the disk")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_truncated_checkpoints(rehyat, checkpoint, tmp_path, part):
    folder = shutil.copytree(checkpoint, tmp_path / "broken")
    weights = next((folder / part).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    generate = ["generate", "a cat", "--model", folder, *SMALL, "--out", tmp_path / "a.mp4"]
    for argv in (generate, ["info", folder], ["convert", folder, tmp_path / "converted"]):
        assert_sentence(rehyat(*argv), part, "truncated")
    assert os.listdir(tmp_path) == ["broken"]


def test_info_tells_of_each_network(rehyat, checkpoint):
    code, output, _ = rehyat("info", checkpoint)
    assert code == 0
    for word in ("transformer", "vae", "text_encoder", "diffusers", "num_layers 2"):
        assert word in output
    assert_sentence(rehyat("info", checkpoint / "nothing"), "does not exist")
    assert "hybrid      blocks 0-9 of 10" in rehyat("info", "mini-sprites")[1]


def test_convert_makes_a_folder_that_runs(rehyat, checkpoint, tmp_path):
    code, output, _ = rehyat("convert", checkpoint, tmp_path / "half", "--dtype", "bfloat16")
    assert (code, output.strip()) == (0, str(tmp_path / "half"))
    assert json.loads((tmp_path / "half.json").read_text())["settings"]["dtype"] == "bfloat16"
    code, _, error = rehyat("generate", "a", "--model", tmp_path / "half", *SMALL, "--out", tmp_path / "a.mp4")
    assert code == 0, error
    assert_sentence(rehyat("convert", checkpoint, tmp_path / "half"), "not empty")
    for teacher, words in ((checkpoint, "no student"), ("no-such-model", "no-such-model")):
        assert_sentence(rehyat("convert", checkpoint, tmp_path / "both", "--teacher", teacher), words)
    assert not (tmp_path / "both").exists()
    # The bundled model has both, and is written anew with both.
    bundled = find_model("mini-sprites")
    assert rehyat("convert", bundled, tmp_path / "both", "--teacher", "mini-sprites")[0] == 0
    for part in ("", "rehyat/transformer/"):
        file = f"transformer/{part}diffusion_pytorch_model.safetensors"
        assert (tmp_path / "both" / file).read_bytes() == (bundled / file).read_bytes()


def test_help_is_quick_and_lists_the_commands():
    """It imports none of the packages that take long (0.2 s on two idle cores)."""
    script = "import sys, runpy, atexit; atexit.register(lambda: print('jax' in sys.modules))"
    script += "; sys.argv[1:] = ['--help']; runpy.run_module('rehyat_jax', run_name='__main__')"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert told.endswith("\nFalse\n")
    for name in ("generate", "info", "convert", "pretrain"):
        assert f"\n  {name}" in told


def test_version(rehyat):
    assert rehyat("--version") == (0, f"rehyat {__version__}\n", "")


def remember(argv: list[str]) -> None:
    print(f"dancing {argv}")


def run_out_of_host_memory(argv: list[str]) -> None:
    raise MemoryError


def run_out_of_device_memory(argv: list[str]) -> None:
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GiB\nmore")


def stumble(argv: list[str]) -> None:
    raise ZeroDivisionError


@pytest.fixture
def command(monkeypatch):
    """Make a function of this file the program's command "dance"."""

    def install(function) -> None:
        point = EntryPoint("dance", f"{__name__}:{function.__name__}", "rehyat.commands")
        monkeypatch.setattr(cli, "_commands", lambda: {"dance": point})

    return install


def test_commands_of_other_packages_run(rehyat, command):
    command(remember)
    assert rehyat("dance", "--fast") == (0, "dancing ['--fast']\n", "")


@pytest.mark.parametrize("function", [run_out_of_host_memory, run_out_of_device_memory])
def test_too_little_memory_is_a_sentence(rehyat, command, function):
    command(function)
    assert_sentence(rehyat("dance"), "not enough memory")


def test_a_defect_keeps_its_traceback(rehyat, command):
    command(stumble)
    with pytest.raises(ZeroDivisionError):
        rehyat("dance")


@pytest.mark.full
@pytest.mark.parametrize("line", ["denoise: ", "load: 1/1"])
def test_an_interrupt_leaves_no_broken_file(checkpoint, tmp_path, line):
    """Ctrl-C in the middle: exit code 130, one line, and the folder as it was (an old video stays)."""
    out = tmp_path / "a.mp4"
    out.write_bytes(b"old")
    argv = program(
        "generate",
        "a cat",
        "--model",
        checkpoint,
        "--size",
        "96x96",
        "--frames",
        "161",
        "--steps",
        "1000",
        "--overwrite",
        "--out",
        out,
    )
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for said in process.stderr:
            if said.startswith(line):
                break
        process.send_signal(signal.SIGINT)
        output, error = process.communicate()
    assert process.returncode == 130, error
    assert "rehyat: interrupted; nothing was written" in error
    assert "Traceback" not in error
    assert output == ""
    assert os.listdir(tmp_path) == ["a.mp4"]
    assert out.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("typed", "meant"), [("gen", "generate"), ("genrate", "generate"), ("inf", "info"), ("pre", "prepare or pretrain")]
)
def test_arguments_a_mistyped_command_is_suggested(rehyat, typed, meant):
    assert_sentence(rehyat(typed), f"there is no command {typed!r}; did you mean {meant}?")


def test_arguments_help_tells_defaults_that_say_something(rehyat):
    for command in ("generate", "info", "convert", "prepare", "export", "serve"):
        code, output, _ = rehyat(command, "--help")
        assert code == 0
        for nothing in ("default: None", "default: False", "default: ''"):
            assert nothing not in " ".join(output.split())
    # Whichever line it is broken at.
    assert "default: mini-sprites" in " ".join(rehyat("generate", "--help")[1].replace("│", "").split())


@pytest.mark.parametrize(
    ("command", "own", "others"),
    [
        ("distill", ["sprites_distill", "wan_14b_distill"], ["sprites_dit", "finetune"]),
        ("finetune", ["sprites_finetune", "wan_1_3b_finetune"], ["distill\n", "sprites_vae"]),
        ("pretrain", ["sprites_dit", "sprites_dit_longer", "sprites_vae"], ["wan_", "finetune"]),
    ],
)
def test_arguments_help_lists_a_commands_own_configurations(rehyat, command, own, others):
    code, output, _ = rehyat(command, "--help")
    assert code == 0
    listed = output.partition("Configurations")[2].partition("rehyat ")[0]
    for name in own:
        assert f"\n  {name}\n" in listed
    for name in others:
        assert name not in listed


@pytest.mark.parametrize(
    "shell",
    [
        pytest.param([], id="in front"),
        # As a shell starts `nohup rehyat … &`: the program inherits both as ignored.
        tiers.full(["sh", "-c", 'trap "" INT HUP; exec "$@"', "sh"], id="in the background"),
    ],
)
@pytest.mark.full
def test_sigterm_stops_as_ctrl_c_does_and_exits_with_143(checkpoint, tmp_path, shell):
    """Nothing is left of a per-step video, lock and partial files neither."""
    argv = program("generate", "a cat", "--model", checkpoint, "--size", "48x48", "--frames", "81", "--steps", "1000")
    argv = [*shell, *argv]
    with subprocess.Popen([*argv, "--out", tmp_path / "a.mp4"], stderr=subprocess.PIPE, text=True) as process:
        for said in process.stderr:
            if said.startswith("denoise: "):
                break
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate()
    assert process.returncode == 143, error
    assert error.strip().split("\n")[-1] == "rehyat: stopped; nothing was written"
    assert os.listdir(tmp_path) == []


def warn_of_the_cache(argv: list[str]) -> None:
    for name in ("jit_a", "jit_b"):
        why = "OSError: [Errno 28] No space left on device: '/cache/xla/x'"
        warnings.warn(f"Error writing persistent compilation cache entry for '{name}': {why}", stacklevel=1)


@pytest.mark.filterwarnings("always:Error writing persistent")  # the tests make errors of warnings
def test_a_full_disk_under_the_cache_is_said_once(rehyat, command):
    """In JAX's words of jax/_src/compiler.py, for every program."""
    command(warn_of_the_cache)
    code, _, error = rehyat("dance")
    assert (code, error.count("compiled programs are not kept"), error.count("\n")) == (0, 1, 1)


def test_paths_of_the_folder_that_one_stands_in_have_a_name(rehyat, tmp_path, monkeypatch):
    """``.`` has none of its own: the record would stand beside it under the folder's."""
    (tmp_path / "clips").mkdir()
    monkeypatch.chdir(tmp_path / "clips")
    assert_sentence(rehyat("prepare", tmp_path / "no-videos", "."), "no-videos")
    assert_sentence(rehyat("prepare", tmp_path / "no-videos", "/"), "name a folder in it")
    assert os.listdir(tmp_path) == ["clips"]


@pytest.mark.parametrize("command", ["generate", "prepare"])
def test_a_misspelt_option_is_suggested(rehyat, command):
    code, _, error = rehyat(command, "a", "b", "--repair-prompt")
    assert code == 2
    assert "--repair-prompts" in error

"""Every command of the documents is one that the program takes; those of the bundled model run as they stand."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tyro
from shared.pages import PAGES, ROOT, argv_of, console

from rehyat_jax import cli


class Parsed(BaseException):
    """The command line was understood; nothing is to be done."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_understood(page, monkeypatch, capsys):
    parse = tyro.cli

    def parsed(*args, **kwargs):
        parse(*args, **kwargs)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", parsed)
    for line in console(page):
        if line.startswith("rehyat ") and "…" not in line:
            with pytest.raises(Parsed):
                assert cli.main(argv_of(line)) is None, (line, capsys.readouterr().err)


def test_targets_of_make_are_there():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        for line in console(page):
            assert not line.startswith("make ") or line.split()[1] in targets, (page, line)


def test_the_pages_followed_in_one_folder_do_not_stand_in_each_others_way():
    """Two commands never make the same file, nor the record of another's: the program refuses to replace it."""
    made: dict[str, str] = {}
    for page in PAGES:
        for line in console(page):
            words = argv_of(line)
            if words[:1] == ["generate"] and not {"--resume", "--overwrite", "…"} & set(words):
                out = words[words.index("--out") + 1] if "--out" in words else "video.mp4"
                stem = out.rsplit(".", 1)[0]
                assert out == "-" or made.setdefault(stem, line) == line, (page.name, line, made[stem])


def test_messages_of_the_troubleshooting_page_are_the_programs_own():
    """The parts of every quoted sentence stand in the source."""
    files = [file for room in ("rehyat_jax", "train") for file in (ROOT / room).rglob("*.py")]
    source = re.sub(r'"\s*\n\s*f?"', "", "".join(file.read_text(encoding="utf-8") for file in files))
    page = (ROOT / "docs" / "how-to" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [
        text
        for line in page.splitlines()
        if line.startswith("| ")
        for text in re.findall('"(.+?)"', line.split(" | ")[0])
    ]
    assert len(quoted) > 10
    for text in quoted:
        for part in re.split(r"[…]", text):
            assert part.strip() in source, text


@pytest.mark.full
@pytest.mark.parametrize("name", ["quickstart", "videos", "stream"])
def test_commands_of_the_bundled_model_run_as_they_stand(name, tmp_path):
    """In a shell, one after the other, as a reader types them. One that goes on for hours is stopped once its state is
    saved, as the page says it can be."""
    page = next(page for page in PAGES if page.stem == name)
    for number, block in enumerate(re.findall(r"```toml\n(.*?)```", page.read_text("utf-8"), re.DOTALL)):
        (tmp_path / ("story.toml" if not number else f"{number}.toml")).write_text(re.sub(r"(?m)^ +", "", block))
    program = tmp_path / "bin" / "rehyat"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m rehyat_jax "$@"\n')
    program.chmod(0o755)
    environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    ran = 0
    for line in console(page):
        others = "~/" in line  # a checkpoint of one's own: test_own_checkpoints
        if others or not line.startswith(("rehyat generate", "echo ")):
            continue
        if "ffmpeg" in line and not shutil.which("ffmpeg"):
            continue
        shell = ["bash", "-c", line if re.search(r"[|>]", line) else f"exec {line}"]
        with subprocess.Popen(shell, cwd=tmp_path, env=environment) as process:
            if "--frames 100000" in line:
                state = tmp_path / "long.mp4.state" / "stream.safetensors"
                before = state.stat().st_mtime_ns if state.exists() else 0
                while not state.exists() or state.stat().st_mtime_ns == before:
                    assert process.poll() is None, line
                    time.sleep(0.2)
                process.send_signal(signal.SIGTERM)
                assert process.wait(120) == 143, line
            else:
                assert process.wait(900) == 0, line
        ran += 1
    assert ran

"""The Dockerfile: what can be known of it without a daemon; `docker build` itself is no test here."""

import json
import re
import tomllib
from pathlib import Path

from rehyat_jax.cli.arguments import parse_options
from rehyat_jax.cli.serve import Serve

_ROOT = Path(__file__).parents[2]
_TEXT = (_ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_its_command_is_one_that_the_program_knows():
    program, command, *rest = json.loads(re.search(r"^ENTRYPOINT (\[.*\])$", _TEXT, re.MULTILINE)[1])
    assert (program, command) == ("rehyat", "serve")
    options = parse_options(Serve, rest, command=command)
    assert f"EXPOSE {options.port}" in _TEXT
    assert f"127.0.0.1:{options.port}/health" in _TEXT
    assert options.folder.is_relative_to("/data")


def test_it_is_not_root_and_copies_what_is_installed():
    assert re.search(r"^USER (?!0|root)\S+$", _TEXT, re.MULTILINE)
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    copied = set(re.findall(r"^COPY (\w+) \w+$", _TEXT, re.MULTILINE))
    assert copied == packages
    sources = [name for line in re.findall(r"^COPY (.+) \S+$", _TEXT, re.MULTILINE) for name in line.split()]
    assert all((_ROOT / name).exists() for name in sources)
    ignored = (_ROOT / ".dockerignore").read_text(encoding="utf-8")
    assert all(f"!{name}\n" in ignored for name in packages)
    extras = set(",".join(re.findall(r"extras=([\w,]+)", _TEXT)).split(","))
    assert extras <= project["project"]["optional-dependencies"].keys()

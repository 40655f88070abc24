"""The page of models and settings says what the program does."""

import importlib.util
import re
import shlex
from pathlib import Path

from rehyat_jax.cli.arguments import parse_options
from rehyat_jax.cli.generate_options import Generate

_DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_is_the_programs_own_and_its_commands_are_understood():
    spec = importlib.util.spec_from_file_location("models_table", _DOCS / "models_table.py")
    models_table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models_table)
    page = models_table.PAGE.read_text("utf-8")
    assert models_table.written(page) == page, "python docs/models_table.py writes it anew"
    commands = re.findall(r"`rehyat generate (.+?)`", page)
    assert len(commands) == len(list(models_table.rows()))
    for command in commands:
        parse_options(Generate, shlex.split(command), command="generate")

"""Arrows between rooms point one way, as the imports in the source say."""

import ast
from pathlib import Path

import pytest

import rehyat_jax

ROOT = Path(rehyat_jax.__file__).parent

#: What a room of `rehyat_jax` may import of it, beside itself.
MAY_IMPORT = {
    "weights": {"errors", "runtime"},
}


def imports_of(file: Path) -> set[str]:
    """Dotted names of the modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, file
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_its_arrows_say(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for file in files:
        rooms = {name.split(".")[1] for name in imports_of(file) if name.startswith("rehyat_jax.")}
        assert rooms <= MAY_IMPORT[room] | {room}, file


def test_torch_is_imported_where_torch_files_are_read_and_nowhere_else():
    found = {
        str(file.relative_to(ROOT))
        for file in ROOT.rglob("*.py")
        if {"torch", "diffusers", "transformers"} & {name.split(".")[0] for name in imports_of(file)}
    }
    assert found == {"weights/torch_file.py"}

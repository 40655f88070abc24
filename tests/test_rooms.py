"""Arrows between rooms point one way, as the imports in the source say."""

import ast
from pathlib import Path

import pytest

import rehyat_jax

ROOT = Path(rehyat_jax.__file__).parent

#: What a room of `rehyat_jax` may import of it, beside itself; in an order in which none imports a later one.
MAY_IMPORT = {
    "errors": set(),
    "runtime": {"errors"},
    "attention": {"errors", "runtime"},
    "mixers": {"attention", "errors", "runtime"},
    "weights": {"errors", "runtime"},
    "adapters": {"errors", "runtime", "weights"},
    # Takes models as arguments.
    "sampling": {"errors", "runtime"},
    "video": {"errors", "runtime"},
    "models": {"adapters", "attention", "errors", "mixers", "runtime", "sampling", "video", "weights"},
    "text": {"errors", "models", "runtime"},
    "streams": {"errors", "models", "runtime", "sampling", "text", "video", "weights"},
    "pipeline": {"adapters", "errors", "mixers", "models", "runtime", "sampling", "streams", "text", "video"},
    "sprites": {"attention", "errors", "models", "pipeline", "sampling"},
    # Takes streams as arguments.
    "serve": {"errors", "runtime", "video"},
    "cli": {
        *("errors", "mixers", "models", "pipeline", "runtime", "sampling"),
        *("serve", "sprites", "streams", "text", "video"),
    },
}
#: Packages beside it that a room may import; no other room imports any.
PACKAGES = {"attention": {"pallas_kernels"}, "mixers": {"pallas_kernels"}}
OURS = {"pallas_kernels", "train", "configs", "benchmarks", "tests"}


def files_of(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py")) or [ROOT / f"{room}.py"]


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


#: What a room of `train` may import of it, beside itself, in order; each may import `rehyat_jax`, and `configs` all of
#: these.
TRAIN_MAY_IMPORT = {
    "data": set(),
    "engine": {"data"},
    "stages": {"data", "engine"},
    "cli": {"data", "engine", "stages"},
}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_its_arrows_say(room):
    for file in files_of(room):
        names = imports_of(file)
        rooms = {name.split(".")[1] for name in names if name.startswith("rehyat_jax.")} & MAY_IMPORT.keys()
        assert rooms <= MAY_IMPORT[room] | {room}, file
        assert {name.split(".")[0] for name in names} & OURS <= PACKAGES.get(room, set()), file


def test_every_room_is_listed_and_arrows_point_one_way():
    top = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or list(path.glob("*.py"))}
    assert top - {"__init__", "__main__"} == MAY_IMPORT.keys()
    before: set[str] = set()
    for room, imported in MAY_IMPORT.items():
        assert imported <= before, room
        before.add(room)


@pytest.mark.parametrize("room", TRAIN_MAY_IMPORT)
def test_a_room_of_training_imports_only_what_its_arrows_say(room):
    for file in (ROOT.parent / "train" / room).rglob("*.py"):
        names = imports_of(file)
        rooms = {name.split(".")[1] for name in names if name.startswith("train.")}
        assert rooms <= TRAIN_MAY_IMPORT[room] | {room}, file
        # Commands share the program's own reading of arguments; nothing else knows a command.
        assert room == "cli" or not any(name.startswith("rehyat_jax.cli") for name in names), file
        assert not {name.split(".")[0] for name in names} & (OURS - {"train"}), file


def test_every_room_of_training_is_listed_and_arrows_point_one_way():
    rooms = {path.name for path in (ROOT.parent / "train").iterdir() if list(path.glob("*.py"))}
    assert rooms == TRAIN_MAY_IMPORT.keys()
    before: set[str] = set()
    for room, imported in TRAIN_MAY_IMPORT.items():
        assert imported <= before, room
        before.add(room)


def test_configurations_import_what_they_configure():
    for file in (ROOT.parent / "configs").rglob("*.py"):
        names = imports_of(file)
        ours = {name.split(".")[0] for name in names} & ({"rehyat_jax"} | OURS)
        assert ours <= {"rehyat_jax", "train"}, file
        assert not any(name.startswith(("train.cli", "rehyat_jax.cli")) for name in names), file


def test_kernels_take_arrays_and_know_nothing_of_the_package():
    for file in (ROOT.parent / "pallas_kernels").rglob("*.py"):
        assert not {name.split(".")[0] for name in imports_of(file)} & ({"rehyat_jax"} | OURS - {"pallas_kernels"}), (
            file
        )


def test_torch_is_imported_where_torch_files_are_read_and_nowhere_else():
    found = {
        str(file.relative_to(ROOT))
        for file in ROOT.rglob("*.py")
        if {"torch", "diffusers", "transformers"} & {name.split(".")[0] for name in imports_of(file)}
    }
    assert found == {"weights/torch_file.py"}

"""Arrows between rooms point one way, as the imports in the source say."""

import ast
import re
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
PACKAGES = {"adapters": {"pallas_kernels"}, "attention": {"pallas_kernels"}, "mixers": {"pallas_kernels"}}
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


def test_there_are_few_rooms():
    """18 at the top of `rehyat_jax`, its two files that every package has aside, and 6 of `train`."""
    assert len(MAY_IMPORT) <= 18
    assert len(TRAIN_MAY_IMPORT) <= 6


def _source(*folders: str) -> dict[str, ast.Module]:
    files = [file for folder in folders for file in sorted((ROOT.parent / folder).rglob("*.py"))]
    return {str(file.relative_to(ROOT.parent)): ast.parse(file.read_text(encoding="utf-8")) for file in files}


#: More than eight parameters: the operator and those who have its arguments; the bodies of kernels, whose parameters
#: are Pallas's references; and what follows.
LONG = {
    # What outside programs call, keyword by keyword, after diffusers: a stable contract (docs/stability.md).
    "pipeline.py": {"__init__", "__call__", "from_pretrained", "run"},
    "streams/opening.py": {"open_stream"},
    # `rehyat_jax.convert`; `load_transformer`'s keywords and the expert's name; a call's, of which settings are made.
    "models/checkpoints": {"convert", "open_transformer"},
    "models/own_settings.py": {"settings"},
    # Fixed as well.
    "attention": {"hybrid_attention", "reference", "scan", "pallas", "hybrid_over_devices"},
    "pallas_kernels": {
        *("hybrid", "attend", "call", "_forward", "_forward_kernel", "_backward_queries", "_backward_keys"),
        *("_softmax_backward_kernel", "_linear_backward_kernel"),
    },
    # Modules, which take flax's own: kernel_init, dtype, param_dtype, rngs.
    "attention/features.py": {"__init__"},
    "models/wan/conv.py": {"__init__"},
    # Of the sweep's parts: each array of a program is an argument, for what is donated and what is traced.
    "sampling": {"denoise_chunk", "recorded_chunk", "advance_chunk", "commit_chunk"},
    "models/wan/forced.py": {"forced", "attend_forced"},
    "train/stages/blockwise.py": {"learn"},
}


def test_a_signature_of_more_than_eight_parameters_takes_an_object():
    for file, tree in _source("rehyat_jax", "train", "pallas_kernels").items():
        allowed = {name for place, names in LONG.items() if f"/{place}" in f"/{file}" for name in names}
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef):
                continue
            arguments = node.args
            names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            count = len([name for name in names if name not in ("self", "cls")])
            assert count <= 8 or node.name in allowed, f"{file}: {node.name} has {count}"


def test_nothing_asks_which_kind_an_object_is_but_its_own_file():
    """``x.kind == …``, where the class with a field ``kind`` is another file's; but for what a file format has: numpy's
    kinds of numbers, an mp4's boxes, a tensor's."""
    trees = _source("rehyat_jax", "train")
    found = {
        file
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        and isinstance(node.left, ast.Attribute)
        and node.left.attr == "kind"
        and isinstance(node.ops[0], ast.Eq | ast.NotEq)
    }
    own = {
        file
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "kind")
        or (isinstance(node, ast.FunctionDef) and node.name == "kind")  # a property
    }
    assert found - own <= {"rehyat_jax/video/growing.py", "rehyat_jax/weights/plan.py", "rehyat_jax/weights/scaled.py"}


def _named(tree: ast.Module) -> set[str]:
    """What a file names, and does not define."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    # Entry points and the like; not the names in sentences.
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return names | {part for string in strings if " " not in string for part in string.replace(":", ".").split(".")}


def test_nothing_is_named_by_tests_alone():
    """Every function, class and method is used by the packages or by configurations, or is in the documents for users;
    IPython asks for one by its name."""
    trees = _source("rehyat_jax", "train", "pallas_kernels")
    used = set().union(*map(_named, (trees | _source("configs")).values()))
    pages = [*(ROOT.parent / "docs").glob("*.md"), *(ROOT.parent / "docs" / "how-to").glob("*.md")]
    for folder in ("api", "extend"):
        pages += (ROOT.parent / "docs" / folder).glob("*.md")
    told = set(re.findall(r"\w+", "\n".join(page.read_text(encoding="utf-8") for page in pages)))
    for file, tree in trees.items():
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        for node in (*tree.body, *(member for each in classes for member in each.body)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("__"):
                assert node.name in used | told | {"_repr_html_"}, f"{file}: {node.name}"

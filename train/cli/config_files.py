"""Configurations as Python files: one file a run, named by its path or, in the package ``configs``, by its name."""

from __future__ import annotations

import ast
import importlib.util
import os
import pkgutil
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.runtime.files import reason


class ConfigFile(NamedTuple):
    """What a file defines as ``config``, and its docstring."""

    config: Any
    about: str


def bundled_configs(kinds: tuple[type, ...] = (object,)) -> dict[str, Path]:
    """The files of the package ``configs`` whose ``config`` is of one of ``kinds``, by name; none is executed."""
    spec = importlib.util.find_spec("configs")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = {
        module.name: Path(folder) / f"{module.name}.py"
        for folder in folders
        for module in pkgutil.iter_modules([folder])
        if not module.ispkg
    }
    names = {kind.__name__ for kind in kinds}
    return files if object in kinds else {name: path for name, path in files.items() if _class_name(path) in names}


def _class_name(path: Path) -> str | None:
    """Of a file's ``config = Class(…)``."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["config"]:
            return ast.unparse(node.value.func).split(".")[-1] if isinstance(node.value, ast.Call) else None
    return None


def load_config(name_or_path: str | os.PathLike[str], *, kinds: tuple[type, ...]) -> ConfigFile:
    """Execute a configuration file: it is a Python program, with all that this means for files from elsewhere.

    Args:
        name_or_path: a name within ``configs``, or any file's path.
        kinds: what ``config`` may be an instance of.

    Raises:
        ConfigError: there is no such file, it fails, or it does not define ``config`` of one of ``kinds``.
    """
    name = os.fspath(name_or_path)
    path = bundled_configs().get(name, Path(name))
    try:
        source = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        names = ", ".join(bundled_configs(kinds)) or "none"
        raise ConfigError(f"there is no file {name[:200]!r}, nor a configuration of that name ({names})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file") from error
    except OSError as error:
        raise ConfigError(f"cannot read {name[:200]!r}: {reason(error)}") from error
    except ValueError as error:  # a null character
        raise ConfigError(f"{name[:200]!r} is no path") from error
    module = types.ModuleType("rehyat_config")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where a dataclass of the file's own looks for its names
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
    except RehyatError as error:
        raise ConfigError(f"{path}: {error}") from error
    except Exception as error:  # whatever a program may raise
        raise ConfigError(f"{path} cannot be executed: {type(error).__name__}: {error}") from error
    if not hasattr(module, "config"):
        raise ConfigError(f"{path} does not define config")
    if not isinstance(module.config, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ConfigError(f"in {path}, config is not a {wanted} but a {type(module.config).__name__}")
    return ConfigFile(module.config, module.__doc__ or "")

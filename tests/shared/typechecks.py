"""Types that functions say are checked at each call, at a price that the tests can pay.

jaxtyping's own decorator compiles two functions for each of a package's at import, and at each call binds the arguments
to a signature and keeps a record of sizes: a third of all CPU time of the tests, most of it for functions that name no
array. Here a function is looked at when it is first called; where it names an array it is jaxtyping's as before, else
beartype alone checks the same types.
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import beartype

_jaxtyped = jaxtyping.jaxtyped


def check_types(*packages: str) -> None:
    """In every module of these that is imported from now on."""
    jaxtyping.jaxtyped = _checked  # which the hook's decorators look up
    jaxtyping.install_import_hook(packages, "beartype.beartype")


def _checked(*, typechecker: Callable) -> Callable:
    def decorate(found: Any) -> Any:
        if not inspect.isclass(found):
            return _when_called(found, typechecker)
        made = found.__dict__.get("__init__") if dataclasses.is_dataclass(found) else None
        if made is not None and not hasattr(made, "checks_types"):
            found.__init__ = _when_called(made, typechecker)
        return found

    return decorate


def _when_called(function: Callable, typechecker: Callable) -> Callable:
    checked, config = None, jaxtyping.config

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked
        if config.jaxtyping_disable:
            return function(*args, **kwargs)
        if checked is None:
            checked = _with_checks(function, typechecker)
        return checked(*args, **kwargs)

    call.checks_types = True
    return call


def _with_checks(function: Callable, typechecker: Callable) -> Callable:
    hints = _hints(function)
    if any(map(_names_an_array, hints.values())):
        return _jaxtyped(function, typechecker=typechecker)
    function.__annotations__ = hints
    return beartype(function)


def _hints(function: Callable) -> dict[str, Any]:
    """By parameter; what only a type checker imports is anything, as it is for jaxtyping."""
    try:
        return typing.get_type_hints(function, include_extras=True)
    except Exception:
        pass
    found = {}
    for name, hint in function.__annotations__.items():

        def probe() -> None: ...

        probe.__annotations__ = {name: hint}
        try:
            found |= typing.get_type_hints(probe, function.__globals__, include_extras=True)
        except Exception:
            found[name] = Any
    return found


def _names_an_array(hint: Any) -> bool:
    if isinstance(hint, list):
        return any(map(_names_an_array, hint))
    if inspect.isclass(hint) and issubclass(hint, (jaxtyping.AbstractArray, jaxtyping.PyTree)):
        return True
    return any(map(_names_an_array, typing.get_args(hint)))

"""The program ``rehyat``: finds the command, runs it, and turns mistakes into one sentence and exit code 2.

Commands of other packages (training) come from the entry points of the group ``rehyat.commands``, so that nothing here
imports them by name. Nothing heavy is imported before a command needs it: ``rehyat --help`` does not load JAX.
"""

from __future__ import annotations

import ast
import difflib
import importlib.metadata
import importlib.util
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rehyat_jax import __version__
from rehyat_jax.errors import NotFiniteError, RehyatError, RehyatWarning
from rehyat_jax.runtime.files import reason

#: Exit codes: done, failed (by a defect, or by numbers that are not finite), the user's mistake, interrupted
#: (128 + SIGINT), stopped (128 + SIGTERM).
DONE, FAILED, MISTAKE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143

_BUILT_IN = {
    "generate": "rehyat_jax.cli.generate:main",
    "info": "rehyat_jax.cli.info:main",
    "convert": "rehyat_jax.cli.convert:main",
    "serve": "rehyat_jax.cli.serve:main",
    "eval": "rehyat_jax.cli.evaluate:main",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``rehyat ARGV…`` and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = _commands()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help(commands), file=sys.stdout if arguments else sys.stderr)
        return DONE if arguments else MISTAKE
    if arguments[0] == "--version":
        print(f"rehyat {__version__}")
        return DONE
    name, *rest = arguments
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1, cutoff=0.5)
        near = [command for command in commands if name and command.startswith(name)] or near
        meant = f"; did you mean {' or '.join(near)}?" if near else "."
        return _mistake(f"there is no command {name[:80]!r}{meant or '.'} The commands are {', '.join(commands)}")
    stopped: list[int] = []
    try:
        with _warnings_as_sentences(), _stoppable(stopped):
            return _load(commands[name])(rest) or DONE
    except SystemExit as stop:  # the argument parser has said what it had to say
        return stop.code if isinstance(stop.code, int) else MISTAKE if stop.code else DONE
    except KeyboardInterrupt as interrupt:
        how = "rehyat: stopped" if stopped else "\nrehyat: interrupted"
        print(how + "".join(f"; {note}" for note in interrupt.args), file=sys.stderr)
        code = TERMINATED if stopped else INTERRUPTED
        if argv is None and "jax" in sys.modules:
            # The program's own end: taking JAX down under a computation that still runs may crash, with another code.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None or os.environ.get("REHYAT_TRACEBACK") == "1":
            raise
        _mistake(sentence)
        return FAILED if isinstance(error, NotFiniteError) else MISTAKE


def _commands() -> dict[str, importlib.metadata.EntryPoint]:
    group = "rehyat.commands"
    built_in = [importlib.metadata.EntryPoint(name, value, group) for name, value in _BUILT_IN.items()]
    found = sorted(importlib.metadata.entry_points(group=group), key=lambda point: point.name)
    return {point.name: point for point in [*found, *built_in]}  # a built-in command cannot be replaced


def _load(command: importlib.metadata.EntryPoint) -> Callable[[list[str]], int | None]:
    try:
        return command.load()
    except ModuleNotFoundError as error:
        raise RehyatError(
            f"the command {command.name} needs the module {error.name}, which is not installed"
        ) from error


def _help(commands: Mapping[str, importlib.metadata.EntryPoint]) -> str:
    order = [*_BUILT_IN, *(name for name in commands if name not in _BUILT_IN)]
    width = max(map(len, order))
    lines = [f"  {name:{width}}  {_summary(commands[name])}".rstrip() for name in order]
    return "\n".join(
        [
            "usage: rehyat COMMAND …",
            "",
            "Wan video diffusion transformers in JAX, and their conversion into models that recur.",
            "",
            *lines,
            "",
            "rehyat COMMAND --help tells a command's arguments; rehyat --version the version.",
        ]
    )


def _summary(command: importlib.metadata.EntryPoint) -> str:
    """The first line of the docstring of the command's module, read without importing the module."""
    with suppress(ImportError, OSError, SyntaxError, ValueError):
        spec = importlib.util.find_spec(command.module)
        if spec is not None and spec.origin is not None:
            docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
            return (docstring or "").split("\n")[0].replace("`", "")
    return ""


@contextmanager
def _stoppable(came: list[int]) -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does, so that nothing is left half written; a second one kills.

    Args:
        came: gets the signal's number.
    """

    def stop(number: int, _: Any) -> None:
        came.append(number)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _warnings_as_sentences() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("always", RehyatWarning)
        show, told = warnings.showwarning, set[str]()

        def say(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, RehyatWarning):
                print(f"rehyat: {message}", file=sys.stderr)
            elif (cache := "persistent compilation cache") in str(message):
                # JAX says it of every program; a run goes on without.
                if cache not in told:
                    why = str(message).strip().splitlines()[-1].rpartition(": ")[2]
                    print(f"rehyat: compiled programs are not kept, or not read: {why[:200]}", file=sys.stderr)
                told.add(cache)
            else:
                show(message, category, *where, **more)

        warnings.showwarning = say
        yield


def _mistake(sentence: str) -> int:
    line = "".join(c if c.isprintable() else " " for c in sentence)
    print(f"rehyat: {' '.join(line.split())[:2000]}", file=sys.stderr)
    return MISTAKE


def _sentence(error: Exception) -> str | None:
    """What to tell the user; None for a defect of the program, whose traceback is wanted."""
    if isinstance(error, RehyatError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename}: {reason(error)}" if error.filename else reason(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        first = str(error).strip().split("\n")[0][:200]
        return f"there is not enough memory; fewer frames or a smaller size need less ({first or 'out of memory'})"
    return None

"""What the commands of training share: ``rehyat COMMAND CONFIG [--field value …]``, its help, its record, its exit."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tyro

from rehyat_jax.cli import TERMINATED
from rehyat_jax.cli.arguments import hide_missing_defaults
from rehyat_jax.errors import ConfigError
from rehyat_jax.runtime.devices import first_process
from rehyat_jax.runtime.outputs import owned_output
from rehyat_jax.runtime.record import Phases
from train.cli.config_files import bundled_configs, load_config
from train.engine.identity import settings_of
from train.engine.run import RunConfig

#: The classes that ``config`` may be of; a function, so that finding a command loads none of them.
Kinds = Callable[[], tuple[type, ...]]


def run_training(command: str, argv: list[str], *, about: str, kinds: Kinds) -> int:
    """``rehyat COMMAND CONFIG [--field value …]``; continues from the checkpoints in ``--out`` by itself.

    Args:
        command: its name.
        about: what the command does, for its help.

    Returns:
        0: done. 143: stopped by SIGTERM with a checkpoint saved; the result is not there yet, and a job system that
            took this for success would take half a training for the whole.

    Raises:
        KeyboardInterrupt: stopped by Ctrl-C, with a checkpoint saved.
        RehyatError: a mistake in the file, a field or the output folder; training diverged.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(_help(command, about, kinds()), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    name, *fields = argv
    # Those that are given alone: a configuration whose `run` knows neither is a run as any other.
    asked = {flag: True for flag in ("change", "force") if f"--{flag}" in fields}
    fields = [field for field in fields if field not in ("--change", "--force")]
    if name.startswith("-"):
        raise ConfigError(f"the configuration comes before its fields: rehyat {command} CONFIG {name[:80]} …")
    training = parse(command, name, fields, kinds=kinds())
    training.processes.join()
    record = training.result.with_name(f"{training.result.name}.json")
    # Now, not after the training. Processes of one run share an output, which the first one owns.
    owned = owned_output(training.result, command=f"rehyat {command}", beside=[record], is_folder=True)
    with owned if first_process() else contextlib.nullcontext():
        return _run(training, command, name, record, asked)


def _run(training: RunConfig, command: str, name: str, record: Path, asked: Mapping[str, bool]) -> int:
    from rehyat_jax.runtime.compilation import cache_folder, keep_compiled
    from rehyat_jax.runtime.record import write_record
    from train.engine.loop import Stopped

    keep_compiled(cache_folder())
    phases = Phases()
    try:
        training.run(phases, **asked)
    except Stopped as stop:
        said = f"step {stop.step} is saved, and the same command continues from there"
        if stop.signal_number == signal.SIGINT:
            raise KeyboardInterrupt(said) from None
        if first_process():
            print(f"rehyat: stopped; {said}", file=sys.stderr)
        return TERMINATED
    if not first_process():
        return 0
    write_record(
        record,
        command=f"rehyat {command}",
        settings={"config": name, **settings_of(training)},
        phases=phases,
        output=training.result,
        last=_last_metrics(training.folder.metrics),
    )
    print(training.result)
    return 0


def parse(command: str, name: str, fields: list[str], *, kinds: tuple[type, ...]) -> RunConfig:
    """The file's configuration with fields replaced."""
    config, about = load_config(name, kinds=kinds)
    hide_missing_defaults(type(config))
    training, unknown = tyro.cli(
        type(config),
        default=config,
        args=fields,
        prog=f"rehyat {command} {name}",
        description=about,
        return_unknown_args=True,
    )
    if unknown:
        raise ConfigError(f"{name} has no field {unknown[0][:80]!r}; rehyat {command} {name} --help tells its fields")
    return training


def _help(command: str, about: str, kinds: tuple[type, ...]) -> str:
    configs = "\n".join(f"  {name}" for name in bundled_configs(kinds))
    return (
        f"usage: rehyat {command} CONFIG [--field value …]\n\n"
        f"{about.replace('`', '').strip()}\n\n"
        "CONFIG is the path of a Python file, or the name of one in the package configs. It is executed, so take\n"
        "files from people you trust only.\n\n"
        f"Configurations for {command} that ship with the package:\n{configs}\n\n"
        f"rehyat {command} CONFIG --help tells what it does and its fields. A run that was stopped goes on when the\n"
        "same command is given again. --change lets it go on with other --steps, learning rates, mesh or validation;\n"
        "--force begins although memory is estimated to be too small."
    )


def _last_metrics(path: Path) -> Any:
    """What was logged last: the loss, the rate, the step that this process began at."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return json.loads(lines[-1]) if lines else None

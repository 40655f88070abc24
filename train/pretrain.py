"""Train a model from nothing, as a configuration file says.

CONFIG is the path of a Python file, or the name of one in the package ``configs``. It is executed, so take files from
people you trust only. It defines ``config``, a `train.vae.VAETraining` or a `train.diffusion.DiffusionTraining`.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from pathlib import Path
from typing import Any

import tyro

from rehyat_jax.errors import ConfigError
from rehyat_jax.files import check_writable
from train.config_files import bundled_configs, load_config


def main(argv: list[str]) -> int:
    """``rehyat pretrain CONFIG [--field value …]``; continues from the checkpoints in ``--out`` by itself.

    Returns:
        0: done, or stopped by SIGTERM with a checkpoint saved.

    Raises:
        KeyboardInterrupt: stopped by Ctrl-C, with a checkpoint saved.
        RehyatError: a mistake in the file, a field or the output folder; training diverged.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(_help(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    name, *fields = argv
    if name.startswith("-"):
        raise ConfigError(f"the configuration comes before its fields: rehyat pretrain CONFIG {name[:80]} …")
    training = _parse(name, fields)
    record = training.result.with_suffix(".json")
    check_writable(record)  # now, not after the training

    from rehyat_jax.compilation import cache_folder, keep_compiled
    from rehyat_jax.record import Phases, write_record
    from train.loop import Stopped

    keep_compiled(cache_folder())
    phases = Phases()
    try:
        training.run(phases)
    except Stopped as stop:
        said = f"step {stop.step} is saved, and the same command continues from there"
        if stop.signal_number == signal.SIGINT:
            raise KeyboardInterrupt(said) from None
        print(f"rehyat: stopped; {said}", file=sys.stderr)
        return 0
    write_record(
        record,
        command="rehyat pretrain",
        settings={"config": name, **dataclasses.asdict(training)},
        phases=phases,
        last=_last_metrics(training.train_folder / "metrics.jsonl"),
    )
    print(training.result)
    return 0


def _parse(name: str, fields: list[str]) -> Any:
    """The file's configuration with fields replaced."""
    from train.diffusion import DiffusionTraining
    from train.vae import VAETraining

    config, about = load_config(name, kinds=(VAETraining, DiffusionTraining))
    training, unknown = tyro.cli(
        type(config), default=config, args=fields, prog=f"rehyat pretrain {name}", description=about,
        return_unknown_args=True,
    )  # fmt: skip
    if unknown:
        raise ConfigError(f"{name} has no field {unknown[0][:80]!r}; rehyat pretrain {name} --help tells its fields")
    return training


def _help() -> str:
    configs = "\n".join(f"  {name}" for name in bundled_configs())
    return (
        "usage: rehyat pretrain CONFIG [--field value …]\n\n"
        f"{(__doc__ or '').replace('`', '').strip()}\n\n"
        f"Configurations that ship with the package:\n{configs}\n\n"
        "rehyat pretrain CONFIG --help tells what it does and its fields. A run that was stopped goes on when the\n"
        "same command is given again."
    )


def _last_metrics(path: Path) -> Any:
    """What was logged last: the loss, the rate, the step that this process began at."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return json.loads(lines[-1]) if lines else None

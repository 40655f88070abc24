"""Text files that people write: captions, lists of prompts, JSON lines."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from rehyat_jax.errors import ConfigError
from rehyat_jax.runtime.files import reason


def read_text(path: str | os.PathLike[str], *, what: str | None = None) -> str:
    """A file's text, without the byte order mark that editors on Windows begin it with.

    Args:
        what: how an error names the file; its path when not given.

    Raises:
        ConfigError: the file cannot be read, or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        why = "it does not exist" if isinstance(error, FileNotFoundError) else reason(error)
        raise ConfigError(f"cannot read {what or path}: {why}") from error
    except ValueError as error:  # not UTF-8, or a null character in the name
        raise ConfigError(f"{what or path} is not a text file in UTF-8") from error


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, stripped, with their numbers from 1 on.

    A line ends where an editor ends it. What else ``str.splitlines`` takes for an end (U+2028, U+0085, form feeds, …)
    stands within prompts that were copied from web pages.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if stripped := line.strip():
            yield number, stripped

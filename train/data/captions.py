"""Lists of videos and captions: JSON lines, JSON or a table, with columns of any name; and text files of captions."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rehyat_jax.errors import ConfigError
from rehyat_jax.text.files import numbered_lines, read_text

#: Lists that are read without being named, the first that is there.
LISTS = ("metadata.jsonl", "metadata.csv", "metadata.json")
_TABLES = {".csv": ",", ".tsv": "\t"}


class Row(NamedTuple):
    """One entry of a list."""

    #: Where it stands, for sentences: "line 3 of clips/metadata.jsonl".
    where: str
    #: A path as the list gives it, and the caption; either is None where the entry has no text for it.
    file: str | None
    caption: str | None


def read_list(path: Path, *, file_column: str, caption_column: str) -> list[Row]:
    """A list's entries, in its order.

    ``.jsonl``: an object a line. ``.json``: an array of objects, or an object from files to captions or to objects.
    ``.csv`` and ``.tsv``: a table whose first line names the columns.

    Args:
        file_column, caption_column: the names of the two columns, or of an object's two fields.

    Raises:
        ConfigError: it cannot be read, is none of these, or has no entry with such columns.
    """
    text = read_text(path)
    if (separator := _TABLES.get(path.suffix.lower())) is not None:
        entries = _table(path, text, separator)
    elif path.suffix.lower() == ".json":
        entries = _array(path, text, file_column, caption_column)
    else:
        entries = _lines(path, text)
    rows, columns = [], set[str]()
    for where, entry in entries:
        values = {name: entry.get(name) for name in (file_column, caption_column)}
        columns |= set(map(str, entry))
        file, caption = (value if isinstance(value, str) else None for value in values.values())
        rows.append(Row(where, file, caption))
    missing = [name for name in (file_column, caption_column) if name not in columns]
    if columns and missing:
        raise ConfigError(
            f"{path} has no column {missing[0]!r} (it has {', '.join(sorted(columns))[:200]}): "
            "name its columns by --file-column and --caption-column"
        )
    return rows


def _lines(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in numbered_lines(text):
        yield f"line {number} of {path}", _object(line)


def _object(line: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _array(path: Path, text: str, file_column: str, caption_column: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if isinstance(content, dict):
        content = [
            {file_column: file, **(value if isinstance(value, dict) else {caption_column: value})}
            for file, value in content.items()
        ]
    if not isinstance(content, list):
        raise ConfigError(f"{path} is neither an array of objects nor an object from files to captions")
    for number, value in enumerate(content, 1):
        yield f"entry {number} of {path}", value if isinstance(value, dict) else {}


def _table(path: Path, text: str, separator: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        for row in reader:
            yield f"line {reader.line_num} of {path}", {k: v for k, v in row.items() if k is not None}
    except csv.Error as error:
        raise ConfigError(f"{path} is not a table: {error}") from error

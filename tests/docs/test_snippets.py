"""Every Python snippet of the documents for users runs as it stands."""

import re
from pathlib import Path

import pytest
from shared import tiers

_DOCS = Path(__file__).parents[2] / "docs"
#: With as many steps as the model's own, or many programs to compile: for the tier that has the time.
_LONG = [
    _DOCS.parent / "README.md",
    _DOCS / "quickstart.md",
    *(_DOCS / "how-to" / name for name in ("videos.md", "devices.md")),
]
_PAGES = [page for page in sorted((_DOCS / "how-to").glob("*.md")) if page not in _LONG]


def _snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "page",
    [page for page in _PAGES if _snippets(page)] + [tiers.full(page) for page in _LONG],
    ids=lambda page: page.stem,
)
def test_snippets_run_as_they_stand(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, snippet in enumerate(_snippets(page)):
        exec(compile(snippet, f"{page.name}[{number}]", "exec"), names)

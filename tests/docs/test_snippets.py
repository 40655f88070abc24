"""Every Python snippet of the documents for users runs as it stands."""

import re
from pathlib import Path

import pytest

_DOCS = Path(__file__).parents[2] / "docs"
_PAGES = [_DOCS / "quickstart.md", *sorted((_DOCS / "how-to").glob("*.md"))]


def _snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in _PAGES if _snippets(page)], ids=lambda page: page.stem)
def test_snippets_run_as_they_stand(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, snippet in enumerate(_snippets(page)):
        exec(compile(snippet, f"{page.name}[{number}]", "exec"), names)

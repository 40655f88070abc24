"""Pictures of the documents: there, small enough for a page that is looked at once, and the first one moves."""

import re
from pathlib import Path

import pytest
from PIL import Image

_ROOT = Path(__file__).parents[2]
_PAGES = [_ROOT / "README.md", *sorted((_ROOT / "docs").rglob("*.md"))]


def pictures(page: Path) -> list[Path]:
    text = page.read_text(encoding="utf-8")
    names = re.findall(r'<img src="([^":]+)"|!\[[^\]]*\]\(([^):]+)\)', text)
    return [(page.parent / (first or second)).resolve() for first, second in names]


@pytest.mark.parametrize("page", [page for page in _PAGES if pictures(page)], ids=lambda page: page.stem)
def test_pictures_are_there_and_small(page):
    """A quarter of a megabyte is two seconds of a slow line (1 Mbit/s)."""
    for file in pictures(page):
        assert 0 < file.stat().st_size <= 250_000, file


def test_the_readme_begins_with_a_picture_that_moves_and_has_one_of_the_live_page():
    first, *others = pictures(_ROOT / "README.md")
    assert first.stat().st_size <= 100_000
    with Image.open(first) as picture:
        assert picture.is_animated
        assert picture.n_frames >= 16  # a second
    assert _ROOT / "docs" / "images" / "page.png" in others

"""The documents' pages and the commands in them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "docs" / "quickstart.md", *sorted((ROOT / "docs" / "how-to").glob("*.md"))]


def console(page: Path) -> list[str]:
    """The lines of a page's console blocks, without their comments."""
    blocks = re.findall(r"^```console\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def argv_of(line: str) -> list[str]:
    """What ``rehyat`` is given of a line."""
    return shlex.split(line.split(" | ")[0].split(" > ")[0])[1:]

"""Which tests run when: ``make check``, ``make test`` and ``make test-all``.

- ``check``: what is known by ``tests/durations.json`` to cost at most ``CHECK_SECONDS``: nothing that compiles much.
- ``test`` (pytest's default here): every claim once, at a small size: all but ``full``.
- ``rest``: what ``make test-all`` adds: ``full`` tests and parameters, ``wider`` ones with all their cases, and
  hypothesis at its full strength.
- ``all``: both.

A test or a whole file joins the last by ``@pytest.mark.full``, some of its parameters by ``full(...)`` or
``breadth(...)``; a property has its number of examples by ``examples(...)``. ``@pytest.mark.wider`` is of a test that
runs in both, in ``test`` with the first of its cases (``chosen``).
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

TIERS = ("check", "test", "rest", "all")
#: The largest cost of a test of ``check``, with all the fixtures that it asks for, in CPU seconds.
CHECK_SECONDS = 0.3
DURATIONS = Path(__file__).parents[1] / "durations.json"

#: Set by conftest before test files are imported; child processes have it from their environment.
tier = os.environ.get("REHYAT_TEST_TIER", "test")


def full(*values: Any, id: str | None = None) -> Any:
    """One set of parameters that ``make test-all`` alone runs."""
    return pytest.param(*values, marks=pytest.mark.full, id=id)


def examples(most: int) -> int:
    """Hypothesis's number of examples: ``most`` at full strength, else a tenth of it (three at least)."""
    return most if tier in ("rest", "all") else max(3, most // 10)


def chosen(cases: Sequence[Any], *, test: int = 1) -> Sequence[Any]:
    """The first ``test`` of several cases, or all of them: for cases that are no parameters, but share a program or a
    process. Also in child processes (``shared.devices``), which are told the tier."""
    return cases if tier in ("rest", "all") else cases[:test]


def breadth(cases: Iterable[Any], *, test: int = 1) -> list[Any]:
    """Parameters of which ``make test`` runs the first ``test`` and ``make test-all`` the others."""
    return [
        case if number < test else full(*(case if isinstance(case, tuple) else (case,)))
        for number, case in enumerate(cases)
    ]


def runs(item: pytest.Item, costs: "Costs") -> bool:
    """Whether a collected test is of the tier that was asked for."""
    marked = item.get_closest_marker("full") is not None
    match tier:
        case "check":
            known = item.nodeid.partition("::")[0] in costs.files
            return not marked and known and costs.of(item) <= CHECK_SECONDS
        case "test":
            return not marked
        case "rest":
            wider = item.get_closest_marker("wider") is not None
            return marked or wider or getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
        case _:
            return True


#: By name.
Seconds = dict[str, float]


class Costs:
    """CPU seconds, children's included, that test functions and fixtures took when they were last recorded.

    ``tests``: a function's calls, over its parameters that are not ``full``. ``fixtures``: one set-up, without those
    that it asks for. A name that is not listed is new, or cost less than ``least``. ``files``: all that ran of a file;
    one not listed was never recorded, and nothing is known to be cheap in it.
    """

    least = 0.2

    def __init__(self) -> None:
        recorded = json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}
        self.tests: dict[str, float] = recorded.get("tests", {})
        self.fixtures: dict[str, float] = recorded.get("fixtures", {})
        self.files: dict[str, float] = recorded.get("files", {})

    def of(self, item: pytest.Item) -> float:
        """A test's own cost, and that of each fixture that it asks for."""
        found = getattr(item, "_fixtureinfo", None)
        definitions = [] if found is None else [last[-1] for last in found.name2fixturedefs.values() if last]
        return self.tests.get(function_of(item.nodeid), 0.0) + sum(
            self.fixtures.get(fixture_name(definition), 0.0) for definition in definitions
        )

    def write(self, *, files: Seconds, tests: Seconds, fixtures: Seconds, keep: bool) -> None:
        """With ``keep``, a figure of before stays where it is larger: a test costs more where another that compiled for
        it does not run."""
        for ours, new in ((self.tests, tests), (self.fixtures, fixtures), (self.files, files)):
            for name, seconds in new.items():
                ours[name] = max(seconds, ours.get(name, 0.0)) if keep else seconds
        parts = {
            kind: {name: round(s, 1) for name, s in sorted(ours.items()) if s >= least}
            for kind, ours, least in (
                ("files", self.files, 0.0),
                ("tests", self.tests, self.least),
                ("fixtures", self.fixtures, self.least),
            )
        }
        DURATIONS.write_text(json.dumps(parts, indent=0) + "\n")


def function_of(nodeid: str) -> str:
    """A test function's name: its node's without parameters."""
    return nodeid.partition("[")[0]


def fixture_name(definition: Any) -> str:
    return f"{definition.baseid}::{definition.argname}"


def cpu_seconds() -> float:
    """Of this process and the children that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system

"""Progress in notebooks: one bar in the cell's output, replaced as it goes on."""

from __future__ import annotations

import sys
import time
from typing import Any

#: Seconds between two pictures of the bar.
_PAUSE = 0.2


def in_notebook() -> bool:
    """Whether this is a kernel whose output is shown as HTML."""
    shell = sys.modules.get("IPython")
    return shell is not None and type(shell.get_ipython()).__name__ == "ZMQInteractiveShell"


def not_shown(phase: str, done: int, total: int) -> None:
    """Progress that nobody asked to see."""


class NotebookProgress:
    """Called as (phase, steps done, steps in all): ``pipe(prompt, on_step=…)`` has it in a notebook by itself."""

    def __init__(self) -> None:
        self._shown: Any = None
        self._phase, self._begun, self._last = "", 0.0, 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        from IPython.display import HTML, display

        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._begun = phase, now
        elif done < total and now - self._last < _PAUSE:
            return
        self._last = now
        passed = now - self._begun
        left = f", {passed / done * (total - done):.0f} s left" if 0 < done < total else ""
        bar = HTML(f'{phase} <progress value="{done}" max="{total}"></progress> {done}/{total}, {passed:.1f} s{left}')
        if self._shown is None:
            self._shown = display(bar, display_id=True)
        else:
            self._shown.update(bar)

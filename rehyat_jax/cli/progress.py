"""Progress of a long command: bars with rate and time left on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

#: Seconds between two lines where there is no terminal.
_PAUSE = 5.0


class _Rate(ProgressColumn):
    """Steps a second, or seconds a step when that is the larger number."""

    def render(self, task: Task) -> Text:
        elapsed = task.finished_time or task.elapsed
        done = task.completed - task.fields["before"]
        return Text(_rate(done / elapsed if elapsed else None))


class ProgressDisplay:
    """Shows the parts of a run in turn: ``with ProgressDisplay() as display: display("denoise", 3, 20)``.

    Writes to the standard error, so that a command's result can be piped.

    Args:
        quiet: show nothing, where another process shows the run.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        console = Console(stderr=True)
        self._bars, self._quiet = None, quiet
        if console.is_terminal and not quiet:
            columns = (
                TextColumn("{task.description:8}"),
                BarColumn(),
                MofNCompleteColumn(),
                _Rate(),
                TimeRemainingColumn(elapsed_when_finished=True),
            )
            self._bars = Progress(*columns, console=console)
        self._tasks: dict[str, TaskID] = {}
        self._part, self._start, self._said, self._ended, self._before = "", 0.0, 0.0, False, 0

    def __enter__(self) -> ProgressDisplay:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()

    def __call__(self, part: str, done: int, total: int) -> None:
        """``done`` of ``total`` steps of ``part`` are done. The first call announces the part: what was done by then
        tells nothing of its pace."""
        if self._quiet:
            return
        if self._bars:
            if part not in self._tasks:
                self._tasks[part] = self._bars.add_task(part, total=total, completed=done, before=done)
            self._bars.update(self._tasks[part], completed=done, total=total)
            return
        now = time.monotonic()
        if part != self._part:
            self._part, self._start, self._said, self._ended, self._before = part, now, now, False, done
        if (done == total and not self._ended) or now - self._said >= _PAUSE:
            self._said, self._ended, passed = now, done == total, now - self._start
            line = f"{part}: {done}/{total}"
            new = done - self._before
            if new > 0 and passed > 0:
                left = f"{passed / new * (total - done):.0f} s left" if done < total else f"{passed:.1f} s in all"
                line += f", {_rate(new / passed)}, {left}"
            print(line, file=sys.stderr, flush=True)


def _rate(per_second: float | None) -> str:
    if not per_second:
        return "-"
    return f"{per_second:.1f}/s" if per_second >= 1 else f"{1 / per_second:.1f} s each"

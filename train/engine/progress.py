"""What a training run shows: a bar with rate and time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

#: How values are told that are not told as "name value".
_SHOWN = {"tflops_per_s": "{:.4g} TFLOP/s", "utilisation": "{:.1%} of peak"}


class TrainingDisplay:
    """Writes to the standard error, so that a command's result can be piped; a context manager."""

    def __init__(self, steps: int, *, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, soft_wrap=True)
        self._steps = steps
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(BarColumn(), TextColumn("{task.description}", markup=False), console=self._console)
            self._task = self._bar.add_task("", total=steps)

    def note(self, text: str) -> None:
        """Say something once."""
        self._console.print(text, highlight=False, markup=False)

    def step(self, step: int, metrics: Mapping[str, float], *, per_second: float, seconds_left: float) -> None:
        """``step`` steps are done, and the last of them measured ``metrics``."""
        shown = "  ".join(_SHOWN.get(name, f"{name} {{:.4g}}").format(value) for name, value in metrics.items())
        text = f"step {step}/{self._steps}  {shown}  {per_second:.2f} steps/s  {_clock(seconds_left)} left"
        if self._bar:
            self._bar.update(self._task, completed=step, description=text)
        else:
            self.note(text)

    def __enter__(self) -> TrainingDisplay:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(max(int(seconds), 0), 60)
    return f"{minutes}:{seconds:02d}"

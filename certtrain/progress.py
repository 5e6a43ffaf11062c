"""Progress of long work: a bar on a terminal, one line per epoch or stage if the output is a file."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import IO, Any, Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from .streams import TolerantStream


class _Console(Console):
    """Console that writes to the current ``sys.stdout``; if that fails, work continues without output."""

    _tolerant: TolerantStream | None = None

    @property
    def file(self) -> IO[str]:
        stream: Any = super().file
        if isinstance(stream, TolerantStream):  # installed by the command line
            return stream  # type: ignore[return-value]
        if self._tolerant is None or self._tolerant.stream is not stream:
            self._tolerant = TolerantStream(stream)
        return self._tolerant  # type: ignore[return-value]

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file


console = _Console(soft_wrap=True, highlight=False)


class _Bar(RichProgress):
    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(task.fields["figures"], style="dim", no_wrap=True, overflow="ellipsis")


class Progress:
    """A bar over ``total`` units, with a line of figures below it; prints nothing if ``quiet``."""

    def __init__(self, label: str, total: int, done: int = 0, quiet: bool = False):
        self.label, self.total, self.done, self.quiet = label, total, done, quiet
        self._before, self._started = done, time.perf_counter()
        self._rich: RichProgress | None = None
        if console.file.isatty() and not quiet:
            self._rich = _Bar(
                TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("{task.fields[pace]}"), console=console, transient=True,
            )  # fmt: skip

    def __enter__(self) -> Self:
        if self._rich:
            self._rich.start()
            self._task = self._rich.add_task(self.label, total=self.total, completed=self.done, figures="", pace="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._rich:
            self._rich.stop()

    def advance(self, units: int, figures: Mapping[str, float] | str | None = None) -> None:
        self.done += units
        if self._rich:
            self._rich.update(self._task, advance=units, pace=self.pace())
            if figures:
                text = figures if isinstance(figures, str) else describe(figures)
                self._rich.update(self._task, figures=text)

    def now(self, text: str) -> None:
        """Show the current activity in place of the label."""
        if self._rich:
            self._rich.update(self._task, description=text)

    def pace(self) -> str:
        """Units per second since the start, and the remaining time at that rate."""
        rate = (self.done - self._before) / max(1e-9, time.perf_counter() - self._started)
        return f"{rate:.3g}/s, {duration((self.total - self.done) / rate)} left" if rate else ""

    def line(self, text: str) -> None:
        """Print a line if the output is a file; a terminal has the bar."""
        if not self.quiet and not self._rich:
            console.print(text)

    def alarm(self, text: str) -> None:
        """Print a warning to file or terminal, above the bar."""
        if not self.quiet:
            console.print(f"WARNING: {text}")


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds: ``3723`` → ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def describe(figures: Mapping[str, float]) -> str:
    """Figures as text: ``{"loss": 0.5, "clean_accuracy": 0.98}`` → ``loss 0.5  clean 98.0 %``."""
    words = []
    for name, value in figures.items():
        short = name.removesuffix("_accuracy").replace("_", " ")
        figure = f"{100 * value:.1f} %" if name.endswith("accuracy") else f"{value:.4g}"
        words.append(f"{short} {figure}")
    return "  ".join(words)

"""Long work shows a bar on a terminal, and one line for each epoch or stage where the output is a file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

console = Console(soft_wrap=True, highlight=False)


class Progress:
    """A bar over ``total`` units; silent when ``quiet``.

    ``show`` sets the figures beside the bar, ``line`` says something that stays.
    """

    def __init__(self, label: str, total: int, done: int = 0, quiet: bool = False):
        self.label, self.total, self.done, self.quiet = label, total, done, quiet
        self._rich: RichProgress | None = None
        if sys.stdout.isatty() and not quiet:
            self._rich = RichProgress(
                TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(),
                TimeRemainingColumn(), TextColumn("{task.fields[figures]}"), console=console, transient=True,
            )  # fmt: skip

    def __enter__(self) -> Self:
        if self._rich:
            self._rich.start()
            self._task = self._rich.add_task(self.label, total=self.total, completed=self.done, figures="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._rich:
            self._rich.stop()

    def advance(self, units: int, figures: Mapping[str, float] | None = None) -> None:
        self.done += units
        if self._rich:
            self._rich.update(self._task, advance=units)
            if figures:
                self._rich.update(self._task, figures=describe(figures))

    def line(self, text: str) -> None:
        """Said in files only: a terminal has the bar."""
        if not self.quiet and not self._rich:
            console.print(text)


def describe(figures: Mapping[str, float]) -> str:
    """``{"loss": 0.5, "clean_accuracy": 0.98}`` → ``loss 0.500  clean 98.0 %``."""
    words = []
    for name, value in figures.items():
        short = name.removesuffix("_accuracy").replace("_", " ")
        figure = f"{100 * value:.1f} %" if name.endswith("accuracy") else f"{value:.4g}"
        words.append(f"{short} {figure}")
    return "  ".join(words)

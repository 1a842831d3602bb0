"""How far runs beside each other are: live on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

Run = TypeVar("Run")


@dataclass(frozen=True)
class Row:
    """One run.

    Args:
        name: What runs.
        done: How much of it is done.
        total: How much there is.
        stage: What it is doing, in words.
        busy: Whether it is doing anything.
    """

    name: str
    done: int
    total: int
    stage: str
    busy: bool


class Progress(Generic[Run]):
    """Shows the runs it is called with.

    Args:
        console: Where to.
        row: What is to be said of a run.
        interval: Seconds between two lines where the console is no terminal.
        left: About how many seconds all runs still take, if that can be told.
        first: Seconds before the first such line; each next comes after twice as many, up to the interval.
    """

    def __init__(
        self,
        console: Console,
        row: Callable[[Run], Row],
        interval: float = 15.0,
        left: Callable[[Sequence[Run]], float | None] = lambda _: None,
        first: float | None = None,
    ) -> None:
        self.console = console
        self.row = row
        self.interval = interval
        self.left = left
        self.live = Live(console=console, transient=True, auto_refresh=False)
        self.wait = interval if first is None else first
        self.next_line = time.monotonic() + self.wait

    def __enter__(self) -> Progress[Run]:
        """Take over the last lines of a terminal."""
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Give them back."""
        self.live.stop()

    def __call__(self, runs: Sequence[Run]) -> None:
        """Show the runs as they stand."""
        rows = [self.row(run) for run in runs]
        if self.console.is_terminal:
            table = Table.grid(padding=(0, 1))
            for row in rows:
                table.add_row(row.name, ProgressBar(row.total, row.done, width=30), row.stage)
            table.add_row("", "", self.time_left(runs))
            self.live.update(table, refresh=True)
        elif time.monotonic() >= self.next_line:
            self.wait = min(2 * self.wait, self.interval)
            self.next_line += self.wait
            told = (": ".join(filter(None, (row.name, row.stage))) for row in rows if row.busy)
            texts = [*told, self.time_left(runs)]
            self.console.print(" | ".join(filter(None, texts)), soft_wrap=True, highlight=False)

    def time_left(self, runs: Sequence[Run]) -> str:
        """In words, in minutes as long as there are some."""
        seconds = self.left(runs)
        if seconds is None:
            return ""
        return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"

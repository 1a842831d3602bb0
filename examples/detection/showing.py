"""What a run shows: bars on a terminal, and a line now and then elsewhere."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.console import Console

from rbn.progress import Progress, Row


@dataclass
class Shown:
    """How far something is.

    Args:
        name: What runs.
        done: How much of it is done.
        total: How much there is.
        stage: What it is doing, in words.
        began: What was done when it began here.
        since: When that was, in seconds of `time.monotonic`.
    """

    name: str
    done: int
    total: int
    stage: str = ""
    began: int = 0
    since: float = field(default_factory=time.monotonic)


def bars(console: Console) -> Progress[Shown]:
    """The bars, or a line a minute."""
    return Progress(console, _row, 60.0, _seconds_left, first=10.0)


def images_in(progress: Progress[Shown], name: str) -> Callable[[int, int], None]:
    """What shows how many images an evaluation has seen, and of how many."""
    since = time.monotonic()

    def show(done: int, total: int) -> None:
        progress([Shown(name, done, total, f"{done} of {total} images", 0, since)])

    return show


def _row(shown: Shown) -> Row:
    return Row(shown.name, shown.done, shown.total, shown.stage, True)


def _seconds_left(runs: Sequence[Shown]) -> float | None:
    """At the speed until now."""
    (shown,) = runs
    done = shown.done - shown.began
    return (shown.total - shown.done) * (time.monotonic() - shown.since) / done if done > 1 else None

"""What a conformance run found: the matrix on the terminal, and everything as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

import rbn
from rbn.conformance.check import ABSENT, FAILED, PASSED, Result
from rbn.conformance.runner import Run

IMPORTING = {"jittor": "importing (on first use Jittor compiles itself, about 3 minutes)"}

FAILURES_SHOWN = 10
"""How many failed cases the terminal lists for each subject; the JSON has them all."""


class Progress:
    """Shows how far every framework is: a live table on a terminal, now and then a line elsewhere.

    Args:
        console: Where to.
        interval: Seconds between two lines where the console is no terminal.
    """

    def __init__(self, console: Console, interval: float = 15.0) -> None:
        self.console = console
        self.interval = interval
        self.live = Live(console=console, transient=True, auto_refresh=False)
        self.next_line = time.monotonic() + interval

    def __enter__(self) -> Progress:
        """Take over the last lines of a terminal."""
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Give them back."""
        self.live.stop()

    def __call__(self, runs: Sequence[Run]) -> None:
        """Show the runs as they stand."""
        if self.console.is_terminal:
            self.live.update(_progress_table(runs), refresh=True)
        elif time.monotonic() >= self.next_line:
            self.next_line += self.interval
            busy = [run for run in runs if run.stage in ("importing", "checking")]
            self.console.print(" | ".join(f"{run.framework}: {_stage(run)}" for run in busy), soft_wrap=True)


def _progress_table(runs: Sequence[Run]) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    for run in runs:
        table.add_row(run.framework, ProgressBar(run.total, run.finished, width=30), _stage(run))
    return table


def _stage(run: Run) -> str:
    seconds = run.seconds or (time.monotonic() - run.started if run.started else 0.0)
    stage = IMPORTING.get(run.framework, run.stage) if run.stage == "importing" else run.stage
    return f"{stage}, {run.finished} of {run.total} cases, {seconds:.0f} s"


def render(runs: Sequence[Run]) -> RenderableType:
    """The matrix and what failed: a row for each case group, a column for each subject.

    A cell is the group's worst error in units of its case's tolerance: at most 1 is right.
    """
    columns = {name: results for run in runs for name, results in run.results.items()}
    groups = list(dict.fromkeys(result.group for results in columns.values() for result in results))
    table = Table(title="worst error / tolerance (at most 1 is right)")
    table.add_column("cases", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for group in groups:
        cells = [_cell([r for r in results if r.group == group]) for results in columns.values()]
        table.add_row(group, *cells)
    parts: list[RenderableType | None] = [table]
    parts += [_failures(name, results) for name, results in columns.items()]
    parts += [Text(f"{run.framework}: {run.failure}", style="red") for run in runs if run.failure]
    parts += [_absences(columns), coverage(runs), _summary(runs)]
    return Group(*(part for part in parts if part is not None))


def coverage(runs: Sequence[Run]) -> Table:
    """Which values of every option ran, for each subject: all of them, or all but those named."""
    features = {case.id: case.features for run in runs for case in run.cases}
    values: dict[str, dict[str, None]] = {}
    for case in features.values():
        for option, value in case.items():
            values.setdefault(option, {})[value] = None
    columns = {name: results for run in runs for name, results in run.results.items()}
    table = Table(title="coverage: which values of an option ran")
    table.add_column("option", no_wrap=True)
    table.add_column("values", overflow="fold")
    for name in columns:
        table.add_column(name, overflow="fold")
    for option, expected in values.items():
        cells = []
        for results in columns.values():
            ran = {features[r.case][option] for r in results if r.status != ABSENT and r.case in features}
            lacking = [value for value in expected if value not in ran]
            cells.append(f"not {', '.join(lacking)}" if lacking else "all")
        table.add_row(option, ", ".join(expected), *cells)
    return table


def _cell(results: Sequence[Result]) -> Text:
    ran = [result for result in results if result.status != ABSENT]
    if not ran:
        return Text("absent" if results else "not run", style="dim" if results else "red")
    failed = sum(result.status == FAILED for result in ran)
    worst = max(result.worst.ratio for result in ran)
    number = f"{worst:.2f}" if worst < 1000 else f"{worst:.0e}"
    return Text(f"{failed} failed: {number}", style="bold red") if failed else Text(number, style="green")


def _failures(name: str, results: Sequence[Result]) -> Text | None:
    failed = [result for result in results if result.status == FAILED]
    if not failed:
        return None
    lines = [f"{name}: {len(failed)} of {len(results)} cases failed"]
    for result in failed[:FAILURES_SHOWN]:
        lines.append(f"  {result.case}: {result.worst.ratio:.3g} times the tolerance: {result.message}")
    if len(failed) > FAILURES_SHOWN:
        lines.append(f"  and {len(failed) - FAILURES_SHOWN} more; --json FILE writes them all")
    return Text("\n".join(lines), style="red")


def _absences(columns: dict[str, list[Result]]) -> Text | None:
    reasons: dict[tuple[str, str], int] = {}
    for name, results in columns.items():
        for result in results:
            if result.status == ABSENT:
                reasons[name, result.message] = reasons.get((name, result.message), 0) + 1
    if not reasons:
        return None
    return Text("\n".join(f"absent: {name}, {n} cases: {why}" for (name, why), n in reasons.items()))


def _summary(runs: Sequence[Run]) -> Text:
    lines = []
    for run in runs:
        results = [result for subject in run.results.values() for result in subject]
        counts = {status: sum(r.status == status for r in results) for status in (PASSED, FAILED, ABSENT)}
        verdict = "conforms" if run.passed else "DIFFERS"
        of = ", ".join(f"{name} {version}" for name, version in run.versions.items())
        counted = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
        lines.append(f"{run.framework} {verdict}: {counted or 'no case ran'}, {run.seconds:.0f} s ({of})")
    return Text("\n".join(lines))


def write_json(path: Path, runs: Sequence[Run]) -> None:
    """Write everything: every case of every subject, versions and times."""
    content: dict[str, Any] = {
        "rbn": rbn.__version__,
        "frameworks": {
            run.framework: {
                "passed": run.passed,
                "versions": run.versions,
                "seconds": run.seconds,
                "failure": run.failure,
                "subjects": {
                    name: [_plain(result) for result in results] for name, results in run.results.items()
                },
            }
            for run in runs
        },
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def _plain(result: Result) -> dict[str, Any]:
    """A result as JSON holds it, which has no infinity."""
    plain = dataclasses.asdict(result)
    if not math.isfinite(plain["worst"]["error"]):
        plain["worst"]["error"] = None
    return plain

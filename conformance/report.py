"""What a conformance run found: the matrix on the terminal, and everything as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

import rbn
from rbn.conformance.cases import Case
from rbn.conformance.checks import ABSENT, EXPECTED, FAILED, LATE, PASSED, Result, describe
from rbn.conformance.diagnosis import Diagnosis
from rbn.conformance.readable import readable
from rbn.conformance.runner import Run
from rbn.progress import Row
from rbn_core.files import replacing

IMPORTING = {"jittor": "importing (on first use Jittor compiles itself, about 3 minutes)"}

FIRST_RUN = {
    "jittor": "jittor compiles itself on its first run on a machine, about 3 minutes, and each operator when "
    "a case first needs it; later runs find both in ~/.cache/jittor."
}
"""What a first run compiles that later ones do not."""

TYPICAL = {
    "numpy": 10.0,
    "torch": 50.0,
    "torch.plain": 50.0,
    "flax": 180.0,
    "flax.nnx": 180.0,
    "flax.plain": 260.0,
    "mindspore": 150.0,
    "mindspore.plain": 340.0,
    "jittor": 400.0,
    "jittor.plain": 400.0,
}
"""Seconds of a first run, as measured on two processors: the first cases take longer than the others."""

CASES = 940
"""How many cases one of them has, about."""

FAILURES_SHOWN = 10
"""How many failed cases the terminal lists for each subject; the files have them all."""

REFUSALS_SHOWN = 3
"""How many texts of refusals the terminal shows for each subject; the files have them all."""

PLAIN = "A .plain column is the same layers in the framework's own operations, fused=False."
"""What is to be said where such a column is met."""

STATUSES = (PASSED, FAILED, LATE, EXPECTED, ABSENT)


def progress_row(run: Run) -> Row:
    """How far a run is."""
    seconds = run.seconds or (time.monotonic() - run.started if run.started else 0.0)
    stage = IMPORTING.get(run.name, run.stage) if run.stage == "importing" else run.stage
    stage = f"{stage}, {run.finished} of {run.total} cases, {seconds:.0f} s"
    return Row(run.name, run.finished, run.total, stage, run.stage not in ("waiting", "done"))


def seconds_left(runs: Sequence[Run], processors: int) -> float | None:
    """About how long it takes until all are done.

    A run takes as long as is typical of it, and longer by what those that are done took longer. One that
    nothing is known of, or that has taken more already, goes on as it has, or as all have.

    Args:
        runs: All of them.
        processors: How many run at a time.

    Returns:
        The seconds, and nothing until a twentieth is done: the first cases compile what all the others use.
    """
    now = time.monotonic()
    spent = {run.name: run.seconds or (now - run.started) for run in runs if run.finished}
    if not spent or sum(run.finished for run in runs) < sum(run.total for run in runs) / 20:
        return None
    pace = sum(spent.values()) / sum(run.finished for run in runs)
    typical = {run.name: TYPICAL[run.name] * run.total / CASES for run in runs if run.name in TYPICAL}
    done = [run.name for run in runs if run.stage == "done" and run.name in typical and run.name in spent]
    slower = sum(spent[name] for name in done) / sum(typical[name] for name in done) if done else 1.0
    left = []
    for run in runs:
        if run.stage == "done":
            continue
        known = typical.get(run.name, 0.0) * slower - spent.get(run.name, 0.0)
        own_pace = spent[run.name] / run.finished if run.finished else pace
        left.append(known if known > 0 else (run.total - run.finished) * own_pace)
    return max(sum(left) / processors, *left, 0.0)


def listed(cases: Sequence[Case]) -> Text:
    """The ids of cases under their rows, and how many there are."""
    rows: dict[str, list[str]] = {}
    for case in cases:
        rows.setdefault(case.group, []).append(case.id)
    text = Text()
    for row, ids in rows.items():
        text.append(row, style="bold")
        text.append(f"  {_counted(len(ids))}\n", style="dim")
        text.append("".join(f"  {name}\n" for name in ids))
    rest = "row" if len(rows) == 1 else "rows"
    return text.append(
        f"{_counted(len(cases))} in {len(rows)} {rest}; --only and --exclude choose by these ids"
    )


def _counted(cases: int) -> str:
    return f"{cases} case{'' if cases == 1 else 's'}"


def render(runs: Sequence[Run]) -> RenderableType:
    """The matrix and what failed: a row for each case group, a column for each subject.

    A cell is the group's worst error in units of its case's tolerance: at most 1 is right.
    """
    columns = columns_of(runs)
    parts: list[RenderableType | None] = [_Matrix(columns)]
    if any(name.endswith(".plain") for name in columns):
        parts.append(Text(PLAIN, style="dim"))
    diagnoses = diagnoses_of(runs)
    parts += [_failures(name, results, diagnoses.get(name, Diagnosis())) for name, results in columns.items()]
    parts += [Text(f"{run.name}: {run.early_end}", style="red") for run in runs if run.early_end]
    parts += [_late(columns), _refused(columns), _declared(columns)]
    if not any(run.stopped for run in runs):  # else most of it did not run
        parts.append(coverage(runs))
    parts.append(_summary(runs))
    return Group(*(part for part in parts if part is not None))


class _Matrix:
    """Tables below each other, each of as many subjects as there is room for."""

    def __init__(self, columns: Mapping[str, Sequence[Result]]) -> None:
        self.columns = columns
        self.groups = list(dict.fromkeys(result.group for results in columns.values() for result in results))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        names = list(self.columns)
        while names:
            widths = (
                self._table(names[:count]).__rich_measure__(console, options).minimum
                for count in range(1, len(names) + 1)
            )
            count = max(1, sum(width <= options.max_width for width in widths))
            yield self._table(names[:count])
            names = names[count:]

    def _table(self, names: Sequence[str]) -> Table:
        table = Table(title="worst error / tolerance (at most 1 is right)", box=box.SIMPLE_HEAD, padding=0)
        table.add_column("cases", no_wrap=True)
        for name in names:
            table.add_column(_heading(name), justify="right", no_wrap=True)
        for group in self.groups:
            cells = [_cell([r for r in self.columns[name] if r.group == group]) for name in names]
            table.add_row(group, *cells)
        return table


def _heading(name: str) -> str:
    """A subject's name on two lines where it has a dot."""
    return name.replace(".", "\n.", 1)


def coverage(runs: Sequence[Run]) -> Table:
    """Which values of every option ran: in all subjects, but for those named."""
    columns = columns_of(runs)
    table = Table(title="coverage: which values of an option ran", box=box.SIMPLE_HEAD)
    table.add_column("option", no_wrap=True)
    table.add_column("values", ratio=3)
    table.add_column("ran", ratio=2)
    for option, (values, lacking) in coverage_of(list(columns.values()), runs).items():
        without: dict[tuple[str, ...], list[str]] = {}
        for name, each in zip(columns, lacking, strict=True):
            if each:
                without.setdefault(tuple(each), []).append(name)
        exceptions = [f"not {', '.join(each)}: {', '.join(names)}" for each, names in without.items()]
        table.add_row(option, ", ".join(values), "\n".join(exceptions) or "all")
    return table


def columns_of(runs: Sequence[Run]) -> dict[str, list[Result]]:
    """Every subject's results, under a name of its own."""
    names = Counter(name for run in runs for name in run.results)
    return {
        name if names[name] == 1 or name == run.name else f"{name} ({run.name})": results
        for run in runs
        for name, results in run.results.items()
    }


def diagnoses_of(runs: Sequence[Run]) -> dict[str, Diagnosis]:
    """What is wrong with every subject, under the names of `columns_of`."""
    each = [run.diagnoses.get(name, Diagnosis()) for run in runs for name in run.results]
    return dict(zip(columns_of(runs), each, strict=True))


def coverage_of(
    columns: Sequence[Sequence[Result]], runs: Sequence[Run]
) -> dict[str, tuple[list[str], list[list[str]]]]:
    """For every option its values, and for every subject those of them that did not run."""
    features = {case.id: case.features for run in runs for case in run.cases}
    ran = [
        [
            features[result.case]
            for result in results
            if result.status not in (ABSENT, LATE) and result.case in features
        ]
        for results in columns
    ]
    table = {}
    for option in dict.fromkeys(option for case in features.values() for option in case):
        values = list(dict.fromkeys(case[option] for case in features.values()))
        found = [{case[option] for case in cases} for cases in ran]
        table[option] = (values, [[value for value in values if value not in each] for each in found])
    return table


def _cell(results: Sequence[Result]) -> Text:
    ran = [result for result in results if result.status in (PASSED, FAILED)]
    late = sum(result.status == LATE for result in results)
    if late and all(result.status != FAILED for result in ran):
        return Text(f"{late} late", style="yellow")
    if not ran:
        states = {result.status for result in results}
        return Text(", ".join(sorted(states)) or "-", style="dim")
    failed = sum(result.status == FAILED for result in ran)
    worst = max(result.worst.ratio for result in ran)
    number = f"{worst:.2f}" if worst < 1000 else f"{worst:.0e}"
    return Text(f"{failed} failed: {number}", style="bold red") if failed else Text(number, style="green")


def _failures(name: str, results: Sequence[Result], diagnosis: Diagnosis) -> Text | None:
    failed = [result for result in results if result.status == FAILED]
    if not failed:
        return None
    return Text(describe(name, failed, len(results), diagnosis, FAILURES_SHOWN), style="red")


def _late(columns: Mapping[str, Sequence[Result]]) -> Text | None:
    """What several devices gave no result for."""
    lines = [
        f"{LATE}: {name}: {result.case}: {result.message}"
        for name, results in columns.items()
        for result in results
        if result.status == LATE
    ]
    return Text("\n".join(lines), style="yellow") if lines else None


def _refused(columns: Mapping[str, Sequence[Result]]) -> Text | None:
    """What subjects said that refused something as they should."""
    lines = []
    for name, results in columns.items():
        said = [result.message for result in results if result.status == PASSED and result.message]
        texts = list(dict.fromkeys(said))
        if said:
            different = f"{len(texts)} different text{'' if len(texts) == 1 else 's'}"
            lines.append(f"refused: {name}, {_counted(len(said))} in {different}")
            lines += [f"  {text}" for text in texts[:REFUSALS_SHOWN]]
    return Text("\n".join(lines)) if lines else None


def _declared(columns: dict[str, list[Result]]) -> Text | None:
    """What subjects cannot run, or are known to do differently, and why."""
    declared = Counter(
        (result.status, name, result.message)
        for name, results in columns.items()
        for result in results
        if result.status in (ABSENT, EXPECTED)
    )
    lines = [f"{status}: {name}, {_counted(n)}: {why}" for (status, name, why), n in declared.items()]
    return Text("\n".join(lines)) if lines else None


def _summary(runs: Sequence[Run]) -> Text:
    lines = []
    for run in runs:
        results = [result for subject in run.results.values() for result in subject]
        counts = {status: sum(r.status == status for r in results) for status in STATUSES}
        verdict = run.verdict if run.passed else run.verdict.upper()
        of = ", ".join(f"{name} {version}" for name, version in run.versions.items())
        counted = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
        missing = f", {len(run.missing)} of {run.total} missing" if run.stopped else ""
        line = f"{run.name} {verdict}: {counted or 'no case ran'}{missing}, {run.seconds:.0f} s"
        lines.append(f"{line} ({of})" if of else line)
    return Text("\n".join(lines))


def write_json(path: Path, runs: Sequence[Run]) -> None:
    """Write everything: every case of every subject, versions, times, and what a stopped run lacks."""
    content: dict[str, Any] = {
        "rbn": rbn.__version__,
        "runs": {
            run.name: {
                "passed": run.passed,
                "verdict": run.verdict,
                "versions": run.versions,
                "seconds": run.seconds,
                "failure": run.failure,
                "stopped": run.stopped,
                "missing": run.missing,
                "subjects": {
                    name: [_plain(result) for result in results] for name, results in run.results.items()
                },
                "diagnoses": {
                    name: dataclasses.asdict(diagnosis) for name, diagnosis in run.diagnoses.items()
                },
            }
            for run in runs
        },
    }
    with replacing(path) as temporary:
        temporary.write_text(
            readable(json.dumps(content, indent=1, ensure_ascii=False)) + "\n", encoding="utf-8"
        )


def _plain(result: Result) -> dict[str, Any]:
    """A result as JSON holds it, which has no infinity."""
    plain = dataclasses.asdict(result)
    for deviation in plain["deviations"]:
        if not math.isfinite(deviation["error"]):
            deviation["error"] = None
    return plain

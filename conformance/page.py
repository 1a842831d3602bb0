"""What a conformance run found as one page for a browser, which needs nothing but itself."""

from __future__ import annotations

import math
import os
import platform
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import count
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console

import rbn
from rbn.conformance.cases import LAYERS, Case
from rbn.conformance.checks import ABSENT, EXPECTED, FAILED, LATE, PASSED, Result
from rbn.conformance.diagnosis import Diagnosis
from rbn.conformance.kills import shipped_kills, shipped_table
from rbn.conformance.loading import SUBJECTS, registered
from rbn.conformance.mutants import MUTANTS, Mutant
from rbn.conformance.readable import readable
from rbn.conformance.report import PLAIN, STATUSES, columns_of, coverage_of
from rbn.conformance.runner import Run
from rbn_core.files import replacing

SIGNS = {PASSED: "✓", FAILED: "✗", LATE: "◷", EXPECTED: "△", ABSENT: "○"}
"""What tells the states apart without colour."""

LEVELS = (0.03, 0.1, 0.3)
"""Where a cell becomes a deeper blue."""

PAGE = "index.html"
"""What the page is called in its folder."""


@dataclass(frozen=True)
class Cell:
    """One subject's results in one group of cases.

    Attributes:
        status: The group's: "failed" if any case failed, "passed" if any ran.
        text: What the cell says.
        level: How near the worst error is to its tolerance, from 0 to 3.
        anchor: Where its cases are.
    """

    status: str
    text: str
    level: int
    anchor: str


@dataclass(frozen=True)
class Entry:
    """One case of one subject.

    Attributes:
        anchor: Its place in the page.
        index: Where the page's data has its quantities.
        result: What came of it.
        command: What runs it again.
    """

    anchor: str
    index: int
    result: Result
    command: str


@dataclass(frozen=True)
class Group:
    """A subject's cases of one row of the matrix, the failed ones first."""

    name: str
    anchor: str
    entries: list[Entry]

    @property
    def failed(self) -> int:
        """How many of them failed."""
        return sum(entry.result.status == FAILED for entry in self.entries)

    @property
    def cell(self) -> Cell:
        """The group in the matrix."""
        ran = [entry.result for entry in self.entries if entry.result.status in (PASSED, FAILED)]
        late = sum(entry.result.status == LATE for entry in self.entries)
        if late and not self.failed:
            return Cell(LATE, f"{late} late", 0, self.anchor)
        if not ran:
            statuses = sorted({entry.result.status for entry in self.entries})
            return Cell(statuses[-1], " and ".join(statuses), 0, self.anchor)
        compared = [result.worst.ratio for result in ran if result.deviations]
        worst = max(compared, default=0.0)
        number = ratio_text(worst) if compared else ""
        if self.failed:
            return Cell(FAILED, f"{self.failed} failed{number and f': {number}'}", 3, self.anchor)
        return Cell(PASSED, number, sum(worst > bound for bound in LEVELS), self.anchor)


@dataclass(frozen=True)
class Column:
    """One subject: a column of the matrix.

    Attributes:
        anchor: Its place in the page.
        name: What the page calls it.
        run: The run that it belongs to.
        results: What came of its cases.
        groups: The same by the rows of the matrix.
        diagnosis: What is wrong with it.
    """

    anchor: str
    name: str
    run: Run
    results: Sequence[Result]
    groups: dict[str, Group]
    diagnosis: Diagnosis

    @property
    def failed_first(self) -> list[Group]:
        """Its groups, those with failures first."""
        return sorted(self.groups.values(), key=lambda group: not group.failed)

    @property
    def failed(self) -> int:
        """How many of its cases failed."""
        return sum(result.status == FAILED for result in self.results)

    @property
    def expected(self) -> int:
        """How many of its cases differ as was declared."""
        return sum(result.status == EXPECTED for result in self.results)

    @property
    def declared(self) -> list[tuple[str, str, int]]:
        """What it cannot run, or is known to do differently: state, reason, number of cases."""
        declared = Counter((r.status, r.message) for r in self.results if r.status in (ABSENT, EXPECTED))
        return [(status, why, number) for (status, why), number in declared.items()]


@dataclass(frozen=True)
class Kill:
    """What the cases find out about one mutant.

    Attributes:
        mutant: The planted mistake.
        cases: The ids of the cases that reject it.
        layers: How many there are of each layer.
        groups: How many there are in each group.
    """

    mutant: Mutant
    cases: list[str] = field(default_factory=list)
    layers: Counter[str] = field(default_factory=Counter)
    groups: Counter[str] = field(default_factory=Counter)

    def add(self, case: Case) -> None:
        """Count a case that rejects it."""
        self.cases.append(case.id)
        self.layers[case.layer] += 1
        self.groups[case.group] += 1


def write_page(folder: Path, runs: Sequence[Run], command: str, console: Console) -> Path:
    """Write a page with everything that was found, and which of the planted mistakes its cases find.

    Args:
        folder: Where to; it is made.
        runs: What was run.
        command: What ran it.
        console: Says where it is.

    Returns:
        The page.
    """
    columns = laid_out(runs)
    ran = cases_that_ran(runs)
    page = folder / PAGE
    text = render_page(runs, columns, ran, killed(ran), command)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(page) as temporary:
        temporary.write_text(readable(text), encoding="utf-8")
    console.print(f"wrote {page}", markup=False, highlight=False, soft_wrap=True)
    return page


def render_page(
    runs: Sequence[Run], columns: Sequence[Column], ran: Sequence[Case], found: Sequence[Kill], command: str
) -> str:
    """The page's text."""
    environment = Environment(
        loader=PackageLoader("rbn.conformance"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"ratio": ratio_text, "scientific": scientific}
    layers = [layer for layer in LAYERS if any(case.layer == layer for case in ran)]
    return environment.get_template("page.html").render(
        rbn_version=rbn.__version__,
        command=command,
        date=datetime.now().astimezone(),
        machine=machine(),
        runs=runs,
        columns=columns,
        rows=rows_of(columns),
        counts={run.name: counts_of(run) for run in runs},
        signs=SIGNS,
        plain=PLAIN if any(column.name.endswith(".plain") for column in columns) else "",
        data=quantities_of(columns),
        coverage=coverage_of([column.results for column in columns], runs),
        ran=ran,
        kills=sorted(found, key=lambda kill: len(kill.cases)),
        kill_groups={layer: groups_of_layer(layer, ran) for layer in layers},
        unlisted=sum(replace(case, variant=0).id not in shipped_table() for case in ran),
    )


def laid_out(runs: Sequence[Run]) -> list[Column]:
    """Every subject with its results by group."""
    columns: list[Column] = []
    names = iter(columns_of(runs))
    numbers = count()
    for run in runs:
        again, ids = reproduction(run), {case.id for case in run.cases}
        for subject, results in run.results.items():
            anchor = f"s{len(columns)}"
            groups: dict[str, Group] = {}
            for result in sorted(results, key=lambda result: result.status != FAILED):
                group = groups.setdefault(result.group, Group(result.group, f"{anchor}g{len(groups)}", []))
                index = next(numbers)
                # A wrong declaration is no case's result.
                command = f"{again} --only {shlex.quote(result.case)}" if result.case in ids else again
                group.entries.append(Entry(f"c{index}", index, result, command))
            groups = {name: groups[name] for name in dict.fromkeys(result.group for result in results)}
            diagnosis = run.diagnoses.get(subject, Diagnosis())
            columns.append(Column(anchor, next(names), run, results, groups, diagnosis))
    return columns


def reproduction(run: Run) -> str:
    """The command that runs the run again."""
    words = ["rbn", "conform"]
    if run.name in SUBJECTS or run.name in registered():
        words.append(run.name)
    else:
        words += [word for reference in run.references for word in ("--subject", reference)]
    return shlex.join(words)


def rows_of(columns: Sequence[Column]) -> dict[str, dict[str, list[Cell | None]]]:
    """The matrix: for every layer its groups, each with a cell for every subject."""
    rows: dict[str, dict[str, list[Cell | None]]] = {}
    for group in dict.fromkeys(name for column in columns for name in column.groups):
        cells = [column.groups[group].cell if group in column.groups else None for column in columns]
        rows.setdefault(group.partition("/")[0], {})[group] = cells
    return rows


def counts_of(run: Run) -> list[tuple[str, int]]:
    """How many cases of a run came out in which way."""
    found = Counter(result.status for results in run.results.values() for result in results)
    return [(status, found[status]) for status in STATUSES if found[status]]


def quantities_of(columns: Sequence[Column]) -> list[list[list[str]]]:
    """Every case's quantities, the worst first, as the page's script shows them."""
    return [
        [
            [
                d.quantity,
                scientific(d.error),
                scientific(d.tolerance),
                ratio_text(d.ratio),
                d.message if d.error or d.quantity == "refusal" else "",
            ]
            for d in sorted(entry.result.deviations, key=lambda deviation: -deviation.ratio)
        ]
        for entry in sorted(_entries(columns), key=lambda entry: entry.index)
    ]


def _entries(columns: Sequence[Column]) -> Iterator[Entry]:
    for column in columns:
        for group in column.groups.values():
            yield from group.entries


def cases_that_ran(runs: Sequence[Run]) -> tuple[Case, ...]:
    """Every case that at least one subject ran."""
    finished = {
        r.case
        for run in runs
        for results in run.results.values()
        for r in results
        if r.status not in (ABSENT, LATE)
    }
    return tuple(dict.fromkeys(case for run in runs for case in run.cases if case.id in finished))


def groups_of_layer(layer: str, cases: Sequence[Case]) -> dict[str, int]:
    """A layer's groups with the numbers of their cases."""
    return dict(Counter(case.group for case in cases if case.layer == layer))


def killed(cases: Sequence[Case]) -> list[Kill]:
    """Which of the suite's cases reject which mutant."""
    found = {mutant.name: Kill(mutant) for mutant in MUTANTS}
    for case, names in shipped_kills(cases):
        for name in names:
            found[name].add(case)
    return list(found.values())


def machine() -> str:
    """On what it ran, as far as it may matter to the numbers."""
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors, "
        f"Python {platform.python_version()}"
    )


def ratio_text(ratio: float) -> str:
    """An error in units of its tolerance."""
    if math.isinf(ratio):
        return "∞"
    return f"{ratio:.2f}" if ratio < 1000 else f"{ratio:.0e}"


def scientific(value: float) -> str:
    """An error or a tolerance."""
    if not math.isfinite(value):
        return "∞"
    return f"{value:.2e}" if value else "0"

"""Hold a stranger to the reference, and say what differs: python findings.py torch_batch_norm:subject."""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from rbn.conformance.cases import Case
from rbn.conformance.checks import (
    ABSENT,
    EXPECTED,
    FAILED,
    PASSED,
    Result,
    Results,
    check_case,
    wrong_declarations,
)
from rbn.conformance.diagnosis import Evidence
from rbn.conformance.subject import Subject
from rbn.conformance.suite import all_cases, select

OVERFLOW = ("bn/train/huge/2x5x7x7/float16", "bn/eval/huge/2x5x7x7/float16")
"""Squares beyond what float16 holds; the suite has them of RBN alone."""

SHARED = ("bn/train/offset10/4x3x4x3/float32/shares=2+2",)
"""Two devices, of which the same is true; only for what can have two."""

CASES = (*select(all_cases(), ["bn/*"], ["*/precision=*", "*/spoilt=*"]), *select((), (*OVERFLOW, *SHARED)))
"""BatchNorm in one precision, with a state that nobody has spoilt."""

STATUSES = (PASSED, EXPECTED, ABSENT, FAILED)
WHAT = {EXPECTED: "differs", ABSENT: "cannot run", FAILED: "fails"}


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, and not only done in another way.

    Attributes:
        what: What is wrong and by how much.
        repro: The file in `repros/` that shows it without this project.
        cases: Patterns of the cases that find it; none if it was found beside the suite.
        known: The public thread about it.
    """

    what: str
    repro: str
    cases: tuple[str, ...] = ()
    known: str = ""


def declared(findings: Iterable[Finding]) -> dict[str, str]:
    """The findings as a subject declares what it is expected to fail."""
    return {pattern: finding.what for finding in findings for pattern in finding.cases}


def held(subject: Subject, cases: Sequence[Case] = CASES) -> Results:
    """The results of a subject, without raising."""
    evidence = Evidence()
    taken = [case for case in cases if subject.takes(case) and len(case.shares) <= subject.devices]
    watched = track(taken, f"checking {subject.name}", console=Console(stderr=True), transient=True)
    results = [check_case(subject, case, evidence=evidence) for case in watched]
    return Results([*results, *wrong_declarations(subject, cases)], evidence.diagnose())


def few(subject: Subject) -> list[Case]:
    """The first case of every row, and the first two that every declaration is about."""
    chosen: dict[str, Case] = {}
    for case in CASES:
        chosen.setdefault(case.group, case)
    for pattern in (*subject.absent, *subject.expected_failures):
        for case in [case for case in CASES if fnmatchcase(case.id, pattern)][:2]:
            chosen.setdefault(case.id, case)
    return [case for case in CASES if case in chosen.values()]


def rows(results: Iterable[Result]) -> list[dict[str, Any]]:
    """For every reason: what it is about, how many cases, the worst error and what it says."""
    found = defaultdict(list)
    for result in results:
        if result.status != PASSED:
            found[result.status, result.message if result.status != FAILED else result.case].append(result)
    table = []
    for (status, why), cases in found.items():
        worst = max(cases, key=lambda result: result.worst.ratio)
        quantities = sorted({d.quantity for case in cases for d in case.deviations if d.ratio > 1.0})
        said = worst.worst.message.partition("\n")[0] or worst.message
        table.append(
            {
                "status": status if worst.deviations or status == FAILED else "lacks",
                "why": why,
                "cases": len(cases),
                "quantities": quantities,
                "worst": worst.worst.ratio,
                "said": f"{worst.case}: {worst.worst.quantity} {said}",
            }
        )
    return table


def printed(console: Console, subject: Subject, results: Results) -> None:
    """Print what came of it."""
    count = Counter(result.status for result in results)
    console.print(
        f"{subject.name}: {count[PASSED]} cases pass, {count[EXPECTED]} differ as declared, "
        f"{count[ABSENT]} cannot run, {count[FAILED]} fail",
        highlight=False,
    )
    table = Table("", "cases", "worst", "why, and what the worst case says", show_lines=True)
    for row in rows(results):
        worst = f"{row['worst']:.1f}" if row["status"] != "lacks" else ""
        what = WHAT.get(row["status"], "lacks")
        lines = (row["why"], row["said"] if row["status"] != "lacks" else "")
        table.add_row(what, str(row["cases"]), worst, escape("\n".join(filter(None, lines))))
    if table.row_count:
        console.print(table)
    for line in results.diagnosis.lines:
        console.print(line, markup=False, highlight=False)


def load(reference: str) -> tuple[Subject, Sequence[Finding]]:
    """The subject of "module:subject" beside this file, and its findings."""
    module, _, name = reference.partition(":")
    found = import_module(module)
    return getattr(found, name), getattr(found, "FINDINGS", {}).get(name, ())


def as_data(subject: Subject, findings: Sequence[Finding], results: Sequence[Result]) -> dict[str, Any]:
    """What the page of findings says of it."""
    return {
        "name": subject.name,
        "statuses": {status: sum(r.status == status for r in results) for status in STATUSES},
        "findings": [vars(finding) for finding in findings],
        "rows": rows(results),
    }


def main() -> int:
    """Run the suite on one stranger; 1 if something differs that is not declared, or the other way round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("subject", help="module:name of a subject beside this file")
    parser.add_argument("--few", action="store_true", help="a few cases of every kind")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    given = parser.parse_args()
    subject, findings = load(given.subject)
    cases = few(subject) if given.few else (*all_cases(), *select((), (*OVERFLOW, *SHARED)))
    results = held(subject, cases)
    if given.json:
        given.json.write_text(json.dumps(as_data(subject, findings, results)), "utf-8")
    console = Console()
    printed(console if console.is_terminal else Console(width=120), subject, results)
    return int(any(result.status == FAILED for result in results))


if __name__ == "__main__":  # under the name by which the modules beside it import it
    raise SystemExit(import_module("findings").main())

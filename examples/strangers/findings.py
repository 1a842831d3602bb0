"""A table of what differs between a subject and the reference, and what was declared about it."""

from collections import Counter, defaultdict
from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rbn.conformance.cases import Case
from rbn.conformance.checks import ABSENT, EXPECTED, FAILED, PASSED, Result, check, describe
from rbn.conformance.subject import Subject

WHAT = {EXPECTED: "differs", ABSENT: "cannot run"}


def report(subject: Subject, cases: Iterable[Case] | None = None) -> int:
    """Run the suite on a subject and print its findings.

    Args:
        subject: What to hold to the reference.
        cases: What to run; by default all cases of its layers.

    Returns:
        The exit status: 1 if something differs that is not declared, or is declared and does not differ.
    """
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    with console.status(f"checking {subject.name}"):
        results = check(subject, cases, on_failure="collect")
        table = Table("finding", "cases", "worst", "why, and what the worst case says", show_lines=True)
        for row in rows(subject, results):
            table.add_row(*map(escape, row))
    count = Counter(result.status for result in results)
    console.print(
        f"{subject.name}: {count[PASSED]} cases pass, {count[EXPECTED]} differ as declared, "
        f"{count[ABSENT]} cannot run, {count[FAILED]} fail",
        highlight=False,
    )
    if table.row_count:
        console.print(table)
    failed = [result for result in results if result.status == FAILED]
    if failed:
        console.print(describe(subject.name, failed, len(results)), markup=False, highlight=False)
    return int(bool(failed))


def rows(subject: Subject, results: Iterable[Result]) -> Iterable[tuple[str, str, str, str]]:
    """For every declared reason: what it is about, how many cases, the worst error and its message."""
    findings = defaultdict(list)
    for result in results:
        findings[result.status, result.message].append(result)
    for status, declared in ((EXPECTED, subject.expected_failures), (ABSENT, subject.absent)):
        for why in [why for found, why in findings if found == status]:
            cases = findings[status, why]
            patterns = [pattern for pattern, reason in declared.items() if reason == why]
            worst = max(cases, key=lambda result: result.worst.ratio)
            what, ratio, said = [WHAT[status], *patterns], f"{worst.worst.ratio:.1f}", [why]
            if worst.deviations:
                message = worst.worst.message.partition("\n")[0]
                said += [f"{worst.case}: {worst.worst.quantity} {message}", *worst.causes]
            else:  # a case about an option that the subject lacks is not run at all
                what, ratio = ["lacks"], ""
            yield "\n".join(what), str(len(cases)), ratio, "\n".join(said)

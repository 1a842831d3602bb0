"""What a conformance run found as JUnit XML, which Jenkins, GitLab and the actions of GitHub read."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from xml.etree.ElementTree import Element, ElementTree, SubElement, indent

import rbn
from rbn.conformance.checks import FAILED, LATE, PASSED, Result
from rbn.conformance.page import reproduction
from rbn.conformance.readable import first_line, readable
from rbn.conformance.runner import Run
from rbn_core.files import replacing

SHOWN = 160
"""How many characters of a message are shown where there is room for a line, as beside the code on GitHub."""

COUNTED = {"failure": "failures", "error": "errors", "skipped": "skipped"}
"""What a test case may hold, and the attribute of its suite that counts it."""


def write_junit(path: Path, runs: Sequence[Run], command: str) -> None:
    """Write a test suite for every subject and in it a test case for every case.

    A failure's message is one short line with what it behaves like, and its text is everything, with the
    command that repeats it. Where the subject's file lies in the working folder, its cases name it, so that
    GitHub shows the failures there.

    Absent cases and expected failures are skipped, with their reasons, and late ones are errors; what a
    subject said that refused something as it should is the output of the case, and what is wrong with the
    subject that of its suite. A run that ended early is an
    error in the suite of its last subject.

    Args:
        path: The file; its folder is made.
        runs: What was run.
        command: What ran it.
    """
    root = Element("testsuites", name="rbn conform")
    for run in runs:
        suites = [_suite(root, run, name, results, command) for name, results in run.results.items()]
        if run.early_end:
            suite = suites[-1] if suites else _suite(root, run, run.name, (), command)
            case = SubElement(
                suite, "testcase", classname=readable(suite.get("name", "")), name="the run itself"
            )
            case.set("time", "0.000")
            missing = ("without a result:", *run.missing) if run.stopped else ()
            _fill(SubElement(case, "error", type="run"), run.early_end, (), *missing)
    for suite in root:
        _count(suite, suite.findall("testcase"))
    _count(root, root.findall("testsuite/testcase"))
    indent(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        ElementTree(root).write(temporary, encoding="utf-8", xml_declaration=True)


def _suite(root: Element, run: Run, name: str, results: Sequence[Result], command: str) -> Element:
    suite = SubElement(root, "testsuite", name=readable(name))
    suite.set("timestamp", datetime.now(UTC).replace(tzinfo=None).isoformat(timespec="seconds"))
    properties = SubElement(suite, "properties")
    said = {"command": command, "verdict": run.verdict, "rbn": rbn.__version__}
    for key, value in {**said, "python": platform.python_version(), **run.versions}.items():
        SubElement(properties, "property", name=readable(key), value=readable(value))
    again, ids = reproduction(run), {case.id for case in run.cases}
    for result in results:
        case = SubElement(suite, "testcase", classname=readable(name), name=readable(result.case))
        if run.file:
            case.set("file", readable(run.file))
        case.set("time", f"{result.seconds:.3f}")
        if result.status == FAILED:
            kind = result.worst.quantity or "no result"
            chosen = f" --only {shlex.quote(result.case)}" if result.case in ids else ""
            failure = SubElement(case, "failure", type=readable(kind))
            _fill(failure, result.message, result.causes, f"again: {again}{chosen}")
        elif result.status == LATE:
            _fill(SubElement(case, "error", type="late"), result.message)
        elif result.status == PASSED and result.message:
            SubElement(case, "system-out").text = readable(result.message)
        elif result.status != PASSED:
            SubElement(case, "skipped", message=readable(f"{result.status}: {result.message}"))
    if name in run.diagnoses:
        SubElement(suite, "system-out").text = readable("\n".join(run.diagnoses[name].lines))
    return suite


def _fill(problem: Element, message: str, causes: Sequence[str] = (), *more: str) -> None:
    """One short line is what lists show, the first cause behind the message; everything is the text."""
    cause = f" ({causes[0]})" if causes else ""
    problem.set("message", f"{first_line(message, max(40, SHOWN - len(cause)))}{readable(cause)}")
    problem.text = readable("\n".join((message, *causes, *more)))


def _count(parent: Element, cases: Sequence[Element]) -> None:
    parent.set("tests", str(len(cases)))
    for kind, attribute in COUNTED.items():
        parent.set(attribute, str(sum(case.find(kind) is not None for case in cases)))
    parent.set("time", f"{sum(float(case.get('time', 0)) for case in cases):.3f}")

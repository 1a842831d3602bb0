"""What a conformance run found as JUnit XML, which Jenkins, GitLab and the actions of GitHub read."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from xml.etree.ElementTree import Element, ElementTree, SubElement, indent

from rbn.conformance.checks import FAILED, LATE, PASSED, Result
from rbn.conformance.runner import Run

NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold, not even escaped: a process that dies may write anything into a message."""

COUNTED = {"failure": "failures", "error": "errors", "skipped": "skipped"}
"""What a test case may hold, and the attribute of its suite that counts it."""


def write_junit(path: Path, runs: Sequence[Run]) -> None:
    """Write a test suite for every subject and in it a test case for every case.

    Absent cases and expected failures are skipped, with their reasons, and late ones are errors; what a
    subject said that refused something as it should is the output of the case. A run that ended early is an
    error in the suite of its last subject.

    Args:
        path: The file; its folder is made.
        runs: What was run.
    """
    root = Element("testsuites", name="rbn conform")
    for run in runs:
        suites = [_suite(root, run, name, results) for name, results in run.results.items()]
        if run.failure:
            suite = suites[-1] if suites else _suite(root, run, run.name, ())
            case = SubElement(
                suite, "testcase", classname=_text(suite.get("name", "")), name="the run itself"
            )
            case.set("time", "0.000")
            _fill(SubElement(case, "error", type="run"), run.failure)
    for suite in root:
        _count(suite, suite.findall("testcase"))
    _count(root, root.findall("testsuite/testcase"))
    indent(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        ElementTree(root).write(temporary, encoding="utf-8", xml_declaration=True)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _suite(root: Element, run: Run, name: str, results: Sequence[Result]) -> Element:
    suite = SubElement(root, "testsuite", name=_text(name))
    suite.set("timestamp", datetime.now(UTC).replace(tzinfo=None).isoformat(timespec="seconds"))
    if run.versions:
        properties = SubElement(suite, "properties")
        for package, version in run.versions.items():
            SubElement(properties, "property", name=_text(package), value=_text(version))
    for result in results:
        case = SubElement(suite, "testcase", classname=_text(name), name=_text(result.case))
        case.set("time", f"{result.seconds:.3f}")
        if result.status == FAILED:
            kind = result.worst.quantity or "no result"
            _fill(SubElement(case, "failure", type=_text(kind)), result.message, *result.causes)
        elif result.status == LATE:
            _fill(SubElement(case, "error", type="late"), result.message)
        elif result.status == PASSED and result.message:
            SubElement(case, "system-out").text = _text(result.message)
        elif result.status != PASSED:
            SubElement(case, "skipped", message=_text(f"{result.status}: {result.message}"))
    return suite


def _fill(problem: Element, message: str, *causes: str) -> None:
    """The message's first line is what lists show; everything is the text."""
    problem.set("message", _text(message.partition("\n")[0]))
    problem.text = _text("\n".join((message, *causes)))


def _count(parent: Element, cases: Sequence[Element]) -> None:
    parent.set("tests", str(len(cases)))
    for kind, attribute in COUNTED.items():
        parent.set(attribute, str(sum(case.find(kind) is not None for case in cases)))
    parent.set("time", f"{sum(float(case.get('time', 0)) for case in cases):.3f}")


def _text(text: str) -> str:
    return NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)

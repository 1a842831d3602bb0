"""The suite in pytest: a decorator for a test of one's own, and an option that needs none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # slow to import, and this module is part of every session
    from rbn.conformance.cases import Case
    from rbn.conformance.subject import Subject

Check = Callable[["Subject"], None]


def parametrize_with_checks(
    subjects: Sequence[Subject], cases: Iterable[Case] | None = None
) -> pytest.MarkDecorator:
    """Parametrize a test with every case of every subject.

        @parametrize_with_checks([MyLayer()])
        def test_conforms(subject, check):
            check(subject)

    A case that a subject lacks or declares absent is skipped with its reason; an expected failure is an
    xfail, and fails when it passes.

    Args:
        subjects: The implementations under test.
        cases: What to run; by default all cases of a subject's layers.
    """
    from rbn.conformance.suite import all_cases

    chosen = tuple(all_cases() if cases is None else cases)
    return pytest.mark.parametrize(
        ("subject", "check"),
        [
            pytest.param(subject, _check(case), id=f"{subject.name}-{case.id}")
            for subject in subjects
            for case in chosen
            if subject.takes(case)
        ],
    )


def _check(case: Case) -> Check:
    def check(subject: Subject) -> None:
        from rbn.conformance.checks import (
            ABSENT,
            EXPECTED,
            FAILED,
            LATE,
            ConformanceError,
            check_case,
            describe,
        )
        from rbn.conformance.diagnosis import Evidence

        __tracebackhide__ = True
        evidence = Evidence()
        result = check_case(subject, case, evidence=evidence)
        if result.status in (FAILED, LATE):
            raise ConformanceError(describe(subject.name, [result], 1, evidence.diagnose()))
        if result.status == ABSENT:
            pytest.skip(result.message)
        if result.status == EXPECTED:
            pytest.xfail(result.message)

    return check


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.getgroup("rbn", "conformance to the RBN reference").addoption(
        "--rbn-subject",
        action="append",
        default=[],
        metavar="PKG.MODULE:NAME",
        help="run every case of the conformance suite on this subject",
    )


@pytest.hookimpl(tryfirst=True)  # before -k and -m choose
def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Add the cases of the subjects that the option names."""
    for reference in session.config.getoption("--rbn-subject"):
        items.extend(_Subject.from_parent(session, name=reference).collect())


class _Subject(pytest.Collector):
    """The cases of one subject."""

    def collect(self) -> Iterator[pytest.Item]:
        from rbn.conformance.loading import SubjectError, load
        from rbn.conformance.suite import all_cases

        try:
            subject = load(self.name)
        except SubjectError as error:
            raise pytest.UsageError(f"--rbn-subject {error}") from error.__cause__
        for case in all_cases():
            if subject.takes(case):
                yield _Case.from_parent(self, name=case.id, subject=subject, check=_check(case))


class _Case(pytest.Item):
    """One case."""

    def __init__(self, *, subject: Subject, check: Check, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.subject = subject
        self.check = check

    def runtest(self) -> None:
        self.check(self.subject)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> str:
        return str(excinfo.value)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        return self.path, None, f"{self.subject.name}-{self.name}"

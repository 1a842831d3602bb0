"""Hold one subject to the reference, case by case."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rbn.conformance.cases import Case, config_of
from rbn.conformance.comparison import Deviation, deviations, worst_of_each
from rbn.conformance.diagnosis import Diagnosis
from rbn.conformance.readable import readable, said
from rbn.conformance.subject import NoResultInTimeError, Outcome, Subject
from rbn.conformance.suite import all_cases
from rbn_core.config import Config

PASSED, FAILED, LATE, ABSENT, EXPECTED = "passed", "failed", "late", "absent", "expected"


NO_OPTIONS_OF = {
    "bn": ("centering", "scaling"),
    "iebn": ("centering", "scaling"),
    "bnet": ("centering", "scaling", "gamma", "beta"),
}
"""What a layer has no choice of, whatever a subject always does in others."""


class ConformanceError(AssertionError):
    """A subject differs from the reference; the text says where, and what it behaves like."""


@dataclass(frozen=True)
class Result:
    """What came of one case.

    Attributes:
        case: Its id.
        group: Its row in the report.
        status: "passed"; "failed"; "late" where several devices gave no result in time, and so nothing is
            known; "absent" where the subject declares that it cannot run it; "expected" where it differs as
            was declared.
        deviations: Every quantity's worst, over the case's steps.
        message: Why the case failed, is late or absent, or is expected to fail; and what a subject said that
            refused something as it should.
        seconds: How long it took.
        causes: What the failure looks like, the likeliest first; see `rbn.conformance.diagnosis`.
    """

    case: str
    group: str
    status: str
    deviations: tuple[Deviation, ...] = ()
    message: str = ""
    seconds: float = 0.0
    causes: tuple[str, ...] = ()

    @property
    def worst(self) -> Deviation:
        """The quantity nearest to its tolerance, or furthest beyond."""
        return max(self.deviations, key=lambda deviation: deviation.ratio, default=Deviation())


def check(
    subject: Subject,
    cases: Iterable[Case] | None = None,
    *,
    expected_failures: Mapping[str, str] | None = None,
    on_failure: Literal["raise", "collect"] = "raise",
) -> list[Result]:
    """Hold a subject to the reference.

    Args:
        subject: The implementation under test.
        cases: What to run; by default all cases of the subject's layers. `suite.select` chooses by patterns.
        expected_failures: Known deviations, as {pattern of case ids: reason}. One that matches no case, and a
            case that passes or raises nevertheless, are failures.
        on_failure: "raise" an error at the end if any case failed, or "collect" the results.

    Returns:
        One result for every case, and one for every wrong declaration.

    Raises:
        ConformanceError: A case failed, or is late.
    """
    if on_failure not in ("raise", "collect"):
        raise ValueError(f'expected on_failure to be "raise" or "collect", got {on_failure!r}.')
    results = list(run_checks(subject, cases, expected_failures))
    failed = [result for result in results if result.status in (FAILED, LATE)]
    if failed and on_failure == "raise":
        raise ConformanceError(describe(subject.name, failed, len(results)))
    return results


def describe(name: str, failed: Sequence[Result], total: int, shown: int = 10) -> str:
    """What failed, each with what it looks like, as lines of text."""
    lines = [f"{name}: {len(failed)} of {total} cases failed"]
    for result in failed[:shown]:
        lines.append(f"  {result.case}: {result.message}")
        lines += [f"    {cause}" for cause in result.causes]
    if len(failed) > shown:
        lines.append(f"  and {len(failed) - shown} more")
    return "\n".join(lines)


def run_checks(
    subject: Subject, cases: Iterable[Case] | None = None, expected_failures: Mapping[str, str] | None = None
) -> Iterator[Result]:
    """As `check`, one result after the other, without raising."""
    cases = tuple(all_cases() if cases is None else cases)
    diagnosis = Diagnosis()
    for case in cases:
        if subject.takes(case):
            yield check_case(subject, case, expected_failures, diagnosis)
    yield from wrong_declarations(subject, cases, expected_failures)


def wrong_declarations(
    subject: Subject, cases: Iterable[Case], expected_failures: Mapping[str, str] | None = None
) -> Iterator[Result]:
    """A failed result for every declaration that matches no case of the suite or of this run."""
    ids = [case.id for case in (*all_cases(), *cases)]
    declared = {**subject.absent, **subject.expected_failures, **(expected_failures or {})}
    for pattern, why in declared.items():
        if not fnmatch.filter(ids, pattern):
            message = f"declared ({why}), but no case matches {pattern!r}. Correct the pattern."
            yield Result(pattern, "declarations", FAILED, message=message)


def check_case(
    subject: Subject,
    case: Case,
    expected_failures: Mapping[str, str] | None = None,
    diagnosis: Diagnosis | None = None,
) -> Result:
    """Run one case; whatever the subject raises becomes a failed result."""
    start = time.perf_counter()
    lacking = lacks(subject, case)
    if lacking is not None:
        return Result(case.id, case.group, ABSENT, message=lacking)
    mine = replace(case, config=config_for(subject, case))
    outcomes: list[Outcome] = []
    try:
        found = tuple(worst_of_each(deviations(subject, mine, outcomes)))
    except NoResultInTimeError as error:
        seconds = time.perf_counter() - start
        return Result(
            case.id, case.group, LATE, message=readable(f"no result in time: {error}"), seconds=seconds
        )
    except Exception as error:  # the suite outlives any subject
        found = (Deviation("raised", float("inf"), 0.0, said(error)),)
    result = Result(case.id, case.group, PASSED, found, seconds=time.perf_counter() - start)
    right, worst = result.worst.ratio <= 1.0, result.worst
    absent = reason(case, subject.absent)
    expected = reason(case, {**subject.expected_failures, **(expected_failures or {})})
    if right and (absent or expected):
        message = f"declared ({absent or expected}), but it passes. Drop the declaration."
        return replace(result, status=FAILED, message=message)
    if right:
        refusals = (d.message for d in found if d.quantity == "refusal")
        return replace(result, message=next(refusals, ""))
    if absent:
        return replace(result, status=ABSENT, message=absent)
    causes = diagnosis.causes(mine, outcomes, found) if diagnosis is not None else ()
    # Whatever is wrong can raise: that is no deviation that anybody knew of.
    if expected and worst.quantity != "raised":
        return replace(result, status=EXPECTED, message=expected, causes=causes)
    return replace(result, status=FAILED, message=f"{worst.quantity} {worst.message}", causes=causes)


def reason(case: Case, declared: Mapping[str, str]) -> str | None:
    """Why a case is declared, with whatever numbers; `None` where it is not."""
    name = replace(case, variant=0).id
    return next((why for pattern, why in declared.items() if fnmatch.fnmatchcase(name, pattern)), None)


def config_for(subject: Subject, case: Case) -> Config:
    """The case's options with those that the subject always has, if the case's layer has such options."""
    none = NO_OPTIONS_OF.get(case.layer, ())
    return replace(case.config, **{name: value for name, value in subject.fixed.items() if name not in none})


def stored_by(subject: Subject, case: Case) -> set[str]:
    """The canonical names of what the subject stores with the options that it has."""
    names = {*config_for(subject, case).state_shapes()}
    return names if subject.counts_batches else names - {"num_batches_tracked"}


def lacks(subject: Subject, case: Case) -> str | None:
    """What the subject lacks for a case, or `None` where it can have the case's options."""
    if case.config.momentum is None and not subject.counts_batches:
        return "stores no number of batches to average over"
    if case.spoilt and case.spoil[0] not in stored_by(subject, case):
        return f"stores no {case.spoil[0]}"
    if len(case.shares) > subject.devices:
        return f"shares its statistics on at most {subject.devices} devices"
    usual = config_of(case.layer, case.shape, {})
    for option, value in subject.fixed.items():
        if getattr(case.config, option) not in (getattr(usual, option), value):
            return f"has no option {option}: it is always {value}"
    return None

"""Hold one subject to the reference, case by case."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rbn.conformance.cases import Case, config_of
from rbn.conformance.comparison import Deviation, deviations, raised, worst_of_each
from rbn.conformance.diagnosis import Diagnosis, Evidence
from rbn.conformance.readable import readable
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


class Results(list["Result"]):
    """The results of a subject's cases, and what they say together.

    Attributes:
        diagnosis: What is wrong with the subject, and empty where nothing is.
    """

    def __init__(self, results: Iterable[Result] = (), diagnosis: Diagnosis | None = None) -> None:
        self.diagnosis = diagnosis or Diagnosis()
        super().__init__(replace(result, causes=self.diagnosis.of(result.case)) for result in results)


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
        causes: Those of the run's causes that predict the failure; see `rbn.conformance.diagnosis`.
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
) -> Results:
    """Hold a subject to the reference.

    Args:
        subject: The implementation under test.
        cases: What to run; by default all cases of the subject's layers. `suite.select` chooses by patterns.
        expected_failures: Known deviations, as {pattern of case ids: reason}. One that matches no case, and a
            case that passes or raises nevertheless, are failures.
        on_failure: "raise" an error at the end if any case failed, or "collect" the results.

    Returns:
        One result for every case, and one for every wrong declaration, as a list with a `diagnosis`.

    Raises:
        ConformanceError: A case failed, or is late.
    """
    if on_failure not in ("raise", "collect"):
        raise ValueError(f'expected on_failure to be "raise" or "collect", got {on_failure!r}.')
    cases = tuple(all_cases() if cases is None else cases)
    evidence = Evidence()
    found = [check_case(subject, case, expected_failures, evidence) for case in cases if subject.takes(case)]
    found += wrong_declarations(subject, cases, expected_failures)
    results = Results(found, evidence.diagnose())
    failed = [result for result in results if result.status in (FAILED, LATE)]
    if failed and on_failure == "raise":
        raise ConformanceError(describe(subject.name, failed, len(results), results.diagnosis))
    return results


def describe(name: str, failed: Sequence[Result], total: int, diagnosis: Diagnosis, shown: int = 10) -> str:
    """What failed and what is wrong, as lines of text."""
    lines = [f"{name}: {len(failed)} of {total} cases failed"]
    lines += [f"  {line}" for line in diagnosis.lines]
    lines += [f"  {result.case}: {result.message}" for result in failed[:shown]]
    if len(failed) > shown:
        lines.append(f"  and {len(failed) - shown} more")
    return "\n".join(lines)


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
    evidence: Evidence | None = None,
) -> Result:
    """Run one case; whatever the subject raises becomes a failed result."""
    start = time.perf_counter()
    lacking = lacks(subject, case)
    if lacking is not None:
        return Result(case.id, case.group, ABSENT, message=lacking)
    mine = as_run(subject, case)
    outcomes: list[Outcome] = []
    try:
        found = tuple(worst_of_each(deviations(subject, mine, outcomes)))
    except NoResultInTimeError as error:
        seconds = time.perf_counter() - start
        return Result(
            case.id, case.group, LATE, message=readable(f"no result in time: {error}"), seconds=seconds
        )
    except Exception as error:  # the suite outlives any subject
        found = (raised(error),)
    result = Result(case.id, case.group, PASSED, found, seconds=time.perf_counter() - start)
    right, worst = result.worst.ratio <= 1.0, result.worst
    absent = reason(case, subject.absent)
    expected = reason(case, {**subject.expected_failures, **(expected_failures or {})})
    if right and evidence is not None:
        evidence.add(case.id, mine, (), found)
    if right and (absent or expected):
        message = f"declared ({absent or expected}), but it passes. Drop the declaration."
        return replace(result, status=FAILED, message=message)
    if right:
        refusals = (d.message for d in found if d.quantity == "refusal")
        return replace(result, message=next(refusals, ""))
    if absent:
        return replace(result, status=ABSENT, message=absent)
    # Whatever is wrong can raise: that is no deviation that anybody knew of.
    if expected and worst.quantity != "raised":
        return replace(result, status=EXPECTED, message=expected)
    if evidence is not None:
        evidence.add(case.id, mine, outcomes, found)
    return replace(result, status=FAILED, message=f"{worst.quantity} {worst.message}")


def as_run(subject: Subject, case: Case) -> Case:
    """The case with the options that the subject has."""
    return replace(case, config=config_for(subject, case))


def remember(evidence: Evidence, subject: Subject, cases: Iterable[Case], results: Iterable[Result]) -> None:
    """Add what another process has found out, whose numbers are gone, to the evidence."""
    by_name = {case.id: case for case in cases}
    for result in results:
        if result.status in (PASSED, FAILED) and result.deviations and result.worst.quantity != "process":
            evidence.add(result.case, as_run(subject, by_name[result.case]), (), result.deviations)


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

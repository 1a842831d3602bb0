"""Hold one subject to the reference, case by case."""

from __future__ import annotations

import fnmatch
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rbn.conformance.cases import Case, all_cases
from rbn.conformance.subject import Array, Outcome, Subject
from rbn.conformance.tolerances import tolerances
from rbn_core.reference import Layer

PASSED, FAILED, ABSENT = "passed", "failed", "absent"


@dataclass(frozen=True)
class Deviation:
    """One quantity against the reference.

    Attributes:
        quantity: "y", "dx", "d gamma", "running_mean", ...
        error: The largest absolute difference; infinite for a wrong shape, dtype or name.
        tolerance: What is allowed.
        message: Where it is and what was there.
    """

    quantity: str = ""
    error: float = 0.0
    tolerance: float = 0.0
    message: str = ""

    @property
    def ratio(self) -> float:
        """The error in units of the tolerance; at most 1 is right."""
        if self.error == 0.0:
            return 0.0
        ratio = self.error / self.tolerance if self.tolerance else math.inf
        return math.inf if math.isnan(ratio) else ratio


@dataclass(frozen=True)
class Result:
    """What came of one case.

    Attributes:
        case: Its id.
        group: Its row in the report.
        status: "passed", "failed", or "absent" where the subject declares that it cannot run it.
        worst: The quantity nearest to its tolerance, or furthest beyond.
        message: Why the case failed or is absent.
        seconds: How long it took.
    """

    case: str
    group: str
    status: str
    worst: Deviation = Deviation()
    message: str = ""
    seconds: float = 0.0


def check(subject: Subject, cases: Sequence[Case] | None = None) -> Iterator[Result]:
    """Run the cases on a subject, one result each, in order.

    Args:
        subject: The implementation under test.
        cases: Which cases; all of the suite by default.

    Yields:
        A result for every case, and a failed one for every declaration of an absence that matches no case.
    """
    cases = all_cases() if cases is None else cases
    for case in cases:
        yield check_case(subject, case)
    ids = [case.id for case in (*all_cases(), *cases)]
    for pattern, reason in subject.absent.items():
        if not fnmatch.filter(ids, pattern):
            message = f"declared absent ({reason}), but no case matches {pattern!r}. Correct the pattern."
            yield Result(pattern, "declarations", FAILED, message=message)


def check_case(subject: Subject, case: Case) -> Result:
    """Run one case; whatever the subject raises becomes a failed result."""
    start = time.perf_counter()
    try:
        worst = max(deviations(subject, case), key=lambda deviation: deviation.ratio)
    except Exception as error:  # the suite outlives any subject
        worst = Deviation("raised", float("inf"), 0.0, f"{type(error).__name__}: {error}")
    seconds = time.perf_counter() - start
    right = worst.ratio <= 1.0
    reason = next((why for pattern, why in subject.absent.items() if fnmatch.fnmatch(case.id, pattern)), None)
    if reason is None:
        message = "" if right else f"{worst.quantity} {worst.message}"
        return Result(case.id, case.group, PASSED if right else FAILED, worst, message, seconds)
    if right:
        message = f"declared absent ({reason}), but it passes. Drop the declaration."
        return Result(case.id, case.group, FAILED, worst, message, seconds)
    return Result(case.id, case.group, ABSENT, worst, reason, seconds)


def deviations(subject: Subject, case: Case) -> Iterator[Deviation]:
    """Run a case on the subject and on the reference, and compare all that came out, step by step."""
    state = case.state()
    reference = Extended(case.config)
    reference.load(state)
    subject.build(case.config, {name: value.copy() for name, value in state.items()}, case.dtype, case.layout)
    yield from compare_state(subject.state(), state, dict.fromkeys(state, 0.0))
    for x, cotangent in case.inputs():
        before = dict(reference.statistics)
        y = reference.forward(x, case.training)
        dx, gradients = reference.backward(cotangent)
        outcome = subject.run(x.copy(), case.training, cotangent.copy())
        allowed = tolerances(reference, cotangent, before, case.dtype)
        yield compare("input", outcome.x, x, 0.0)
        yield compare("y", outcome.y, y, allowed["y"], dtype=case.dtype)
        yield compare("dx", outcome.dx, dx, allowed["dx"], dtype=case.dtype)
        yield from compare_gradients(outcome, gradients, allowed)
        exact = dict.fromkeys(reference.parameters, 0.0)
        expected = {name: state[name] for name in reference.parameters} | reference.statistics
        yield from compare_state(outcome.state, expected, allowed | exact)


class Extended(Layer):
    """The reference with more digits than float64, where the platform has them: its own do not count."""

    dtype = np.longdouble


def compare_gradients(
    outcome: Outcome, expected: dict[str, Array], allowed: dict[str, float]
) -> Iterator[Deviation]:
    """Every parameter's gradient, and that none is missing or too many."""
    yield _same_names("gradients", outcome.gradients.keys(), expected.keys())
    for name in expected.keys() & outcome.gradients.keys():
        yield compare(f"d {name}", outcome.gradients[name], expected[name], allowed[f"d {name}"])


def compare_state(
    state: dict[str, Array], expected: dict[str, Array], allowed: dict[str, float]
) -> Iterator[Deviation]:
    """Every stored array, and that none is missing or too many."""
    yield _same_names("state", state.keys(), expected.keys())
    for name in expected.keys() & state.keys():
        yield compare(name, state[name], expected[name], allowed[name])


def compare(
    quantity: str, actual: Array, expected: Array, tolerance: float, dtype: str | None = None
) -> Deviation:
    """The largest deviation of one array; a wrong shape or dtype is an infinite one."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    if actual.shape != expected.shape:
        return Deviation(quantity, np.inf, tolerance, f"shape {actual.shape} where {expected.shape} is due")
    if dtype is not None and actual.dtype.name != dtype:
        return Deviation(quantity, np.inf, tolerance, f"dtype {actual.dtype.name} where {dtype} is due")
    if actual.size == 0:
        return Deviation(quantity, 0.0, tolerance)
    distance = np.abs(actual.astype(np.longdouble) - expected)
    place = np.unravel_index(int(np.argmax(np.nan_to_num(distance, nan=np.inf))), distance.shape)
    error = float(np.nan_to_num(distance[place], nan=np.inf))
    at = f"at {[int(i) for i in place]}: {actual[place]!r} where {expected[place]!r} is due"
    return Deviation(quantity, error, tolerance, at)


def _same_names(quantity: str, actual: Iterable[str], expected: Iterable[str]) -> Deviation:
    if set(actual) == set(expected):
        return Deviation(quantity)
    return Deviation(quantity, np.inf, 0.0, f"{sorted(actual)} where {sorted(expected)} are due")

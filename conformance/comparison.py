"""One case on one subject: every quantity that came out against the reference's."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from rbn.conformance.cases import REFUSED_SPOILS, Case
from rbn.conformance.readable import said
from rbn.conformance.subject import Array, Outcome, Subject
from rbn.conformance.tolerances import roundings, tolerances
from rbn_core.matching import State
from rbn_core.reference import Layer, Steps

MEMORY = ("x", "cotangent", "loaded state", "earlier y", "earlier dx")
"""What no step may change: the arrays that a layer was given, and those that its earlier steps returned."""


OPTIONAL = ("gamma", "beta", "num_batches_tracked")
"""What a layer can do without: there are right numbers of what is left."""


SMALL = 500
"""Up to so many values what is due in a case is kept for long."""


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
class Step:
    """What is due in one step of a case.

    Attributes:
        x: The input.
        cotangent: The gradient of the output.
        outcome: What the reference gives.
        tolerances: What each quantity may be off by.
        inside: What the reference computed on its way to the output.
    """

    x: Array
    cotangent: Array
    outcome: Outcome
    tolerances: Mapping[str, float]
    inside: Steps


class Extended(Layer):
    """The reference with more digits than float64, where the platform has them: its own do not count."""

    dtype = np.longdouble


def due(case: Case) -> tuple[Step, ...]:
    """What the reference gives in a case, step by step."""
    return _small(case) if math.prod(case.shape) <= SMALL else _large(case)


def _due(case: Case) -> tuple[Step, ...]:
    state, config = case.state(), case.config
    name, kind = case.spoil
    if kind == "missing" and name in config.parameters and name in OPTIONAL:
        without_it: dict[str, Any] = {name: False}
        config = replace(config, **without_it)
        del state[name]
    reference = Extended(config)
    reference.load(state)
    narrower = dict.fromkeys(reference.parameters, case.dtype) if case.precision else {}
    if kind == "half" and (case.training or name in reference.parameters):
        narrower = {name: "float16"}
    steps = []
    for x, cotangent in case.inputs():
        before = dict(reference.statistics)
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are what some cases are about
            y = reference.forward(x, case.training)
            dx, gradients = reference.backward(cotangent)
            allowed = tolerances(reference, cotangent, before, case.dtype)
        for quantity, more in roundings(reference, gradients, narrower):
            allowed[quantity] += more
        after = {name: state[name] for name in reference.parameters} | {
            name: np.asarray(value) for name, value in reference.statistics.items()
        }
        exact = dict.fromkeys(("x", *reference.parameters), 0.0)
        assert reference.steps is not None
        outcome = Outcome(y, dx, gradients, after, x)
        steps.append(Step(x, cotangent, outcome, allowed | exact, reference.steps))
    return tuple(steps)


# A failed case is looked at again, once for every mistake, and the small ones once for every diagnosis.
_small = lru_cache(maxsize=512)(_due)
_large = lru_cache(maxsize=8)(_due)


def deviations(subject: Subject, case: Case, outcomes: list[Outcome] | None = None) -> Iterator[Deviation]:
    """Run a case on a subject and compare all that comes out, step by step, and in the end `MEMORY`.

    Args:
        subject: The implementation under test.
        case: The case, with options that the subject has.
        outcomes: Receives what the subject gave at every step.
    """
    state = case.state()
    subject = subject.through(case.way) if case.way else subject
    subject = subject.under(case.precision) if case.precision else subject
    subject = subject.spread(case.shares) if case.shares else subject
    ignored = () if subject.counts_batches else ("num_batches_tracked",)
    given = copy.deepcopy(state)
    subject.build(case.config, given, case.dtype, case.layout)
    yield from compare_arrays("state", subject.state(), without(state, ignored), dict.fromkeys(state, 0.0))
    if case.refused:
        yield from refusal(subject, case, outcomes)
        return
    if case.spoilt:
        yield from hostile(subject, case, ignored, outcomes)
        return
    memory: list[tuple[str, Array, Array]] = [("loaded state", given[name], state[name]) for name in state]
    dtype = None if case.precision else case.dtype
    for step in due(case):
        cotangent = step.cotangent.copy()
        outcome = subject.run(step.x.copy(), case.training, cotangent)
        now = copy.deepcopy(outcome)  # the next step may change what a view shows
        if outcomes is not None:
            outcomes.append(now)
        due_now = replace(step.outcome, state=without(step.outcome.state, ignored))
        yield from compare_outcomes(outcome, due_now, step.tolerances, dtype, not subject.forward_only)
        memory += [("cotangent", cotangent, step.cotangent)]
        memory += [("earlier y", outcome.y, now.y), ("earlier dx", outcome.dx, now.dx)]
    for quantity, after, before in memory:
        yield compare(quantity, after, before, 0.0)


def refusal(subject: Subject, case: Case, outcomes: list[Outcome] | None) -> Iterator[Deviation]:
    """Whether a subject refuses the input that has to be refused, and its state is then as it was."""
    (x, cotangent), *_ = case.inputs()
    before = copy.deepcopy(subject.state())
    try:
        outcome = subject.run(x, case.training, cotangent)
    except Exception as error:
        yield from refused(subject, error, before)
        return
    if outcomes is not None:
        outcomes.append(copy.deepcopy(outcome))
    yield not_refused("one value per channel has no variance", outcome)


def hostile(
    subject: Subject, case: Case, ignored: Iterable[str], outcomes: list[Outcome] | None
) -> Iterator[Deviation]:
    """What a subject makes of a spoilt state: a refusal, or the right numbers where there are such.

    Args:
        subject: The implementation under test, built.
        case: The case, of which something is spoilt.
        ignored: What the subject does not store.
        outcomes: Receives what the subject gave.
    """
    name, kind = case.spoil
    (step,) = due(case)
    before = copy.deepcopy(subject.state())
    cotangent = step.cotangent.copy()
    try:
        subject.spoil(name, kind)
        before = copy.deepcopy(subject.state())
        outcome = subject.run(step.x.copy(), case.training, cotangent)
    except Exception as error:
        if (name, kind) == ("num_batches_tracked", "missing"):  # the steps of such a layer are right ones
            raise
        yield from refused(subject, error, before)
        return
    if outcomes is not None:
        outcomes.append(copy.deepcopy(outcome))
    if kind in REFUSED_SPOILS or (kind == "missing" and name not in OPTIONAL):
        yield not_refused(f"{name} is {kind}", outcome)
        return
    found, expected = outcome, step.outcome
    loose = {*ignored, name} if kind == "missing" else {*ignored}
    if kind == "integer" and name not in found.gradients:  # integers have none
        expected = replace(expected, gradients=without(expected.gradients, [name]))
    for one, other in ((name, case.partner), (case.partner, name)):
        # A statistic that lies in the memory of a parameter changes that, too.
        if one in expected.gradients and other in found.state and one in found.state:
            loose |= {one} if np.array_equal(found.state[one], found.state[other]) else set()
    found = replace(found, state=without(found.state, loose))
    expected = replace(expected, state=without(expected.state, loose))
    yield from compare_outcomes(found, expected, step.tolerances)
    yield compare("cotangent", cotangent, step.cotangent, 0.0)


def refused(subject: Subject, error: Exception, before: State) -> Iterator[Deviation]:
    """Whether what a subject raised is a refusal, whose text is then shown, and its state is as it was."""
    raised = said(error)
    slips = {NotImplementedError, RecursionError} - {*subject.refusals}  # both are RuntimeErrors
    if isinstance(error, tuple(slips)) or not isinstance(error, subject.refusals):
        kinds = " or ".join(kind.__name__ for kind in subject.refusals)
        yield Deviation("refusal", np.inf, 0.0, f"is due as a {kinds}, and it raised {raised}")
        return
    yield Deviation("refusal", message=raised)
    yield from compare_arrays("state", subject.state(), before, dict.fromkeys(before, 0.0))


def not_refused(why: str, outcome: Outcome) -> Deviation:
    """That a refusal was due, and what came instead."""
    values = {"y": outcome.y.ravel()[0]} | {name: v for name, v in outcome.state.items() if "running" in name}
    given = ", ".join(f"{name} {value}" for name, value in values.items())
    return Deviation("refusal", np.inf, 0.0, f"is due: {why}. Got {given}")


def compare_outcomes(
    actual: Outcome,
    expected: Outcome,
    allowed: Mapping[str, float],
    dtype: str | None = None,
    gradients: bool = True,
) -> Iterator[Deviation]:
    """Every quantity of one step, or all but the gradients; y and dx must have the dtype, if one is given."""
    yield compare("x", actual.x, expected.x, allowed["x"])
    yield compare("y", actual.y, expected.y, allowed["y"], dtype=dtype)
    if gradients:
        yield compare("dx", actual.dx, expected.dx, allowed["dx"], dtype=dtype)
        yield from compare_arrays("gradients", actual.gradients, expected.gradients, allowed, prefix="d ")
    yield from compare_arrays("state", actual.state, expected.state, allowed)


def compare_arrays(
    what: str, actual: State, expected: State, allowed: Mapping[str, float], prefix: str = ""
) -> Iterator[Deviation]:
    """Every array under its name, and that none is missing or too many."""
    if actual.keys() != expected.keys():
        message = f"{sorted(actual)} where {sorted(expected)} are due"
        yield Deviation(what, np.inf, 0.0, message)
    for name in expected.keys() & actual.keys():
        yield compare(prefix + name, actual[name], expected[name], allowed.get(prefix + name, 0.0))


def compare(
    quantity: str, actual: Array, expected: Array, tolerance: float, dtype: str | None = None
) -> Deviation:
    """The largest deviation of one array; a wrong shape or dtype is an infinite one.

    What is not finite in the reference must not be finite either; whether it is infinite or NaN depends on
    the order of operations.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    if actual.shape != expected.shape:
        return Deviation(quantity, np.inf, tolerance, f"shape {actual.shape} where {expected.shape} is due")
    if dtype is not None and actual.dtype.name != dtype:
        return Deviation(quantity, np.inf, tolerance, f"dtype {actual.dtype.name} where {dtype} is due")
    if np.array_equal(actual, expected):  # most are, and what follows takes longer
        return Deviation(quantity, 0.0, tolerance)
    found, right = actual.astype(np.longdouble), expected.astype(np.longdouble)
    with np.errstate(invalid="ignore"):
        distance = np.abs(found - right)
    distance = np.where(np.isnan(distance), np.inf, distance)
    distance = np.where(np.isfinite(found) | np.isfinite(right), distance, 0.0)
    place = np.unravel_index(int(np.argmax(distance)), distance.shape)
    at = f"at {[int(i) for i in place]}: {float(found[place])!r} where {float(right[place])!r} is due"
    return Deviation(quantity, float(distance[place]), tolerance, at)


def raised(error: Exception) -> Deviation:
    """That a subject raised where it should not."""
    return Deviation("raised", math.inf, 0.0, said(error))


def worst_of_each(found: Iterable[Deviation]) -> Iterator[Deviation]:
    """Of every quantity its worst deviation."""
    worst: dict[str, Deviation] = {}
    for deviation in found:
        known = worst.get(deviation.quantity)
        if known is None or deviation.ratio > known.ratio:
            worst[deviation.quantity] = deviation
    yield from worst.values()


def without(state: State, ignored: Iterable[str]) -> State:
    """The state but for some names."""
    return {name: value for name, value in state.items() if name not in ignored}

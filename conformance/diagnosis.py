"""What is wrong with a subject: the known mistakes that predict all that it does, or else facts."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from rbn.conformance.cases import Case
from rbn.conformance.comparison import MEMORY, Deviation, compare, deviations, due, raised, worst_of_each
from rbn.conformance.facts import counted, facts_of
from rbn.conformance.mutants import MUTANTS, Mutant
from rbn.conformance.seen import COUNTER, Seen, is_gradient, is_ordinary
from rbn.conformance.subject import Array, Outcome
from rbn.conformance.tolerances import largest

Behaviour = Callable[[Mutant, Case], Seen]

CAUSES = 3
"""How many causes are named at most."""

SIZES = 10.0
"""By which factor the errors of two implementations with the same mistake of rounding may differ."""

SAMPLE = 150
"""On how many cases all mistakes are tried that are still possible; what is then left is tried on all."""

WITHOUT_NUMBERS = ("refusal", "state", "gradients", *MEMORY)
"""What is wrong or right, and has no numbers that could be the same."""


@dataclass(frozen=True)
class Cause:
    """A known mistake that a subject behaves like.

    Attributes:
        mistake: What is wrong, in a sentence that says how sure it is.
        cases: The ids of the failed cases that it predicts.
    """

    mistake: str
    cases: tuple[str, ...]


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with a subject, as far as all its cases together tell.

    Attributes:
        causes: At most three known mistakes. Each of them predicts what it would do to every case: no case
            that ran contradicts it.
        facts: Where the causes leave something unexplained, what the failures have in common.
        summary: What the causes explain, in a sentence; empty where nothing failed.
    """

    causes: tuple[Cause, ...] = ()
    facts: tuple[str, ...] = ()
    summary: str = ""

    def of(self, case: str) -> tuple[str, ...]:
        """The causes of one failed case."""
        return tuple(cause.mistake for cause in self.causes if case in cause.cases)

    @property
    def lines(self) -> list[str]:
        """All of it as lines of text."""
        causes = [f"{cause.mistake} ({counted(len(cause.cases), 'failed case')})" for cause in self.causes]
        return [*causes, *([self.summary] if self.summary else []), *(f"- {fact}" for fact in self.facts)]


@dataclass
class Suspect:
    """A mistake that nothing has contradicted yet.

    Attributes:
        mutant: The mistake.
        behaviour: What a mistake does in a case.
        explained: What it predicts of what is wrong, as pairs of a case and a quantity.
        exact: Whether that was number by number.
        tried: The cases that it was tried on.
        excused: Whether a case out of the ordinary is wrong as it predicts, but with other numbers.
    """

    mutant: Mutant
    behaviour: Behaviour
    explained: set[tuple[Case, str]] = field(default_factory=set)
    exact: bool = True
    tried: set[Case] = field(default_factory=set)
    excused: bool = False

    def goes_with(self, seen: Seen) -> bool:
        """Whether a case agrees with the mistake; what it then explains is noted."""
        case = seen.case
        if case in self.tried or not self.mutant.about(case):
            return True
        self.tried.add(case)
        theirs = self.behaviour(self.mutant, case)
        ratios = {quantity: theirs.ratios[quantity] for quantity in theirs.wrong}
        if "raised" in ratios:
            return False
        required = {quantity for quantity in ratios if counts(quantity, seen, ratios)}
        if not seen.wrong:
            clearly = SIZES if self.mutant.rounding else 2.0  # both may be off by one tolerance
            return all(ratios[quantity] <= clearly for quantity in required)
        same = alike(seen, theirs, set() if self.mutant.rounding else required)
        if required <= same:
            explained = {*seen.wrong} & same & ratios.keys()
            # The gradients of a wrong output may be its own, as automatic differentiation finds them, or not.
            if "y" in explained:
                explained |= {quantity for quantity in seen.wrong if is_gradient(quantity)}
            if COUNTER in seen.wrong and COUNTER in ratios:
                explained |= {COUNTER}
        elif self.mutant.rounding and all(
            about_as_much(seen.ratios.get(quantity, 0.0), ratios.get(quantity, 0.0))
            for quantity in required | seen.wrong
        ):
            explained, self.exact = set(seen.wrong), False
        elif not seen.ordinary and required <= seen.wrong:
            self.excused = True  # rounding may be wrong there, too
            return True
        else:
            return False
        self.explained |= {(case, quantity) for quantity in explained}
        return True


class Evidence:
    """What a subject did in all its cases, from which the diagnosis is made in the end."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []

    def add(self, name: str, case: Case, outcomes: Sequence[Outcome], found: Iterable[Deviation]) -> None:
        """Remember a case.

        Args:
            name: Its id in the suite.
            case: The case, with options that the subject has.
            outcomes: What the subject gave, step by step.
            found: Its deviations from the reference.
        """
        self.seen.append(Seen.of(name, case, outcomes, found))

    def diagnose(self, mutants: Sequence[Mutant] = MUTANTS, behave: Behaviour | None = None) -> Diagnosis:
        """What explains the failures and the passes.

        Args:
            mutants: The mistakes that are known.
            behave: What a mistake does in a case, by default `behaviour`.
        """
        failed = [seen for seen in self.seen if seen.wrong]
        if not failed:
            return Diagnosis()
        chosen = self.cover(self.suspects(mutants, behave or behaviour))
        explained = set().union(*(suspect.explained for group in chosen for suspect in group))
        # What a mistake cannot be tried on says nothing where a cause is found elsewhere.
        compared = [seen for seen in self.seen if not chosen or not seen.lost]
        left = [seen.without(explained) for seen in compared]
        causes = [
            Cause(
                ("behaves like: " if suspect.exact else "fails in the same quantities, and by as much, as: ")
                + suspect.mutant.mistake,
                tuple(
                    seen.name
                    for seen in failed
                    if any((seen.case, q) in suspect.explained for q in seen.wrong)
                ),
            )
            for group in chosen
            for suspect in group
        ][:CAUSES]
        unexplained = [seen for seen in left if seen.wrong]
        return Diagnosis(
            tuple(causes),
            tuple(facts_of(left)) if unexplained else (),
            summary(chosen, compared, len(unexplained)),
        )

    def suspects(self, mutants: Sequence[Mutant], behave: Behaviour) -> list[Suspect]:
        """The mistakes that explain something and that no case contradicts."""
        usable = [seen for seen in self.seen if seen.comparable]
        suspects = [Suspect(mutant, behave) for mutant in mutants]
        for seen in telling(usable):
            suspects = [suspect for suspect in suspects if suspect.goes_with(seen)]
        suspects = [suspect for suspect in suspects if suspect.explained]
        # The cheapest first, and those that failed: they rule most out.
        for seen in sorted(usable, key=lambda seen: (not seen.wrong, math.prod(seen.case.shape))):
            suspects = [suspect for suspect in suspects if suspect.goes_with(seen)]
        return [
            suspect
            for suspect in suspects
            if not suspect.excused or any(is_ordinary(case) for case, _ in suspect.explained)
        ]

    def cover(self, suspects: Sequence[Suspect]) -> list[list[Suspect]]:
        """As few of them as explain most, each with those that nothing tells apart from it."""
        chosen: list[list[Suspect]] = []
        explained: set[tuple[Case, str]] = set()
        wrong = {(seen.case, quantity) for seen in self.seen for quantity in seen.wrong if seen.comparable}
        # By the size of the errors alone nothing is named but what explains everything.
        suspects = [suspect for suspect in suspects if suspect.exact or suspect.explained >= wrong]
        while len(chosen) < CAUSES:
            gains = [(len(suspect.explained - explained), suspect.exact) for suspect in suspects]
            best = max(gains, default=(0, True))
            if not best[0]:
                break
            first = suspects[gains.index(best)]
            group = [
                suspect
                for suspect in suspects
                if suspect.explained - explained == first.explained - explained
                and suspect.exact == first.exact
            ]
            chosen.append(group)
            explained |= first.explained
        if explained >= wrong:
            return chosen
        # A part of what is wrong has a cause only where that explains all that is wrong with a quantity.
        by_quantity: dict[str, set[tuple[Case, str]]] = {}
        for case, quantity in sorted(wrong, key=lambda pair: not is_ordinary(pair[0])):
            pairs = by_quantity.setdefault(quantity, set())
            if is_ordinary(case) or not any(is_ordinary(other) for other, _ in pairs):
                pairs.add((case, quantity))
        return [
            group for group in chosen if any(pairs <= group[0].explained for pairs in by_quantity.values())
        ]


def summary(chosen: Sequence[Sequence[Suspect]], seen: Sequence[Seen], unexplained: int) -> str:
    """What the causes explain, in a sentence."""
    failed = sum(bool(each.wrong) for each in seen)
    passed = len(seen) - failed
    if not chosen:
        return (
            f"No known mistake gives these failures and these passes ({failed} and {passed} cases). "
            "What they have in common:"
        )
    if unexplained:
        return (
            f"That leaves something in {counted(unexplained, 'failed case')} that no known mistake predicts. "
            "What it has in common:"
        )
    apart = ""
    names = "This predicts" if len(chosen) == 1 else "Together they predict"
    if any(len(group) > 1 for group in chosen):
        apart = " No case that ran tells the alike ones apart."
        names = "Each of them predicts" if len(chosen) == 1 else names
    numbers = (
        "number by number" if all(s.exact for group in chosen for s in group) else "quantity by quantity"
    )
    passes = f", and {all_of(passed, 'pass', 'passes')}" if passed else ""
    return f"{names} {all_of(failed, 'failure', 'failures')}, {numbers}{passes}.{apart}"


def all_of(number: int, one: str, several: str) -> str:
    """All of so many."""
    return f"the {one}" if number == 1 else f"all {number} {several}"


def telling(usable: Sequence[Seen]) -> list[Seen]:
    """A few cases that tell most: the smallest of every kind of failure, and of the passes of every row."""
    kinds: dict[object, Seen] = {}
    for seen in sorted(usable, key=lambda seen: (seen.case.dtype != "float64", math.prod(seen.case.shape))):
        case = seen.case
        special = (case.spoilt, bool(case.precision), bool(case.shares), case.layout)
        what = [*case.options.items(), *sorted(seen.wrong)] if seen.wrong else [*case.options]
        kinds.setdefault((case.layer, case.training, *special, str(what)), seen)

    def order(seen: Seen) -> tuple[bool, bool, bool, int]:
        case = seen.case
        plain = not (case.spoilt or case.precision or case.shares)
        return not plain, not seen.wrong, case.layer != "rbn", len(case.options)

    return sorted(kinds.values(), key=order)[:SAMPLE]


def counts(quantity: str, seen: Seen, ratios: Mapping[str, float]) -> bool:
    """Whether what a mistake does to a quantity has to be seen in a subject that has the mistake."""
    if quantity == COUNTER:  # it may or may not be wrong along with the statistics
        return COUNTER in seen.ratios and len(ratios) == 1
    return not (is_gradient(quantity) and "y" in seen.wrong)


def about_as_much(ratio: float, other: float) -> bool:
    """Whether two errors, in units of their tolerance, are of one size, or both hardly errors."""
    one, two = max(ratio, 1.0), max(other, 1.0)
    return one == two or 1 / SIZES <= one / two <= SIZES


def alike(seen: Seen, theirs: Seen, required: Collection[str]) -> set[str]:
    """The quantities in which a mistake gives what the subject gave, to the tolerance.

    Of what has no numbers that is whether it is wrong; whatever is written where nothing may be is the same.
    Where one that is required is not alike, the others do not matter.
    """
    both = {*seen.wrong} & theirs.wrong
    if len(theirs.outcomes) != len(seen.outcomes) or seen.error != theirs.error:
        return set()
    if not seen.outcomes or seen.case.refused:
        return both
    worst: dict[str, float] = {}
    for mine, other, step in zip(seen.outcomes, theirs.outcomes, due(seen.case), strict=True):
        for quantity, one, two, right in pairs(mine, other, step.outcome):
            # Wrong numbers that are larger have larger roundings.
            tolerance = step.tolerances.get(quantity, 0.0)
            due_size, size = largest(right), largest(two)
            if size > due_size > 0.0:
                tolerance *= min(size / due_size, sys.float_info.max)
            same = one.dtype == two.dtype or quantity not in ("y", "dx")
            ratio = compare(quantity, one, two, tolerance).ratio if same else math.inf
            if ratio > 1.0 and quantity in required:
                return set()
            worst[quantity] = max(worst.get(quantity, 0.0), ratio)
    same_numbers = {quantity for quantity, ratio in worst.items() if ratio <= 1.0}
    if "refusal" in both and worst.keys() - same_numbers:
        return set()
    return same_numbers | both & {*WITHOUT_NUMBERS}


def pairs(mine: Outcome, other: Outcome, right: Outcome) -> Iterator[tuple[str, Array, Array, Array]]:
    """What two steps gave under every name that both have, and what is due."""
    yield "y", mine.y, other.y, right.y
    yield "dx", mine.dx, other.dx, right.dx
    for name in mine.gradients.keys() & other.gradients.keys():
        yield f"d {name}", mine.gradients[name], other.gradients[name], right.gradients.get(name, np.zeros(1))
    for name in mine.state.keys() & other.state.keys():
        yield name, mine.state[name], other.state[name], right.state.get(name, np.zeros(1))


def those_for(case: Case, mutants: Sequence[Mutant] = MUTANTS) -> list[Mutant]:
    """The mutants that a case can show something of; to them every way into mixed precision is the same."""
    return [mutant for mutant in mutants if mutant.about(case) and mutant.subject().takes(case.generic)]


def behaviour(mutant: Mutant, case: Case) -> Seen:
    """What a mutant gives in a case."""
    return _behaviour(mutant, case.generic)


@lru_cache(maxsize=2 * len(MUTANTS))
def _behaviour(mutant: Mutant, case: Case) -> Seen:
    outcomes: list[Outcome] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a mistake may overflow, or average nothing
            found = list(worst_of_each(deviations(mutant.subject(), case, outcomes)))
    except Exception as error:  # a mistake may make a layer refuse what it should take
        found = [raised(error)]
    return Seen.of(case.id, case, outcomes, found)

"""What a failure looks like: the planted mistakes that fail in the same way."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache

from rbn.conformance.cases import Case
from rbn.conformance.comparison import MEMORY, Deviation, are_alike, deviations, worst_of_each
from rbn.conformance.mutants import MUTANTS, Mutant
from rbn.conformance.subject import Outcome

ALIKE = 3
"""How many mistakes are named that fail in much the same way."""

MUCH = math.log(10)
"""Up to which distance that is so: a factor of ten between the errors."""

WORST = 1e9
"""How many times the tolerance an error counts at most."""

COUNTER = "num_batches_tracked"


class Diagnosis:
    """Finds the causes of one subject's failures.

    A mistake that gives the very numbers that the subject gave is its cause, or one that nothing tells apart
    from it. Failing that, mistakes that fail in the same quantities, or by about as much, are where to look.
    """

    def __init__(self) -> None:
        self.likely: Sequence[Mutant] = ()

    def causes(self, case: Case, outcomes: Sequence[Outcome], found: Sequence[Deviation]) -> tuple[str, ...]:
        """Sentences that say what a failed case looks like.

        Args:
            case: The failed case, with options that the subject has.
            outcomes: What the subject gave, step by step; not all steps where it raised.
            found: Its deviations from the reference.
        """
        if len(outcomes) < case.steps and not case.refused and not case.spoilt:
            return ()
        wrong = beyond(found)

        def counts(quantity: str) -> bool:
            """Whether a quantity tells mistakes apart."""
            if quantity in MEMORY:  # that it is changed is the mistake, whatever is written there
                return False
            if quantity == COUNTER:  # it may or may not be wrong along with the statistics
                return wrong.keys() == {COUNTER}
            # The gradients of a wrong output may be its own, as automatic differentiation finds them, or not.
            return "y" not in wrong or not is_gradient(quantity)

        # What explained an earlier case is tried alone at first: one mistake fails in many cases.
        for mutants in (self.likely, MUTANTS):
            behaviours = [(mutant, *behaviour(mutant, case)) for mutant in those_for(case, mutants)]
            same = [
                mutant
                for mutant, theirs, failing in behaviours
                if failing and theirs and len(theirs) == len(outcomes) and memory(wrong) == memory(failing)
                if are_alike(case, outcomes, theirs, counts)
            ]
            if same:
                self.likely = same
                return tuple(f"behaves like: {mutant.mistake}" for mutant in same)
        alike = sorted(
            (distance(wrong, failing), mutant.mistake)
            for mutant, _, failing in behaviours
            if much_the_same(wrong, failing)
        )
        return tuple(f"fails in much the same way as: {mistake}" for _, mistake in alike[:ALIKE])


def those_for(case: Case, mutants: Sequence[Mutant] = MUTANTS) -> list[Mutant]:
    """The mutants that a case is about; to all of them every way into mixed precision is the same."""
    return [mutant for mutant in mutants if mutant.subject().takes(case.generic)]


def behaviour(mutant: Mutant, case: Case) -> tuple[list[Outcome], Mapping[str, float]]:
    """What a mutant gives in a case, nothing where it raises, and which quantities are wrong by how much."""
    return _behaviour(mutant, case.generic)


@lru_cache(maxsize=2 * len(MUTANTS))
def _behaviour(mutant: Mutant, case: Case) -> tuple[list[Outcome], Mapping[str, float]]:
    outcomes: list[Outcome] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a mistake may overflow, or average nothing
            found = list(worst_of_each(deviations(mutant.subject(), case, outcomes)))
    except Exception:  # a mistake may make a layer refuse what it should take
        return [], {"raised": math.inf}
    return outcomes, beyond(found)


def beyond(found: Sequence[Deviation]) -> Mapping[str, float]:
    """Which quantities are beyond their tolerance, and how many times."""
    return {deviation.quantity: deviation.ratio for deviation in found if deviation.ratio > 1.0}


def much_the_same(some: Mapping[str, float], others: Mapping[str, float]) -> bool:
    """Whether two fail in the same quantities, or in some of them and in all by about as much."""
    if some.keys() == others.keys():
        return True
    return not some.keys().isdisjoint(others) and distance(some, others) <= MUCH


def distance(some: Mapping[str, float], others: Mapping[str, float]) -> float:
    """How differently two fail: the factor between their errors, as a logarithm, on average."""
    logarithms = [
        abs(math.log(min(some.get(name, 1.0), WORST)) - math.log(min(others.get(name, 1.0), WORST)))
        for name in {*some, *others}
    ]
    return sum(logarithms) / max(len(logarithms), 1)


def memory(failing: Mapping[str, float]) -> set[str]:
    """What was changed that no step may change."""
    return {*MEMORY} & failing.keys()


def is_gradient(quantity: str) -> bool:
    """Whether a quantity is of the backward pass."""
    return quantity in ("dx", "gradients") or quantity.startswith("d ")

"""What a failure looks like: the planted mistakes that fail in the same way."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache

from rbn.conformance.cases import Case
from rbn.conformance.comparison import Deviation, are_alike, deviations, worst_of_each
from rbn.conformance.mutants import MUTANTS, Mutant
from rbn.conformance.subject import Outcome

ALIKE = 3
"""How many mistakes are named that fail in the same quantities."""


class Diagnosis:
    """Finds the causes of one subject's failures.

    A mistake that gives the very numbers that the subject gave is its cause, or one that nothing tells apart
    from it. Failing that, mistakes that fail in the same quantities are where to look.
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
        if len(outcomes) < case.steps:
            return ()
        wrong = quantities_beyond(found)
        # What explained an earlier case is tried alone at first: one mistake fails in many cases.
        for mutants in (self.likely, MUTANTS):
            behaviours = [(mutant, *behaviour(mutant, case)) for mutant in mutants]
            same = [
                m
                for m, theirs, failing in behaviours
                if failing and theirs and are_alike(case, outcomes, theirs)
            ]
            if same:
                self.likely = same
                return tuple(f"behaves like: {mutant.mistake}" for mutant in same)
        alike = [mutant.mistake for mutant, _, failing in behaviours if failing == wrong]
        return tuple(f"fails in the same quantities as: {mistake}" for mistake in alike[:ALIKE])


@lru_cache(maxsize=2 * len(MUTANTS))
def behaviour(mutant: Mutant, case: Case) -> tuple[list[Outcome], frozenset[str]]:
    """What a mutant gives in a case, nothing where it raises, and which quantities are wrong."""
    outcomes: list[Outcome] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a mistake may overflow, or average nothing
            found = list(worst_of_each(deviations(mutant.subject(), case, outcomes)))
    except Exception:  # a mistake may make a layer refuse what it should take
        return [], frozenset({"raised"})
    return outcomes, quantities_beyond(found)


def quantities_beyond(found: Sequence[Deviation]) -> frozenset[str]:
    """Which quantities are beyond their tolerance."""
    return frozenset(deviation.quantity for deviation in found if deviation.ratio > 1.0)

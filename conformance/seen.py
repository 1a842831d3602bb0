"""What was seen of a subject in one case."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from rbn.conformance.cases import LARGE, Case
from rbn.conformance.comparison import Deviation
from rbn.conformance.data import EXTREMES
from rbn.conformance.subject import Outcome

COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Seen:
    """One case of a subject.

    Attributes:
        name: The id of the case in the suite.
        case: The case, with options that the subject has.
        ratios: Every quantity's worst error in units of its tolerance.
        wrong: The quantities beyond it that are to be explained.
        outcomes: What a failed case gave, step by step.
        message: What a subject said that raised, or did not refuse as it should.
    """

    name: str
    case: Case
    ratios: Mapping[str, float]
    wrong: frozenset[str]
    outcomes: Sequence[Outcome] = ()
    message: str = ""

    @classmethod
    def of(cls, name: str, case: Case, outcomes: Sequence[Outcome], found: Iterable[Deviation]) -> Seen:
        """What came of a case; the numbers of what is right are not needed."""
        found = tuple(found)
        ratios = {deviation.quantity: deviation.ratio for deviation in found}
        wrong = frozenset(quantity for quantity, ratio in ratios.items() if ratio > 1.0)
        said = [d.message for d in found if d.quantity in ("raised", "refusal") and d.ratio > 1.0]
        kept = tuple(outcomes) if wrong and math.prod(case.shape) <= LARGE else ()
        return cls(name, case, ratios, wrong, kept, said[0] if said else "")

    @property
    def error(self) -> str:
        """What was raised where nothing may be, or where something else is due; empty if nothing was."""
        _, raised, text = self.message.rpartition("it raised ")
        return text.partition(":")[0] if raised or "raised" in self.ratios else ""

    @property
    def comparable(self) -> bool:
        """Whether it can be compared with what a mistake would do: it did not raise, and has its numbers."""
        return "raised" not in self.ratios and not self.lost

    @property
    def ordinary(self) -> bool:
        """Whether it has ordinary numbers in float32 or float64, and nothing spoilt."""
        return is_ordinary(self.case)

    @property
    def lost(self) -> bool:
        """Whether its numbers are not there: they are too many, or went with the process that had them."""
        numbers = self.outcomes or self.ratios.keys() & {"raised", "refusal"}
        return math.prod(self.case.shape) > LARGE or bool(self.wrong and not numbers)

    def without(self, explained: Collection[tuple[Case, str]]) -> Seen:
        """The same, with only that to explain which is not yet."""
        return replace(self, wrong=frozenset(q for q in self.wrong if (self.case, q) not in explained))


def is_ordinary(case: Case) -> bool:
    """Whether a case has ordinary numbers in float32 or float64, and nothing spoilt."""
    wide = case.dtype in ("float32", "float64")
    return wide and case.data not in EXTREMES and not case.spoilt and not case.refused


def is_gradient(quantity: str) -> bool:
    """Whether a quantity is of the backward pass."""
    return quantity in ("dx", "gradients") or quantity.startswith("d ")

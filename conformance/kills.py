"""The kill matrix: which cases reject which mutant."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rbn.conformance.cases import LARGE, Case
from rbn.conformance.diagnosis import behaviour, those_for


def kills(cases: Sequence[Case]) -> Iterator[tuple[Case, tuple[str, ...]]]:
    """Run every mutant on every case that can show something new.

    That leaves out the large planes, and what is stored spoilt where a mistake is not about that.

    Yields:
        Every case with the names of the mutants that it rejects.
    """
    for case in (case for case in cases if math.prod(case.shape) <= LARGE):
        mutants = [mutant for mutant in those_for(case) if not case.spoilt or mutant.kind == "hostile"]
        yield case, tuple(mutant.name for mutant in mutants if behaviour(mutant, case)[1])

"""The kill matrix: which cases reject which mutant, as it is computed and as it ships with the suite.

    python -m rbn.conformance.kills [FILE]

writes the table anew, by default the suite's own. It takes some minutes, and is due after every change of
a case, of a mutant, of the reference or of a tolerance.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path

from rich.console import Console
from rich.progress import track

from rbn.conformance.cases import LARGE, Case
from rbn.conformance.diagnosis import behaviour, those_for
from rbn.conformance.mutants import MUTANTS
from rbn.conformance.suite import all_cases

TABLE = "kills.json"
"""The shipped table, in this package."""


def kills(cases: Sequence[Case]) -> Iterator[tuple[Case, tuple[str, ...]]]:
    """Run every mutant on every case that can show something new.

    That leaves out the large planes, and what is stored spoilt where a mistake is not about that.

    Yields:
        Every case with the names of the mutants that it rejects.
    """
    for case in (case for case in cases if math.prod(case.shape) <= LARGE):
        mutants = [mutant for mutant in those_for(case) if not case.spoilt or mutant.kind == "hostile"]
        yield case, tuple(mutant.name for mutant in mutants if behaviour(mutant, case).wrong)


def shipped_kills(cases: Iterable[Case]) -> Iterator[tuple[Case, tuple[str, ...]]]:
    """The same from the table that ships with the suite, at once.

    A case with other numbers (`--seeds`) counts as the suite's own of that name. What is not in the suite is
    left out.

    Yields:
        Every case that the table has, with the names of the mutants that it rejects.
    """
    table = shipped_table()
    for case in cases:
        name = replace(case, variant=0).id
        if name in table:
            yield case, table[name]


@cache
def shipped_table() -> Mapping[str, tuple[str, ...]]:
    """The names of the mutants that each case of the suite rejects, by the case's id."""
    content = json.loads((files("rbn.conformance") / TABLE).read_text())
    names = content["mutants"]
    return {
        case: tuple(name for place, name in enumerate(names) if int(rejected, 16) >> place & 1)
        for case, rejected in content["cases"].items()
    }


def table_text(found: Iterable[tuple[Case, tuple[str, ...]]]) -> str:
    """The table as a file: for every case a number in hexadecimal digits, whose bit i is the mutant i's."""
    names = [mutant.name for mutant in MUTANTS]
    cases = {case.id: f"{sum(1 << names.index(name) for name in killed):x}" for case, killed in found}
    return json.dumps({"mutants": names, "cases": cases}, indent=0) + "\n"


def main(arguments: Sequence[str]) -> None:
    """Write the table."""
    path = Path(arguments[0]) if arguments else Path(str(files("rbn.conformance") / TABLE))
    cases = all_cases()
    console = Console(stderr=True)
    path.write_text(
        table_text(track(kills(cases), f"{len(MUTANTS)} mutants", total=len(cases), console=console))
    )
    console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main(sys.argv[1:])

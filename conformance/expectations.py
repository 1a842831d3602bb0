"""What is known to differ, in a file beside somebody's tests: written by one run, held to by the next.

    ["theirs:layer".expected]       # the run's name, as on the command line
    "bn/train/offset0/1x3*" = "counts a batch before it refuses it"

    ["theirs:layer".absent]         # what it cannot run: it raises there
    "bn/*/float64" = "ValueError: takes no float64"

The patterns and reasons are those of a subject's `expected_failures` and `absent`.
"""

from __future__ import annotations

import fnmatch
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rbn.conformance.checks import ABSENT, EXPECTED, FAILED, Result
from rbn.conformance.readable import first_line
from rbn.conformance.subject import Subject
from rbn_core.errors import RBNValueError
from rbn_core.files import replacing

if TYPE_CHECKING:
    from rbn.conformance.runner import Run

HEAD = """\
# Where a layer is known to differ, and why: for `rbn conform --expected`, from --write-expected.
# A case that is named here and passes fails the run, too. Reasons may be changed, and * is anything.
"""

KINDS = ("expected", "absent")


@dataclass(frozen=True)
class Expectations:
    """What is known of one run.

    Attributes:
        expected: Where it differs, as {pattern of case ids: reason}.
        absent: What it cannot run, likewise.
    """

    expected: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)

    def declare(self, subject: Subject) -> None:
        """Add them to what a subject declares itself, whose own reasons come first."""
        if self.expected:
            subject.expected_failures = {**self.expected, **subject.expected_failures}
        if self.absent:
            subject.absent = {**self.absent, **subject.absent}


def read_expectations(path: Path) -> dict[str, Expectations]:
    """The expectations of every run that a file names.

    Raises:
        RBNValueError: There is no such file, or it is none of this kind.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RBNValueError(
            f"{path}: {first_line(str(error))}. --write-expected writes such a file."
        ) from None
    found = {}
    for name, tables in content.items():
        if not isinstance(tables, dict) or not set(tables) <= set(KINDS):
            raise RBNValueError(
                f'{path}: expected the tables ["{name}".expected] and ["{name}".absent], got {tables!r}.'
            )
        for table in tables.values():
            if not isinstance(table, dict) or not all(isinstance(why, str) and why for why in table.values()):
                raise RBNValueError(f'{path}: expected lines "pattern" = "reason" of {name}, got {table!r}.')
        found[name] = Expectations(**tables)
    return found


def write_expectations(path: Path, runs: Iterable[Run], before: Mapping[str, Expectations]) -> list[str]:
    """Write what failed, each with its reason: what differed, or what was raised.

    Of what was expected before, that stays which still fails, with its reason, and what did not run.

    Args:
        path: The file; what is there is replaced.
        runs: Finished runs.
        before: What they were run with.

    Returns:
        What cannot be expected, and so is not written, in words: a case that ended its process, one that
        passes though it is declared in the subject itself, a run that failed as a whole.
    """
    all_of = dict(before)
    left_out: list[str] = []
    for run in runs:
        if run.failure:
            left_out.append(f"{run.name}: {first_line(run.failure)}")
        results = [result for results in run.results.values() for result in results]
        old = before.get(run.name, Expectations())
        expected = still(old.expected, results, EXPECTED)
        absent = still(old.absent, results, ABSENT)
        for result in results:
            if result.status != FAILED or result.worst.ratio <= 1.0:
                if result.status == FAILED and not named(result, {**old.expected, **old.absent}):
                    left_out.append(f"{run.name}: {result.case}: {first_line(result.message)}")
            elif result.worst.quantity == "process":
                left_out.append(f"{run.name}: {result.case}: {first_line(result.message)}")
            elif result.worst.quantity == "raised":
                absent[result.case] = first_line(result.message.removeprefix("raised "))
            else:
                expected[result.case] = first_line("; ".join((result.message, *result.causes[:1])))
        all_of[run.name] = Expectations(expected, absent)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(HEAD + "".join(written(all_of)), encoding="utf-8")
    return left_out


def still(before: Mapping[str, str], results: Sequence[Result], status: str) -> dict[str, str]:
    """What stays of a table: a pattern if all of its cases came out so, else the ids of those that did."""
    kept: dict[str, str] = {}
    for pattern, why in before.items():
        matched = [result for result in results if named(result, {pattern: why})]
        right = [result.case for result in matched if result.status == status]
        kept |= {pattern: why} if len(right) == len(matched) else dict.fromkeys(right, why)
    return kept


def named(result: Result, table: Mapping[str, str]) -> bool:
    """Whether a pattern of the table matches the result's case."""
    return any(fnmatch.fnmatchcase(result.case, pattern) for pattern in table)


def written(expectations: Mapping[str, Expectations]) -> Iterable[str]:
    """The tables of a file. What JSON writes as a string TOML reads as one."""
    for name, known in expectations.items():
        for kind in KINDS:
            if table := getattr(known, kind):
                yield f"\n[{json.dumps(name, ensure_ascii=False)}.{kind}]\n"
                for pattern, why in table.items():
                    yield " = ".join(json.dumps(each, ensure_ascii=False) for each in (pattern, why)) + "\n"

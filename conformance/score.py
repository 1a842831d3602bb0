"""How well the diagnosis does: on the mistakes that it knows, on each of them as if unknown, on others.

python -m rbn.conformance.score
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

from rich.console import Console
from rich.progress import track

from rbn.conformance.cases import Case
from rbn.conformance.checks import check_case
from rbn.conformance.diagnosis import Diagnosis, Evidence, behaviour
from rbn.conformance.held_out import HELD_OUT
from rbn.conformance.mutants import MUTANTS, Mutant
from rbn.conformance.seen import Seen
from rbn.conformance.subject import Subject
from rbn.conformance.subjects.numpy import NumpyLayer
from rbn.conformance.suite import telling_cases
from rbn_core.reference import Layer

RIGHT, SILENT, MISLEADING = "right", "silent", "misleading"

KINDS = ("planted", "planted, but taken out", "held out")
"""What the diagnosis is scored on."""

RIGHT_ONE = Mutant("Right", "", "", partial(NumpyLayer, "right", Layer))
"""The reference, which has no mistake."""

PARTS: dict[str, tuple[str, ...]] = {
    "OtherRunningVariance": ("BiasedRunningVariance", "UnbiasedRunningVariance"),
    "OwnStatistics": ("RunningStatisticsOfOwnShare",),
    "CenteringAfterwards": ("RunningMeanOfX", "RunningVarianceOfX"),
    "TrainingDoesNotAccumulate": ("CounterStandsStill",),
    "ModeIgnored": ("BatchStatisticsInEvaluation", "EvaluationAccumulates", "EvaluationCounts"),
}
"""Mistakes that consist of others: these are rightly named where the whole is not known."""


@dataclass(frozen=True)
class Verdict:
    """What came of one mistake.

    Attributes:
        kind: One of `KINDS`.
        name: The mistake's name.
        word: "right": it is named, or its parts, or, where it is unknown, nothing is and the facts say what
            they have to; "silent": nothing is named, and the facts do not say it; "misleading": another is.
        diagnosis: What was said.
    """

    kind: str
    name: str
    word: str
    diagnosis: Diagnosis


class Scorer:
    """Scores the diagnosis on the same cases, on which every mistake is run once.

    Args:
        cases: What to run.
    """

    def __init__(self, cases: Sequence[Case] | None = None) -> None:
        self.cases = tuple(telling_cases() if cases is None else cases)
        self.behaviour = cache(behaviour)

    def seen(self, mutant: Mutant, case: Case) -> Seen:
        """What a mutant gives: the right thing in the cases that its mistake is not about."""
        return self.behaviour(mutant if mutant.about(case) else RIGHT_ONE, case)

    def known(self, mutant: Mutant) -> Verdict:
        """How a mutant is told its mistake."""
        found = self.diagnose(mutant, MUTANTS)
        named = [cause.mistake.endswith(mutant.mistake) for cause in found.causes]
        word = RIGHT if any(named) and not found.facts else MISLEADING if found.causes else SILENT
        return Verdict(KINDS[0], mutant.name, word, found)

    def unknown(self, mutant: Mutant) -> Verdict:
        """What a mutant is told whose mistake is taken out of those that are known."""
        found = self.diagnose(mutant, [other for other in MUTANTS if other is not mutant])
        parts = [other.mistake for other in MUTANTS if other.name in PARTS.get(mutant.name, ())]
        true = all(any(cause.mistake.endswith(part) for part in parts) for cause in found.causes)
        return Verdict(KINDS[1], mutant.name, RIGHT if true else MISLEADING, found)

    def diagnose(self, mutant: Mutant, known: Sequence[Mutant]) -> Diagnosis:
        """What is said of a mutant when these are known."""
        evidence = Evidence()
        subject = mutant.subject()
        evidence.seen = [self.seen(mutant, case) for case in self.cases if subject.takes(case)]
        return evidence.diagnose(known, self.behaviour)

    def held_out(self, subject: Subject, tells: Sequence[str], name: str) -> Verdict:
        """What a subject is told whose mistake is not among the mutants.

        Args:
            subject: The subject.
            tells: What the facts have to say, as patterns.
            name: What the mistake is called.
        """
        evidence = Evidence()
        for case in self.cases:
            if subject.takes(case):
                check_case(subject, case, evidence=evidence)
        found = evidence.diagnose(MUTANTS, self.behaviour)
        text = "\n".join(found.facts)
        told = all(re.search(pattern, text) for pattern in tells)
        return Verdict(KINDS[2], name, MISLEADING if found.causes else RIGHT if told else SILENT, found)

    def all(self) -> Iterator[Verdict]:
        """Every verdict."""
        for mutant in MUTANTS:
            yield self.known(mutant)
        for mutant in MUTANTS:
            yield self.unknown(mutant)
        for layer, tells in HELD_OUT.items():
            yield self.held_out(NumpyLayer(layer.__name__, layer), tells, layer.__name__)


def table(verdicts: Sequence[Verdict]) -> str:
    """The score as a table of Markdown, as docs/conformance.md has it."""
    counts = Counter((verdict.kind, verdict.word) for verdict in verdicts)
    lines = [f"| mistakes | {RIGHT} | {SILENT} | {MISLEADING} |", "|---|---|---|---|"]
    for kind in KINDS:
        words = " | ".join(str(counts[kind, word]) for word in (RIGHT, SILENT, MISLEADING))
        lines.append(f"| {kind} | {words} |")
    return "\n".join(lines)


def main() -> None:
    """Print the score, and what was said where it is not right."""
    console = Console(soft_wrap=True, highlight=False)
    total = 2 * len(MUTANTS) + len(HELD_OUT)
    verdicts = list(track(Scorer().all(), "diagnosing", total, console=console))
    for verdict in verdicts:
        if verdict.word != RIGHT or verdict.kind == KINDS[2]:
            console.print(f"{verdict.name} ({verdict.kind}): {verdict.word}", markup=False)
            console.print("\n".join(f"  {line}" for line in verdict.diagnosis.lines), markup=False)
    console.print(table(verdicts), markup=False)


if __name__ == "__main__":
    main()

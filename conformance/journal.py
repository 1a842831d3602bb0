"""What a run has found so far, on the disk as it goes: a killed run loses the case that it was at."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rbn.conformance.cases import Case, parse
from rbn.conformance.checks import Result, Results
from rbn.conformance.comparison import Deviation
from rbn.conformance.diagnosis import Cause, Diagnosis
from rbn.conformance.readable import first_line
from rbn.conformance.runner import Run
from rbn_core.errors import RBNValueError

SUFFIX = ".partial"
"""What a journal is called, behind the name of the report that it is for."""

KILLED = "interrupted"
"""What stopped a run that has no end in its journal."""


class Journal:
    """A file of JSON lines: first what is run, then every result as it comes in, and the end of every run.

    Args:
        path: The file; its folder is made, and what is there is replaced.
        command: What was called.
        targets: The names of the runs with their subjects.
        cases: What they run.
    """

    def __init__(
        self, path: Path, command: str, targets: Mapping[str, Sequence[str]], cases: Sequence[Case]
    ) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w", encoding="utf-8")
        self.places = {case.id: place for place, case in enumerate(cases)}
        self.begun: set[str] = set()
        self.write(command=command, targets=dict(targets), cases=list(self.places))

    def record(self, run: Run, name: str, result: Result | None) -> None:
        """Take a result of a run's subject, or the end of the run."""
        if run.name not in self.begun:
            self.begun.add(run.name)
            takes = [self.places[case] for case in run.takes]
            self.write(run=run.name, versions=run.versions, file=run.file, takes=takes)
        if result is None:
            diagnoses = {name: dataclasses.asdict(each) for name, each in run.diagnoses.items()}
            self.write(run=run.name, seconds=run.seconds, failure=run.failure, diagnoses=diagnoses)
        else:
            self.write(run=run.name, subject=name, result=dataclasses.asdict(result))

    def write(self, **content: Any) -> None:
        """Add a line."""
        self.file.write(json.dumps(content) + "\n")
        self.file.flush()

    def remove(self) -> None:
        """Close and remove the file: the reports have everything."""
        self.file.close()
        self.path.unlink(missing_ok=True)


def read_journal(path: Path) -> tuple[str, list[Run]]:
    """What was called, and its runs as far as they came.

    Raises:
        RBNValueError: The file is no such journal.
    """
    try:
        head, *lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        content = json.loads(head)
        cases = [parse(case) for case in content["cases"]]
        runs = {name: Run(name, references, cases) for name, references in content["targets"].items()}
        for line in lines:
            if line.endswith("\n"):  # a killed process may have written half of the last one
                take(json.loads(line), runs)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RBNValueError(
            f"{path}: expected the {SUFFIX} file of a run that was killed, got {first_line(str(error))}."
        ) from None
    for run in runs.values():
        run.stage, run.stopped = "done", KILLED if run.missing and run.stage != "done" else ""
    return content["command"], list(runs.values())


def take(line: dict[str, Any], runs: Mapping[str, Run]) -> None:
    """Read a line of a journal into its run."""
    run = runs[line["run"]]
    if "takes" in line:
        run.versions, run.file = line["versions"], line["file"]
        run.takes = [run.cases[place].id for place in line["takes"]]
        run.total = len(run.takes)
    elif "result" in line:
        deviations = tuple(Deviation(**each) for each in line["result"].pop("deviations"))
        causes = tuple(line["result"].pop("causes"))
        result = Result(**line["result"], deviations=deviations, causes=causes)
        results = run.results.setdefault(line["subject"], [])
        if results and results[-1].case == result.case:
            del results[-1]
        results.append(result)
        run.seconds += result.seconds
    else:
        run.stage = "done"
        run.seconds, run.failure = line["seconds"], line["failure"]
        for name, content in line["diagnoses"].items():
            causes = tuple(Cause(cause["mistake"], tuple(cause["cases"])) for cause in content["causes"])
            run.diagnoses[name] = Diagnosis(causes, tuple(content["facts"]), content["summary"])
            run.results[name] = Results(run.results[name], run.diagnoses[name])

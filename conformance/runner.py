"""Run the suite on several implementations, each in a process of its own, and report as the results come."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from rbn.backends.frameworks import FRAMEWORKS, versions
from rbn.conformance.cases import Case
from rbn.conformance.checks import FAILED, LATE, Result, Results, check_case, remember, wrong_declarations
from rbn.conformance.comparison import Deviation
from rbn.conformance.diagnosis import Diagnosis, Evidence
from rbn.conformance.expectations import Expectations
from rbn.conformance.loading import SubjectError, load, shortened
from rbn.conformance.readable import readable

TIME_LIMIT = 600.0
"""Seconds for one case. The first of a framework may compile for minutes."""

Record = Callable[["Run", str, Result | None], None]
"""Takes a run, the name of a subject and a result of it, or none at the end of the run."""

DEATHS = 10
"""After so many cases that ended its process a run is given up, and the spoilt states of a subject are."""


@dataclass
class Run:
    """One process and what came of it so far.

    Attributes:
        name: "numpy", "torch", ... or what a subject was asked for by.
        references: Its subjects as "package.module:Name".
        cases: What each of its subjects runs, as far as it has the layer.
        stage: What it does now: "waiting", "importing", "checking", "looking for the cause" or "done".
        started: `time.monotonic()` when its process started.
        seconds: How long it took, once done.
        results: For every subject its results, in order.
        diagnoses: What is wrong with every subject that has failures.
        versions: The versions of what it ran on.
        failure: Why the run ended before its last case, else "".
        total: How many cases its subjects have.
        takes: The ids of these cases.
        stopped: What ended the run from outside before it was done, such as "interrupted", else "".
        file: The file of its first subject's module, a path in the working folder; "" where it is elsewhere.
    """

    name: str
    references: Sequence[str]
    cases: Sequence[Case]
    stage: str = "waiting"
    started: float = 0.0
    seconds: float = 0.0
    results: dict[str, list[Result]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    failure: str = ""
    total: int = 0
    takes: list[str] = field(default_factory=list)
    stopped: str = ""
    file: str = ""
    diagnoses: dict[str, Diagnosis] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.total = self.total or len(self.references) * len(self.cases)
        self.takes = self.takes or len(self.references) * [case.id for case in self.cases]

    @property
    def finished(self) -> int:
        """How many of them are finished."""
        return sum(len(results) for results in self.results.values())

    @property
    def missing(self) -> list[str]:
        """The ids of the cases that have no result."""
        had = Counter(result.case for results in self.results.values() for result in results)
        return list((Counter(self.takes) - had).elements())

    @property
    def early_end(self) -> str:
        """Why the run ended before its last case, and from outside with how much is missing; else ""."""
        if self.failure or not self.stopped:
            return self.failure
        return f"{self.stopped}: {len(self.missing)} of {self.total} cases have no result"

    @property
    def failed(self) -> bool:
        """Whether any case failed."""
        return any(result.status == FAILED for results in self.results.values() for result in results)

    @property
    def verdict(self) -> str:
        """Whether it "conforms" or "differs".

        Where nothing failed, it is what stopped the run, or "no result in time" if some is late.
        """
        if self.passed:
            return "conforms"
        return "differs" if self.failed or self.failure else self.stopped or "no result in time"

    @property
    def passed(self) -> bool:
        """Whether every case was run and none failed, or was late."""
        results = [result for subject in self.results.values() for result in subject]
        wrong = any(result.status in (FAILED, LATE) for result in results)
        return self.stage == "done" and not self.early_end and not wrong


def ignore(run: Run, name: str, result: Result | None) -> None:
    """Keep no results."""


def run(
    targets: Mapping[str, Sequence[str]],
    cases: Sequence[Case],
    progress: Callable[[Sequence[Run]], None],
    time_limit: float = TIME_LIMIT,
    *,
    first: Collection[str] = (),
    expectations: Mapping[str, Expectations] | None = None,
    stop: Callable[[Sequence[Run]], str] = lambda runs: "",
    record: Record = ignore,
) -> list[Run]:
    """Check subjects, as many processes at a time as there are processors.

    Jittor and PyTorch in one process have crashed; in processes of their own a crash, and a case that never
    ends, is one failed case, and the next one runs in a new process.

    Args:
        targets: The subjects that share a process, as "package.module:Name", under the name of their run.
        cases: What to run.
        progress: Called whenever something came in, and a few times a second, with the runs so far.
        time_limit: Seconds for one case.
        first: The names of the runs whose subjects are loaded before any case runs.
        expectations: What is known to differ, by the name of a run.
        stop: Says why to stop, such as "interrupted", and else "". What runs then is given up.
        record: Called with every result as it comes in, and at the end of a run with none.

    Returns:
        One run for each target, in order.

    Raises:
        SubjectError: A subject of `first` cannot be loaded. Nothing has run then.
    """
    runs = [Run(name, references, cases) for name, references in targets.items()]
    waiting = list(runs)
    active: list[_Process] = []
    with tempfile.TemporaryDirectory() as folder:

        def process(run: Run, hold: bool = False) -> _Process:
            known = (expectations or {}).get(run.name, Expectations())
            return _Process(run, Path(folder), time_limit, known, record, hold)

        held = {run.name: process(run, hold=True) for run in runs if run.name in first}
        try:
            while any(each.run.stage == "importing" for each in held.values()) and not stop(runs):
                wait([each.receiver for each in held.values()], timeout=0.2)
                for name, each in held.items():
                    failed = each.run.stage == "importing" and (not each.attend() or each.run.failure)
                    if failed and not stop(runs):
                        raise SubjectError(why_not(name, each.run.failure))
                progress(runs)
            while (waiting or active) and not stop(runs):
                while waiting and len(active) < (os.cpu_count() or 1):
                    # The last first: Jittor takes longest, and would else run alone in the end.
                    following = waiting.pop()
                    loaded = held.pop(following.name) if following.name in held else process(following)
                    loaded.go()
                    active.append(loaded)
                wait([each.receiver for each in active], timeout=0.2)
                active = [each for each in active if each.attend()]
                progress(runs)
            for left in (run for run in runs if run.stage != "done"):
                left.stage, left.stopped = "done", stop(runs) if left.missing else ""
                left.seconds = time.monotonic() - left.started if left.started else 0.0
        finally:
            for each in (*held.values(), *active):
                each.kill()
    return runs


def why_not(name: str, failure: str) -> str:
    """One line that says why a subject cannot be loaded."""
    line = failure.partition("\n")[0]
    return line if line.startswith(name) else f"{name}: {line}"


class _Process:
    """The process of a run, replaced by a new one when a case ends it.

    Args:
        run: The run, to which the results go.
        folder: Where what the process prints is kept.
        time_limit: Seconds for one case.
        known: What is known to differ.
        record: Takes every result, and the end.
        hold: Whether it waits for `go` once its subjects are loaded.
    """

    def __init__(
        self, run: Run, folder: Path, time_limit: float, known: Expectations, record: Record, hold: bool
    ) -> None:
        self.run = run
        self.log = folder / run.name.replace("/", "_")
        self.time_limit = time_limit
        self.known = known
        self.record = record
        self.hold = hold
        self.todo = [(reference, list(run.cases)) for reference in run.references]
        self.deaths = 0
        self.spoilt_deaths = 0
        run.started = time.monotonic()
        self.start()

    def start(self) -> None:
        """Start a process on what is left to do."""
        context = multiprocessing.get_context("spawn")
        self.receiver, sender = context.Pipe()
        arguments = (self.todo, sender, self.log, self.run, self.known, self.hold)
        self.process: BaseProcess = context.Process(target=_work, args=arguments)
        self.process.start()
        sender.close()
        self.run.stage = "importing"
        self.current: tuple[str, Case] | None = None
        self.spoilt: Case | None = None
        self.deadline = float("inf")

    def go(self) -> None:
        """Let it check what it has loaded."""
        if self.hold:
            self.hold = False
            self.run.started = time.monotonic()
            self.receiver.send("go")

    def attend(self) -> bool:
        """Take what came in; whether there is more to come."""
        if time.monotonic() > self.deadline:
            self.kill()
            assert self.current is not None
            status = LATE if self.current[1].shares else FAILED
            return self.ended(f"gave no result within {self.time_limit:.0f} s and was stopped", status)
        while self.receiver.poll():
            try:
                kind, content = self.receiver.recv()
            except (EOFError, ConnectionResetError):
                self.process.join()
                code = self.process.exitcode
                cause = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
                return self.ended(f"ended the process with {cause}")
            getattr(self, f"on_{kind}")(content)
        return True

    def on_ready(self, found: tuple[dict[str, str], str]) -> None:
        """The imports are done."""
        self.run.stage = "checking"
        self.run.versions, self.run.file = found

    def on_subject(self, taken: Sequence[Case]) -> None:
        """Another subject begins, which takes only these cases."""
        cases = self.todo[0][1]
        self.leave_out({case.id for case in cases} - {case.id for case in taken})
        cases[:] = taken

    def leave_out(self, ids: Collection[str]) -> None:
        """Count on no result of these cases."""
        self.run.takes = [name for name in self.run.takes if name not in ids]
        self.run.total = len(self.run.takes)

    def on_case(self, current: tuple[str, Case]) -> None:
        """A case begins, and is no longer to do."""
        if self.current is not None and self.current[1].spoilt:
            self.spoilt = self.current[1]
        self.current, self.deadline = current, time.monotonic() + self.time_limit
        cases = self.todo[0][1]
        del cases[: cases.index(current[1]) + 1]

    def on_again(self, _: None) -> None:
        """A case that was late is tried once more."""
        self.deadline = time.monotonic() + self.time_limit

    def on_result(self, content: tuple[str, Result]) -> None:
        """A case is finished, or a declaration is wrong."""
        name, result = content
        self.keep(name, result)
        self.deadline = float("inf")

    def keep(self, name: str, result: Result) -> None:
        """Put a result to the others, in the place of an earlier one of its case."""
        results = self.run.results.setdefault(name, [])
        if results and results[-1].case == result.case:  # the case ended its process after its result
            del results[-1]
        results.append(result)
        self.record(self.run, name, result)

    def on_looking(self, _: None) -> None:
        """A subject's cases are done, and what is wrong with it is looked for."""
        self.run.stage = "looking for the cause"

    def on_diagnosis(self, content: tuple[str, Diagnosis]) -> None:
        """What is wrong with a subject."""
        name, diagnosis = content
        self.run.stage = "checking"
        if diagnosis.lines:
            self.run.diagnoses[name] = diagnosis
            self.run.results[name] = Results(self.run.results[name], diagnosis)

    def on_finished(self, _: None) -> None:
        """A subject has no more cases."""
        del self.todo[0]

    def on_failure(self, text: str) -> None:
        """The process cannot go on."""
        self.run.failure = text

    def ended(self, how: str, status: str = FAILED) -> bool:
        """The process has ended: go on in another one if a case ended it; whether it was so."""
        if self.todo and self.current is not None and not self.run.failure:
            name, case = self.current
            if self.spoilt is not None:  # memory that a case has ruined may end the process in the next one
                how += f", perhaps for what {self.spoilt.id} did before"
            message = f"{how}\n{self.tail()}".rstrip()
            worst = Deviation("process", float("inf"), 0.0, how)
            result = Result(case.id, case.group, status, (worst,), message)
            self.keep(name, result)
            if self.goes_on(name, case):
                self.start()
                return True
            self.run.failure = f"given up after {self.deaths} cases that ended its process"
        elif self.todo and not self.run.failure:
            self.run.failure = f"{how} before its first case\n{self.tail()}".rstrip()
        elif self.process.exitcode and not self.run.failure:
            self.run.failure = f"{how} after its last case\n{self.tail()}".rstrip()
        self.run.stage, self.run.seconds = "done", time.monotonic() - self.run.started
        self.record(self.run, "", None)
        return False

    def goes_on(self, name: str, case: Case) -> bool:
        """Whether a run goes on after a case that ended its process; without its spoilt states after many."""
        if not case.spoilt:
            self.deaths += 1
            return self.deaths < DEATHS
        self.spoilt_deaths += 1
        cases = self.todo[0][1]
        left = [other for other in cases if other.spoilt]
        if self.spoilt_deaths >= DEATHS and left:
            self.spoilt_deaths = 0
            cases[:] = [other for other in cases if not other.spoilt]
            message = f"not run, and {len(left) - 1} more, after {DEATHS} that ended the process"
            self.keep(name, Result(left[0].id, left[0].group, FAILED, (), message))
            self.leave_out({other.id for other in left[1:]})
        return True

    def tail(self) -> str:
        """The last lines that the process wrote."""
        return readable("\n".join(self.log.read_text(errors="replace").splitlines()[-5:]))

    def kill(self) -> None:
        """End the process and all that it started."""
        if self.process.pid is not None and self.process.is_alive():
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has not made its group yet
                self.process.kill()
        self.process.join()


def _work(
    todo: Sequence[tuple[str, Sequence[Case]]],
    sender: Connection,
    log: Path,
    run: Run,
    known: Expectations,
    hold: bool,
) -> None:
    """The body of a process. What the subjects print goes to the log, not into the report."""
    os.setsid()  # a group of its own, so that what it starts ends with it
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)

    def send(kind: str, content: Any = None) -> None:
        sender.send((kind, content))

    try:
        subjects = [(load(reference), cases) for reference, cases in todo]
        send("ready", (_versions(), _file(todo[0][0]) if todo else ""))
        if hold:
            sender.recv()
        for subject, cases in subjects:
            known.declare(subject)
            evidence = Evidence()
            remember(evidence, subject, run.cases, run.results.get(subject.name, ()))
            mine = [case for case in cases if subject.takes(case)]
            send("subject", mine)
            for case in mine:
                send("case", (subject.name, case))
                result = check_case(subject, case, evidence=evidence)
                if result.status == LATE:  # what was compiled by then need not be compiled again
                    send("again")
                    result = check_case(subject, case, evidence=evidence)
                send("result", (subject.name, result))
            gc.collect()  # what a spoilt state has ruined ends the process here, and not where nobody looks
            for result in wrong_declarations(subject, cases):
                send("result", (subject.name, result))
            send("looking")
            send("diagnosis", (subject.name, evidence.diagnose()))
            send("finished")
    except SubjectError as error:
        lines = traceback.format_exception(error.__cause__, limit=-6) if error.__cause__ else ()
        send("failure", readable("\n".join((str(error), "".join(lines))).rstrip()))
    except Exception:  # whatever a framework raises becomes its row
        send("failure", readable(traceback.format_exc(limit=-6)))


def _file(reference: str) -> str:
    """The file of a subject's module, if it lies in the working folder."""
    path = getattr(sys.modules[reference.partition(":")[0]], "__file__", None)
    near = shortened(path) if path else ""
    return "" if os.path.isabs(near) else near


def _versions() -> dict[str, str]:
    """The versions of what the subjects imported."""
    found = {"numpy": np.__version__}
    for framework in FRAMEWORKS:
        if framework in sys.modules:
            found = versions(framework) | found
    return found

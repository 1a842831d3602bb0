"""Run the suite on several implementations, each in a process of its own, and report as the results come."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from rbn.backends.frameworks import FRAMEWORKS, versions
from rbn.conformance.cases import Case
from rbn.conformance.checks import FAILED, LATE, Result, check_case, wrong_declarations
from rbn.conformance.comparison import Deviation
from rbn.conformance.diagnosis import Diagnosis
from rbn.conformance.subject import Subject

SUBJECTS: dict[str, tuple[str, ...]] = {
    "numpy": ("rbn.conformance.subjects.numpy:Numpy",),
    "torch": ("rbn.conformance.subjects.torch:Torch",),
    "torch.plain": ("rbn.conformance.subjects.torch:plain",),
    "flax": ("rbn.conformance.subjects.flax:Flax",),
    "flax.nnx": ("rbn.conformance.subjects.flax:FlaxNNX",),
    # Of both kinds of Flax's layers: they call the same function for it.
    "flax.plain": ("rbn.conformance.subjects.flax:plain",),
    "mindspore": ("rbn.conformance.subjects.mindspore:MindSpore",),
    "mindspore.plain": ("rbn.conformance.subjects.mindspore:plain",),
    "jittor": ("rbn.conformance.subjects.jittor:Jittor",),
    "jittor.plain": ("rbn.conformance.subjects.jittor:plain",),
}
"""The project's own subjects."""

ENTRY_POINTS = "rbn.conformance"
"""The group under which an installed package can name subjects of its own."""

TIME_LIMIT = 600.0
"""Seconds for one case. The first of a framework may compile for minutes."""

DEATHS = 10
"""After so many cases that ended its process a run is given up, and the spoilt states of a subject are."""


@dataclass
class Run:
    """One process and what came of it so far.

    Attributes:
        name: "numpy", "torch", ... or what a subject was asked for by.
        references: Its subjects as "package.module:Name".
        cases: What each of its subjects runs, as far as it has the layer.
        stage: What it does now: "waiting", "importing", "checking" or "done".
        started: `time.monotonic()` when its process started.
        seconds: How long it took, once done.
        results: For every subject its results, in order.
        versions: The versions of what it ran on.
        failure: Why the run ended before its last case, else "".
        total: How many cases its subjects have.
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

    def __post_init__(self) -> None:
        self.total = self.total or len(self.references) * len(self.cases)

    @property
    def finished(self) -> int:
        """How many of them are finished."""
        return sum(len(results) for results in self.results.values())

    @property
    def verdict(self) -> str:
        """Whether it "conforms" or "differs"; "no result in time" where nothing failed and some is late."""
        if self.passed:
            return "conforms"
        failed = any(result.status == FAILED for results in self.results.values() for result in results)
        return "differs" if failed or self.failure else "no result in time"

    @property
    def passed(self) -> bool:
        """Whether every case was run and none failed, or was late."""
        results = [result for subject in self.results.values() for result in subject]
        wrong = any(result.status in (FAILED, LATE) for result in results)
        return self.stage == "done" and not self.failure and not wrong


def run(
    targets: Mapping[str, Sequence[str]],
    cases: Sequence[Case],
    progress: Callable[[Sequence[Run]], None],
    time_limit: float = TIME_LIMIT,
) -> list[Run]:
    """Check subjects, as many processes at a time as there are processors.

    Jittor and PyTorch in one process have crashed; in processes of their own a crash, and a case that never
    ends, is one failed case, and the next one runs in a new process.

    Args:
        targets: The subjects that share a process, as "package.module:Name", under the name of their run.
        cases: What to run.
        progress: Called whenever something came in, and a few times a second, with the runs so far.
        time_limit: Seconds for one case.

    Returns:
        One run for each target, in order.
    """
    runs = [Run(name, references, cases) for name, references in targets.items()]
    waiting = list(runs)
    active: list[_Process] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or active:
                while waiting and len(active) < (os.cpu_count() or 1):
                    # The last first: Jittor takes longest, and would else run alone in the end.
                    active.append(_Process(waiting.pop(), Path(folder), time_limit))
                wait([process.receiver for process in active], timeout=0.2)
                active = [process for process in active if process.attend()]
                progress(runs)
        finally:
            for process in active:
                process.kill()
    return runs


class _Process:
    """The process of a run, replaced by a new one when a case ends it.

    Args:
        run: The run, to which the results go.
        folder: Where what the process prints is kept.
        time_limit: Seconds for one case.
    """

    def __init__(self, run: Run, folder: Path, time_limit: float) -> None:
        self.run = run
        self.log = folder / run.name.replace("/", "_")
        self.time_limit = time_limit
        self.todo = [(reference, list(run.cases)) for reference in run.references]
        self.deaths = 0
        self.spoilt_deaths = 0
        run.started = time.monotonic()
        self.start()

    def start(self) -> None:
        """Start a process on what is left to do."""
        context = multiprocessing.get_context("spawn")
        self.receiver, sender = context.Pipe(duplex=False)
        self.process: BaseProcess = context.Process(target=_work, args=(self.todo, sender, self.log))
        self.process.start()
        sender.close()
        self.run.stage = "importing"
        self.current: tuple[str, Case] | None = None
        self.spoilt: Case | None = None
        self.deadline = float("inf")

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
            except EOFError:
                self.process.join()
                code = self.process.exitcode
                cause = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
                return self.ended(f"ended the process with {cause}")
            getattr(self, f"on_{kind}")(content)
        return True

    def on_ready(self, found: dict[str, str]) -> None:
        """The imports are done."""
        self.run.stage, self.run.versions = "checking", found

    def on_subject(self, taken: Sequence[Case]) -> None:
        """Another subject begins, which takes only these cases."""
        cases = self.todo[0][1]
        self.run.total -= len(cases) - len(taken)
        cases[:] = taken

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
        self.run.results.setdefault(name, []).append(result)
        self.deadline = float("inf")

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
            results = self.run.results.setdefault(name, [])
            if results and results[-1].case == case.id:  # it ended the process after its result
                del results[-1]
            results.append(result)
            if self.goes_on(name, case):
                self.start()
                return True
            self.run.failure = f"given up after {self.deaths} cases that ended its process"
        elif self.todo and not self.run.failure:
            self.run.failure = f"{how} before its first case\n{self.tail()}".rstrip()
        elif self.process.exitcode and not self.run.failure:
            self.run.failure = f"{how} after its last case\n{self.tail()}".rstrip()
        self.run.stage, self.run.seconds = "done", time.monotonic() - self.run.started
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
            self.run.results[name].append(Result(left[0].id, left[0].group, FAILED, (), message))
            self.run.total -= len(left) - 1
        return True

    def tail(self) -> str:
        """The last lines that the process wrote."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-5:])

    def kill(self) -> None:
        """End the process and all that it started."""
        if self.process.pid is not None and self.process.is_alive():
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has not made its group yet
                self.process.kill()
        self.process.join()


def _work(todo: Sequence[tuple[str, Sequence[Case]]], sender: Connection, log: Path) -> None:
    """The body of a process. What the subjects print goes to the log, not into the report."""
    os.setsid()  # a group of its own, so that what it starts ends with it
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)

    def send(kind: str, content: Any = None) -> None:
        sender.send((kind, content))

    try:
        subjects = [(load(reference), cases) for reference, cases in todo]
        send("ready", _versions())
        for subject, cases in subjects:
            diagnosis = Diagnosis()
            mine = [case for case in cases if subject.takes(case)]
            send("subject", mine)
            for case in mine:
                send("case", (subject.name, case))
                result = check_case(subject, case, diagnosis=diagnosis)
                if result.status == LATE:  # what was compiled by then need not be compiled again
                    send("again")
                    result = check_case(subject, case, diagnosis=diagnosis)
                send("result", (subject.name, result))
            gc.collect()  # what a spoilt state has ruined ends the process here, and not where nobody looks
            for result in wrong_declarations(subject, cases):
                send("result", (subject.name, result))
            send("finished")
    except Exception:  # whatever a framework raises becomes its row
        send("failure", traceback.format_exc(limit=-6))


def _versions() -> dict[str, str]:
    """The versions of what the subjects imported."""
    found = {"numpy": np.__version__}
    for framework in FRAMEWORKS:
        if framework in sys.modules:
            found = versions(framework) | found
    return found


def load(reference: str) -> Subject:
    """The subject that "package.module:Name" names, an object or a class to call.

    Raises:
        TypeError: It is no subject.
    """
    module, _, name = reference.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the command finds what `python -m` would
    found = getattr(importlib.import_module(module), name)
    subject = found if isinstance(found, Subject) else found()
    if not isinstance(subject, Subject):
        raise TypeError(
            f"expected {reference} to be a rbn.conformance.subject.Subject, got {subject!r}. "
            "Name a subject, or a class or function that makes one."
        )
    return subject


def registered() -> dict[str, tuple[str, ...]]:
    """The subjects that installed packages name as entry points."""
    return {point.name: (point.value,) for point in entry_points(group=ENTRY_POINTS)}

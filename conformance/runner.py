"""Run the suite on several frameworks, each in a process of its own, and report as the results come."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np

from rbn.backends.frameworks import FRAMEWORKS, versions
from rbn.conformance.cases import Case, all_cases
from rbn.conformance.check import FAILED, Result, check
from rbn.conformance.subject import Subject

SUBJECTS: dict[str, tuple[str, ...]] = {
    "numpy": ("rbn.conformance.subjects.numpy:Numpy",),
    "torch": ("rbn.conformance.subjects.torch:Torch",),
    "flax": ("rbn.conformance.subjects.flax:Flax", "rbn.conformance.subjects.flax:FlaxNNX"),
    "mindspore": ("rbn.conformance.subjects.mindspore:MindSpore",),
    "jittor": ("rbn.conformance.subjects.jittor:Jittor",),
}
"""The subjects of every framework; those of one framework share a process."""


@dataclass
class Run:
    """One framework's process and what came of it so far.

    Attributes:
        framework: "numpy", "torch", ...
        cases: What each of its subjects runs.
        stage: What it does now: "waiting", "importing", "checking" or "done".
        started: `time.monotonic()` when its process started.
        seconds: How long it took, once done.
        results: For every subject its results, in order.
        versions: The versions of what it ran on.
        failure: Why the process ended before its last case, else "".
    """

    framework: str
    cases: Sequence[Case]
    stage: str = "waiting"
    started: float = 0.0
    seconds: float = 0.0
    results: dict[str, list[Result]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    failure: str = ""

    @property
    def total(self) -> int:
        """How many cases its subjects have."""
        return len(SUBJECTS[self.framework]) * len(self.cases)

    @property
    def finished(self) -> int:
        """How many of them are finished."""
        return sum(len(results) for results in self.results.values())

    @property
    def passed(self) -> bool:
        """Whether every case was run and none failed."""
        results = [result for subject in self.results.values() for result in subject]
        return not self.failure and self.stage == "done" and all(r.status != FAILED for r in results)


def run(
    frameworks: Sequence[str],
    progress: Callable[[Sequence[Run]], None],
    cases: Sequence[Case] | None = None,
) -> list[Run]:
    """Check every framework's subjects, as many processes at a time as there are processors.

    Jittor and PyTorch in one process have crashed; in processes of their own a crash is one framework's row.

    Args:
        frameworks: Keys of `SUBJECTS`.
        progress: Called whenever something came in, and a few times a second, with the runs so far.
        cases: What to run; all cases by default.

    Returns:
        One run for each framework, in the order asked for.
    """
    context = multiprocessing.get_context("spawn")
    cases = all_cases() if cases is None else cases
    runs = [Run(name, cases) for name in frameworks]
    waiting = list(runs)
    active: dict[Connection, tuple[Run, multiprocessing.process.BaseProcess, Path]] = {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or active:
            while waiting and len(active) < (os.cpu_count() or 1):
                current = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                log = Path(folder) / current.framework
                process = context.Process(
                    target=_work, args=(current.framework, SUBJECTS[current.framework], cases, sender, log)
                )
                process.start()
                sender.close()
                current.stage, current.started = "importing", time.monotonic()
                active[receiver] = (current, process, log)
            for ready in wait(list(active), timeout=0.2):
                assert isinstance(ready, Connection)
                current, started, log = active[ready]
                try:
                    _receive(current, ready.recv())
                except EOFError:
                    started.join()
                    if current.stage != "done" and not current.failure:
                        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                        current.failure = f"the process ended with exit code {started.exitcode}\n{tail}"
                    current.stage, current.seconds = "done", time.monotonic() - current.started
                    del active[ready]
            progress(runs)
    return runs


def _receive(current: Run, message: tuple[str, object]) -> None:
    kind, content = message
    if kind == "ready":
        assert isinstance(content, dict)
        current.stage, current.versions = "checking", content
    elif kind == "failure":
        current.failure = str(content)
    elif kind == "done":
        current.stage = "done"
    else:
        assert isinstance(content, Result)
        current.results.setdefault(kind, []).append(content)


def _work(
    framework: str, references: Sequence[str], cases: Sequence[Case], sender: Connection, log: Path
) -> None:
    """The body of a framework's process. What the framework prints goes to the log, not into the report."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        subjects = [subject(reference) for reference in references]
        found = versions(framework) if framework in FRAMEWORKS else {}
        sender.send(("ready", found | {"numpy": np.__version__}))
        for each in subjects:
            for result in check(each, cases):
                sender.send((each.name, result))
        sender.send(("done", None))
    except Exception:  # whatever a framework raises becomes its row
        sender.send(("failure", traceback.format_exc(limit=-6)))


def subject(reference: str) -> Subject:
    """The subject that "package.module:Name" names."""
    module, name = reference.split(":")
    found = getattr(importlib.import_module(module), name)()
    assert isinstance(found, Subject)
    return found

"""Run the workers one after another, each in a process of its own, and report as the measurements come."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rbn.backends.frameworks import versions
from rbn.benchmarks.cases import Options
from rbn.benchmarks.timing import keep_freed_memory
from rbn.benchmarks.worker import Measurement, Worker, count, work

WORKERS = {
    "torch": "rbn.benchmarks.in_torch:Torch",
    "flax": "rbn.benchmarks.in_flax:Flax",
    "mindspore": "rbn.benchmarks.in_mindspore:MindSpore",
    "jittor": "rbn.benchmarks.in_jittor:Jittor",
}
"""The frameworks' workers as "package.module:Name"."""


@dataclass
class Run:
    """One framework and what came of it so far.

    Attributes:
        name: "torch", "flax", "mindspore" or "jittor".
        now: What is measured at the moment, in words; "" before the process starts and when it has ended.
        total: How many measurements there will be.
        measurements: Those that there are, in order.
        versions: Of the framework.
        threads: How many it computes with.
        seconds: How long it took.
        failure: Why it ended before its last measurement, else "".
    """

    name: str
    now: str = ""
    total: int = 1
    measurements: list[Measurement] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    threads: int = 0
    seconds: float = 0.0
    failure: str = ""


def run(names: Sequence[str], options: Options, progress: Callable[[Sequence[Run]], None]) -> list[Run]:
    """Measure frameworks, one at a time: each gets the whole machine.

    Args:
        names: Keys of `WORKERS`.
        options: What is measured.
        progress: Called whenever something came in, and a few times a second, with the runs so far.

    Returns:
        One run for each name, in order.
    """
    runs = [Run(name, versions=versions(name)) for name in names]
    with tempfile.TemporaryDirectory() as folder:
        for current in runs:
            _attend(current, options, Path(folder, current.name), lambda: progress(runs))
    return runs


def _attend(current: Run, options: Options, log: Path, progress: Callable[[], None]) -> None:
    """Start a framework's process and take what it sends until it ends."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(WORKERS[current.name], options, sender, log))
    process.start()
    sender.close()
    started, current.now = time.monotonic(), "importing"
    try:
        while True:
            progress()
            if not receiver.poll(0.2):
                continue
            try:
                kind, content = receiver.recv()
            except EOFError:
                break
            if kind == "ready":
                current.threads, current.total = content
            elif kind == "now":
                current.now = content
            elif kind == "measured":
                current.measurements.append(content)
            else:
                current.failure = content
        process.join()
    finally:
        if process.is_alive() and process.pid is not None:  # interrupted
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has not made its group yet
                process.kill()
    if process.exitcode and not current.failure:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        current.failure = f"its process ended with exit code {process.exitcode}\n{tail}".rstrip()
    current.now, current.seconds = "", time.monotonic() - started
    progress()


def _measure(reference: str, options: Options, sender: Connection, log: Path) -> None:
    """The body of a process. What the framework prints goes to the log, not into the report."""
    os.setsid()  # a group of its own, so that what it starts ends with it
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)

    def send(kind: str, content: Any) -> None:
        sender.send((kind, content))

    keep_freed_memory()
    try:
        module, _, name = reference.partition(":")
        worker: Worker = getattr(importlib.import_module(module), name)(options)
        send("ready", (worker.threads(), count(worker)))
        for measurement in work(worker, lambda text: send("now", text)):
            send("measured", measurement)
    except Exception:  # whatever a framework raises becomes its row
        send("failure", traceback.format_exc(limit=-3))

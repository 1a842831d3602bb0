"""One layer on several devices: each in a process of its own with its share of the batch."""

from __future__ import annotations

import atexit
import ctypes
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from rbn.conformance.subject import Array, NoResultInTimeError, Outcome, Subject
from rbn_core.config import Config
from rbn_core.matching import State

Launcher = Callable[[list[str], int, Path], Sequence["subprocess.Popen[bytes]"]]
"""Starts a Python script with its arguments in so many processes, whose logs go to the folder."""

TIME_LIMIT = 400.0
"""Seconds for the devices to start, and for each answer; less than a case has, which could not say why."""

PATIENCE = 10.0
"""Seconds for a process to end."""


class Devices(Subject):
    """A layer on several devices, seen from outside as one layer on the whole batch.

    Outputs are put together again, the parameters' gradients are summed, and the state must be the same on
    every device.

    Args:
        name: What the reports call it.
        processes: The devices.
        shares: How many images each device has.
    """

    def __init__(self, name: str, processes: Processes, shares: tuple[int, ...]) -> None:
        self.name = name
        self.processes = processes
        self.stops = np.cumsum(shares)[:-1]

    def build(self, config: Config, state: State, dtype: str, layout: str = "channels_first") -> None:
        """Make the layer on every device."""
        self.processes.call([("build", (config, state, dtype, layout))] * self.processes.world)

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        """One step on every device."""
        parts = zip(np.split(x, self.stops), np.split(cotangent, self.stops), strict=True)
        outcomes: list[Outcome] = self.processes.call([("run", (x, training, dy)) for x, dy in parts])
        return Outcome(
            y=np.concatenate([outcome.y for outcome in outcomes]),
            dx=np.concatenate([outcome.dx for outcome in outcomes]),
            gradients={
                name: np.sum([outcome.gradients[name] for outcome in outcomes], axis=0)
                for name in outcomes[0].gradients
            },
            state=the_same([outcome.state for outcome in outcomes]),
            x=np.concatenate([outcome.x for outcome in outcomes]),
        )

    def state(self) -> State:
        """What all devices store."""
        return the_same(self.processes.call([("state", ())] * self.processes.world))


class Processes:
    """The processes of several devices, which build and run the layers they are told to.

    Args:
        factory: "package.module:function", called in each process with the number of devices and a folder
            that they share; returns the process's rank and its subject.
        world: How many devices.
        launch: Starts the processes.
    """

    def __init__(self, factory: str, world: int, launch: Launcher) -> None:
        self.world = world
        self.launched: Sequence[subprocess.Popen[bytes]] = ()
        self.connections: list[Connection] = []
        self.folder = tempfile.TemporaryDirectory()
        folder = Path(self.folder.name)
        atexit.register(self.stop)
        try:
            with Listener(str(folder / "socket"), "AF_UNIX", backlog=world) as listener:
                command = [__file__, factory, str(world), str(folder)]
                self.launched = launch(command, world, folder)
                self.connections = self.accept(listener)
        except BaseException:
            self.stop(patience=0)
            raise

    def accept(self, listener: Listener) -> list[Connection]:
        """The connections of all devices, in the order of their ranks.

        Raises:
            RuntimeError: A device died before it could be asked anything.
            NoResultInTimeError: They did not all start in time.
        """
        connections: dict[int, Connection] = {}
        deadline = time.monotonic() + TIME_LIMIT
        # A process that dies before it calls would be waited for forever: look in between.
        listener._listener._socket.settimeout(0.5)  # type: ignore[attr-defined]
        while len(connections) < self.world:
            if any(process.poll() for process in self.launched):
                raise RuntimeError(f"a device's process ended before its first step:\n{self.log()}")
            if time.monotonic() > deadline:
                raise NoResultInTimeError(
                    f"{len(connections)} of {self.world} devices started in {TIME_LIMIT:.0f} s:\n{self.log()}"
                )
            try:
                connection = listener.accept()
            except TimeoutError:
                continue
            connections[connection.recv()] = connection
        return [connections[rank] for rank in range(self.world)]

    def call(self, messages: Sequence[tuple[str, tuple[Any, ...]]]) -> list[Any]:
        """Send every device its message, and return their answers.

        Raises:
            RuntimeError: A device raised or died. The others may wait for it, so all are stopped.
            NoResultInTimeError: A device hangs, or compiles for longer than it should take.
        """
        for connection, message in zip(self.connections, messages, strict=True):
            connection.send(message)
        answers: dict[int, Any] = {}
        while len(answers) < self.world:
            missing = [rank for rank in range(self.world) if rank not in answers]
            found = wait([self.connections[rank] for rank in missing], TIME_LIMIT)
            if not found:
                late = f"devices {missing} of {self.world} gave no answer in {TIME_LIMIT:.0f} s"
                log = self.log()
                self.stop(patience=0)
                raise NoResultInTimeError(f"{late}:\n{log}")
            for ready in found:
                assert isinstance(ready, Connection)
                rank = self.connections.index(ready)
                try:
                    kind, answers[rank] = ready.recv()
                except EOFError:
                    self.fail(f"device {rank} of {self.world}: its process ended:\n{self.log()}")
                if kind == "raised":
                    self.fail(f"device {rank} of {self.world}: {answers[rank]}")
        return [answers[rank] for rank in range(self.world)]

    def log(self) -> str:
        """The last lines that the processes wrote."""
        lines = [
            line
            for log in sorted(Path(self.folder.name).rglob("*.log"))
            for line in log.read_text(errors="replace").splitlines()[-15:]
        ]
        return "\n".join(lines)

    def fail(self, what: str) -> NoReturn:
        """Stop all processes at once, and raise a RuntimeError."""
        self.stop(patience=0)
        raise RuntimeError(what)

    def stop(self, patience: float = PATIENCE) -> None:
        """Let the processes end on their own, and by force those that have not within `patience` seconds."""
        processes.cache_clear()
        atexit.unregister(self.stop)
        for connection in self.connections:
            connection.close()
        for end, seconds in ((subprocess.Popen.terminate, patience), (subprocess.Popen.kill, PATIENCE)):
            deadline = time.monotonic() + seconds
            for process in self.launched:
                try:
                    process.wait(max(0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    end(process)
        for process in self.launched:
            process.wait()
        self.folder.cleanup()


@cache
def processes(factory: str, world: int, launch: Launcher) -> Processes:
    """The processes of so many devices; they serve every case."""
    return Processes(factory, world, launch)


def start(command: Sequence[str | Path], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Start a command in the folder of its log."""
    with log.open("wb") as file:
        return subprocess.Popen(
            command,
            cwd=log.parent,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,  # mpirun would take the terminal's input
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def the_same(states: Sequence[State]) -> State:
    """The state that all devices store.

    Raises:
        RuntimeError: They differ.
    """
    for rank, state in enumerate(states):
        for name, value in state.items():
            if not np.array_equal(value, states[0][name], equal_nan=True):
                raise RuntimeError(f"{name} is {value} on device {rank}, {states[0][name]} on device 0")
    return states[0]


def end_with_parent() -> None:
    """End this process when the launcher is killed: a device that waits for the others may never notice."""
    if sys.platform == "linux":
        set_signal_of_parents_death = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_signal_of_parents_death, signal.SIGKILL)


def serve(factory: str, world: int, folder: Path) -> None:
    """The body of a device's process: make and run layers until the connection ends."""
    end_with_parent()
    module, function = factory.split(":")
    rank, subject = getattr(importlib.import_module(module), function)(world, folder)
    with Client(str(folder / "socket"), "AF_UNIX") as connection:
        connection.send(rank)
        while True:
            try:
                what, arguments = connection.recv()
            except EOFError:
                return
            try:
                connection.send(("done", getattr(subject, what)(*arguments)))
            except Exception:  # whatever a framework raises becomes the case's result
                connection.send(("raised", traceback.format_exc(limit=-4)))


if __name__ == "__main__":
    try:
        serve(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # an orderly exit from MPI would wait for the other devices

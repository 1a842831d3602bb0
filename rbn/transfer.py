"""How far a port is: what it does, and to how many bytes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape

from rbn.progress import Progress, Row

SHOWN = 0.1
"""Seconds between two pictures of a bar."""

STEADY = 0.5
"""Seconds after which it can be told how fast it goes."""


@dataclass
class Transfer:
    """What is being done.

    Args:
        step: What, in words.
        what: What happens to the bytes of it, as "read".
        done: To how many it has happened.
        total: How many there are.
        first: How many were done when it was `began`.
        began: When that began, in seconds.
    """

    step: str = ""
    what: str = ""
    done: int = 0
    total: int = 0
    first: int = 0
    began: float = 0.0


def row(transfer: Transfer) -> Row:
    """What is to be said of it."""
    name, size = ("GB", 1e9) if transfer.total >= 1e10 else ("MB", 1e6)
    places = 1 if name == "GB" else 0
    amounts = f"{transfer.done / size:.{places}f} of {transfer.total / size:.{places}f} {name}"
    stage = f"{amounts} {transfer.what}" if transfer.what else ""
    return Row(escape(transfer.step), transfer.done, transfer.total or 1, stage, bool(transfer.step))


def seconds_left(transfers: Sequence[Transfer]) -> float | None:
    """How long what is being done to the bytes still takes, once it is known how fast that goes."""
    (transfer,) = transfers
    elapsed, done = time.monotonic() - transfer.began, transfer.done - transfer.first
    if done <= 0 or elapsed < STEADY or transfer.done == transfer.total:
        return None
    return (transfer.total - transfer.done) * elapsed / done


class Steps:
    """Shows a port: a bar on a terminal, and lines after a second, two, four and so on elsewhere.

    Args:
        console: Where to.
        count: How many steps there will be.
    """

    def __init__(self, console: Console, count: int) -> None:
        self.count, self.number = count, 0
        self.progress = Progress(console, row, left=seconds_left, first=1.0)
        self.transfer = Transfer()
        self.shown = 0.0

    def step(self, step: str) -> None:
        """A step begins: `progress` of `rbn.porting.port` and `rbn.verification.verify`."""
        self.number += 1
        self.transfer = Transfer(f"step {self.number} of {self.count}: {step}")
        self.show()

    def bytes(self, what: str, done: int, total: int) -> None:
        """Something has happened to bytes: the `Tell` of `rbn_core.counting`."""
        now, transfer = time.monotonic(), self.transfer
        if what != transfer.what or done < transfer.done:
            transfer.first, transfer.began = done, now
        transfer.what, transfer.done, transfer.total = what, done, total
        if now - self.shown >= SHOWN:
            self.show()

    def show(self) -> None:
        """Show it as it stands."""
        self.shown = time.monotonic()
        self.progress([self.transfer])

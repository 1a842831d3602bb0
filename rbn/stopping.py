"""Ctrl-C and a request to end wait for what may not be cut in two."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stopping() -> Iterator[list[int]]:
    """Note SIGINT and SIGTERM instead of obeying them; what comes after the first one is obeyed at once.

    Yields:
        The numbers of the signals that came: empty as long as nobody asked for an end.

    Example:
        >>> with stopping() as signals:
        ...     for step in range(3):
        ...         if signals:
        ...             break
        >>> signals
        []
    """
    got: list[int] = []

    def note(number: int, _: object) -> None:
        got.append(number)
        for each, before in handlers.items():
            signal.signal(each, before)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in handlers:
            signal.signal(number, note)
        yield got
    finally:
        for number, before in handlers.items():
            signal.signal(number, before)

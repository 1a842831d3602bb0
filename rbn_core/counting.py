"""How far the reading and writing of files is, in bytes, for whoever wants to know.

Few want to, and the functions that read and write are many: so it is no argument of theirs, but said around
them, by `telling`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, BinaryIO

Tell = Callable[[str, int, int], None]
"""Told what is done to bytes, as "read", to how many, and of how many."""

STEPS = 500
"""How often it is told of a file, at the most, so that it costs nothing."""

PIECE = 1 << 24
"""How many bytes are read or written at a time."""

_tell: ContextVar[Tell | None] = ContextVar("tell", default=None)


@contextmanager
def telling(tell: Tell | None) -> Iterator[None]:
    """Have all that is read and written in the block told, or none of it."""
    token = _tell.set(tell)
    try:
        yield
    finally:
        _tell.reset(token)


@contextmanager
def part_of(whole: int, before: int) -> Iterator[None]:
    """Have what is read in the block told as part of so many bytes, after so many that came before it."""
    tell = _tell.get()
    with telling(tell and (lambda what, done, _: tell(what, before + done, whole))):
        yield


class Meter:
    """Counts the bytes of one thing that is done to a file; at the end of its block they are all done.

    Args:
        what: What is done to them: "read", "checked", "unpacked", "hashed", "written" or "compared".
        total: How many there are, which may become known only in the block.
    """

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total = what, total
        self.done = self.told = 0
        self.tell = _tell.get()

    def __enter__(self) -> Meter:
        """Begin at 0."""
        if self.tell is not None:
            self.tell(self.what, 0, self.total)
        return self

    def __call__(self, count: int) -> None:
        """So many bytes more are done."""
        self.done = min(self.done + count, self.total)
        if self.tell is not None and self.told < self.done and self.done - self.told >= self.total / STEPS:
            self.told = self.done
            self.tell(self.what, self.done, self.total)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End at the total, where nothing has failed: what is not counted is headers."""
        if self.tell is not None and kind is None and self.told != self.total:
            self.tell(self.what, self.total, self.total)


class Counted:
    """A file whose bytes are counted as they are written.

    Args:
        file: The file.
        meter: Counts them.
    """

    def __init__(self, file: BinaryIO, meter: Meter) -> None:
        self.file, self.meter = file, meter

    def write(self, data: Any) -> int:
        """Write some bytes, piece by piece."""
        view = memoryview(data)
        if view.nbytes <= PIECE:
            self.meter(self.file.write(view))
        else:
            view = view.cast("B")
            for start in range(0, len(view), PIECE):
                self.meter(self.file.write(view[start : start + PIECE]))
        return view.nbytes

    def flush(self) -> None:
        """Leave nothing in a buffer."""
        self.file.flush()


@contextmanager
def writing(path: str | os.PathLike[str], total: int) -> Iterator[Counted]:
    """A file that is written anew.

    Args:
        path: Which.
        total: About how many bytes it will have.
    """
    with open(path, "wb") as file, Meter("written", total) as meter:
        yield Counted(file, meter)
        meter.total = file.tell()


def read_whole(path: str | os.PathLike[str]) -> memoryview:
    """All bytes of a file."""
    size = os.path.getsize(path)
    with open(path, "rb") as file, Meter("read", size) as meter:
        content = bytearray(size)
        read_into(file, content, meter)
    return memoryview(content).toreadonly()


def read_into(file: BinaryIO, content: bytearray, meter: Meter) -> None:
    """Fill a buffer with the next bytes of a file.

    Raises:
        ValueError: There are fewer.
    """
    view = memoryview(content)
    for start in range(0, len(view), PIECE):
        piece = view[start : start + PIECE]
        if file.readinto(piece) != len(piece):  # type: ignore[attr-defined]
            raise ValueError("it ends early")
        meter(len(piece))

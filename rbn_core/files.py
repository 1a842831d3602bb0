"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file in one step: killed at any moment, `path` holds the old file or the whole new one.

    Args:
        path: Where the file goes; what is there is replaced.

    Yields:
        The path to write to, in the same folder: when the block ends well it becomes `path`, else it goes.
    """
    path = Path(path)
    umask = os.umask(0)
    os.umask(umask)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~umask)  # as a file has it that is opened for writing
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rbn_core.errors import RBNValueError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file in one step: killed at any moment, `path` holds the old file or the whole new one.

    What a killed process leaves behind is at most a hidden file beside it, called .NAME.RANDOM.SUFFIX, which
    nothing reads.

    Args:
        path: Where the file goes; what is there is replaced, and a link stays one.

    Yields:
        The path to write to, in the same folder: when the block ends well it becomes `path`, else it goes.

    Raises:
        RBNValueError: There is no such folder, or `path` is a folder.
    """
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise RBNValueError(
            f"RBN: expected a folder to write {path.name} into, got {path.parent}, which is none. "
            "Make it first."
        )
    if path.is_dir():
        raise RBNValueError(f"RBN: expected to write a file, got the folder {path}. Give another name.")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{path.suffix}")
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    mode = os.fstat(handle).st_mode & 0o777  # what the umask leaves of it
    os.close(handle)
    try:
        yield temporary
        temporary.chmod(mode)  # some frameworks take the owner's right to write away
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

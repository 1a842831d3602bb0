"""A subject to fill in: a BatchNorm that conforms, in which what makes it RBN is still to be written."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from rbn_core.errors import RBNValueError

FRAMEWORKS_OF_BLANKS = ("numpy", "torch", "flax")
"""What there is a subject to fill in for."""


def write_blank(path: Path, framework: str = "numpy") -> str:
    """Write a subject to fill in.

    Args:
        path: The file, a module of Python; nothing is replaced.
        framework: One of `FRAMEWORKS_OF_BLANKS`.

    Returns:
        What to do now, in words.

    Raises:
        RBNValueError: The framework is unknown, the file is there, its folder is not, or it can be no module.
    """
    if framework not in FRAMEWORKS_OF_BLANKS:
        raise RBNValueError(f"{framework}: expected one of {', '.join(FRAMEWORKS_OF_BLANKS)}.")
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise RBNValueError(
            f"{path}: expected the name of a module, such as my_layer.py, so that it can be imported."
        )
    if path.exists():
        raise RBNValueError(f"{path} is there already. Give another name.")
    if not path.parent.is_dir():
        raise RBNValueError(f"{path.parent}: expected a folder. Make it first.")
    text = (files("rbn.conformance") / "templates" / f"blank_{framework}.py").read_text(encoding="utf-8")
    path.write_text(text.replace("MODULE", path.stem), encoding="utf-8")
    there = "" if path.parent == Path() else f"cd {path.parent} && "
    return (
        f"wrote {path}: a BatchNorm that conforms. "
        "What makes it RBN is still to be written, where it says TO DO.\n"
        f"Run it as it is: {there}rbn conform --subject {path.stem}:subject"
    )

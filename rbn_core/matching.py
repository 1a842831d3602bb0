"""What of a state goes where: names and shapes compared before anything is loaded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rbn_core.errors import RBNValueError

State = dict[str, NDArray[Any]]
"""A layer's or a network's stored arrays under their canonical names."""

Status = Literal[
    "matched",
    "renamed",
    "transposed",
    "no counterpart",
    "missing",
    "unexpected",
    "wrong shape",
    "wrong dtype",
    "replaced",
    "kept",
]

FAULTS: tuple[Status, ...] = ("missing", "unexpected", "wrong shape", "wrong dtype")
"""What keeps a state from being loaded, unless `strict=False`."""

COUNTER = "num_batches_tracked"
"""Only some frameworks' BatchNorm counts batches: a count may come alone, and may lack."""


@dataclass(frozen=True)
class Row:
    """One array or layer: its name, what became of it, what it was before, and more in words."""

    name: str
    status: Status
    source: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Table:
    """Every array or layer, and what became of it; its text is a table."""

    rows: tuple[Row, ...]

    @property
    def faults(self) -> tuple[Row, ...]:
        """The rows that say what is wrong."""
        return tuple(row for row in self.rows if row.status in FAULTS)

    def __str__(self) -> str:
        cells = [(row.status, row.name, row.source, row.detail) for row in self.rows]
        widths = [max((len(cell[i]) for cell in cells), default=0) for i in range(3)]
        counts = Counter(row.status for row in self.rows)
        lines = [
            "  ".join(
                (*(text.ljust(width) for text, width in zip(cell, widths, strict=False)), cell[3])
            ).rstrip()
            for cell in cells
        ]
        return "\n".join([*lines, ", ".join(f"{count} {status}" for status, count in counts.items())])


def match(
    state: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    rename: Mapping[str, str] | None = None,
    transposed: Collection[str] = (),
    strict: bool = True,
    integers: Collection[str] = (),
) -> tuple[State, Table]:
    r"""Find what of a state a target takes.

    Args:
        state: Arrays under canonical names; not changed.
        shapes: What the target stores: every canonical name with its canonical shape.
        rename: Patterns of the state's names, each with the target's name for what it matches: regular
            expressions that match a whole name, and replacements with \1, \2, ... for their groups. The
            first pattern that matches counts; a name that none matches stays.
        transposed: The names whose arrays the target lays out in another order of axes.
        strict: Whether anything missing, unexpected or wrong is an error; else it is left out.
        integers: The names, beside those of counters, whose arrays are integers or truth values.

    Returns:
        The arrays to load, under the target's names, and the table of everything.

    Raises:
        RBNValueError: A pattern is wrong, two arrays get one name, or, when strict, anything does not match;
            everything wrong is listed at once.
    """
    sources = _renamed(state, rename or {})
    arrays = {name: np.asarray(state[source]) for name, source in sources.items()}
    rows, taken = [], {}
    for name, shape in shapes.items():
        source = sources.get(name, "")
        shown = source if source != name else ""
        if name not in arrays:
            rows.append(Row(name, "no counterpart" if _counts(name) else "missing", detail=f"{shape}"))
        elif arrays[name].shape != shape:
            detail = f"{arrays[name].shape} where {shape} is needed"
            rows.append(Row(name, "wrong shape", shown, detail))
        elif arrays[name].dtype.kind not in ("iu" if _counts(name) else "iub" if name in integers else "fV"):
            rows.append(Row(name, "wrong dtype", shown, f"{arrays[name].dtype}"))
        else:
            taken[name] = arrays[name]
            status: Status = "transposed" if name in transposed else "renamed" if shown else "matched"
            rows.append(Row(name, status, shown, f"{shape} {arrays[name].dtype}"))
    for name in [name for name in arrays if name not in shapes]:
        source = sources[name]
        status = "no counterpart" if _counts(name) else "unexpected"
        rows.append(Row(name, status, source if source != name else "", f"{arrays[name].shape}"))
    found = Table(tuple(rows))
    if strict and found.faults:
        raise RBNValueError(_complaint(found.faults, shapes))
    return taken, found


def _counts(name: str) -> bool:
    return name.rpartition(".")[2] == COUNTER


def _renamed(state: Mapping[str, Any], rename: Mapping[str, str]) -> dict[str, str]:
    """Every name that the state's arrays get, with the name they have."""
    try:
        patterns = [(re.compile(pattern), name) for pattern, name in rename.items()]
        sources: dict[str, str] = {}
        for source in state:
            hits = ((pattern.fullmatch(source), name) for pattern, name in patterns)
            name = next((hit.expand(name) for hit, name in hits if hit), source)
            if name in sources:
                raise RBNValueError(
                    f"RBN: expected names that differ, got {name} for both {sources[name]} and "
                    f"{source}. Rename them apart."
                )
            sources[name] = source
    except re.error as error:
        raise RBNValueError(
            f"RBN: expected rename to hold regular expressions, got {error.pattern!r} ({error}). "
            "See Python's re module; a dot in a name is \\."
        ) from error
    return sources


def _complaint(faults: tuple[Row, ...], shapes: Mapping[str, Any]) -> str:
    wrong = {
        "missing": "missing {0.name}",
        "unexpected": "unexpected {0.name}",
        "wrong shape": "{0.name} of shape {0.detail}",
        "wrong dtype": "{0.name} of dtype {0.detail}",
    }
    in_order = sorted(faults, key=lambda row: FAULTS.index(row.status))
    listed = "; ".join(wrong[row.status].format(row) for row in in_order)
    needed = ", ".join(shapes) if len(shapes) <= 12 else f"{len(shapes)} arrays"
    return (
        f"RBN: expected a state of {needed}, got one with {listed}. "
        "Nothing was changed; rename what is called otherwise, or pass strict=False to leave it out."
    )

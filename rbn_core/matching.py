"""What of a state goes where: names and shapes compared before anything is loaded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rbn_core import published, renaming
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
    "left out",
    "frozen",
    "folded",
]

FAULTS: tuple[Status, ...] = ("missing", "unexpected", "wrong shape", "wrong dtype")
"""What keeps a state from being loaded, unless `strict=False`."""

USUAL: tuple[Status, ...] = ("matched", "renamed", "transposed")
"""What is as it should be."""

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
    """Every array or layer, and what became of it, with what else is to be said; its text is a table."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def faults(self) -> tuple[Row, ...]:
        """The rows that say what is wrong."""
        return tuple(row for row in self.rows if row.status in FAULTS)

    @property
    def exceptions(self) -> tuple[Row, ...]:
        """The rows of what did not go over whole, or is stored as something else."""
        return tuple(row for row in self.rows if row.status not in USUAL or "stored as" in row.detail)

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
        counted = ", ".join(f"{count} {status}" for status, count in counts.items())
        return "\n".join([*lines, *([counted] if counted else []), *self.notes])


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
            first pattern that matches counts; a name that none matches stays, and what gets an empty name is
            left out.
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
    for name in [name for name in sources if name not in shapes]:
        other = next((other for other in _others(name) if other in shapes and other not in sources), None)
        if other is not None:
            sources[other] = sources.pop(name)
    for name in [name for name in sources if name not in shapes]:
        other = published.other_path(name)
        if other in shapes and other not in sources:
            sources[other] = sources.pop(name)
    arrays = {name: np.asarray(state[source]) for name, source in sources.items()}
    left_out = state.keys() - sources.values()
    rows = [Row(name, "left out", detail="by rename") for name in state if name in left_out]
    taken = {}
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
        table = renaming.suggested({name: array.shape for name, array in arrays.items()}, shapes)
        raise RBNValueError(_complaint(found.faults, shapes, table))
    return taken, found


OTHERS = {
    "weight": ("gamma",),
    "scale": ("gamma",),
    "bias": ("beta",),
    "gamma": ("weight",),
    "beta": ("bias",),
}
"""What else an array may be called in a file, where no running mean has told that its layer normalizes."""


def _others(name: str) -> list[str]:
    path, dot, last = name.rpartition(".")
    return [f"{path}{dot}{other}" for other in OTHERS.get(last, ())]


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
            if not name:
                continue
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


MOST_LISTED = 12
"""How many faults of a sort are told one by one; of more, some of each kind of array."""


def summed_up(faults: tuple[Row, ...]) -> dict[Status, tuple[tuple[Row, ...], int]]:
    """By status the faults to tell, and how many more there are: a network's are hundreds of a few kinds."""
    summed: dict[Status, tuple[tuple[Row, ...], int]] = {}
    for status in FAULTS:
        rows = [row for row in faults if row.status == status]
        if len(rows) > MOST_LISTED:
            first = {row.name.rpartition(".")[2]: row for row in reversed(rows)}
            shown = [row for row in rows if row in first.values()][:MOST_LISTED]
        else:
            shown = rows
        if rows:
            summed[status] = tuple(shown), len(rows) - len(shown)
    return summed


def _complaint(faults: tuple[Row, ...], shapes: Mapping[str, Any], table: Mapping[str, str]) -> str:
    wrong: dict[Status, str] = {
        "missing": "missing {0.name}",
        "unexpected": "unexpected {0.name}",
        "wrong shape": "{0.name} of shape {0.detail}",
        "wrong dtype": "{0.name} of dtype {0.detail}",
    }
    told = []
    for status, (rows, more) in summed_up(faults).items():
        told += [wrong[status].format(row) for row in rows]
        told += [f"{more} more {status}"] if more else []
    needed = ", ".join(shapes) if len(shapes) <= MOST_LISTED else f"{len(shapes)} arrays"
    way_out = f"nearly all match with rename={dict(table)!r}" if table else "rename what is called otherwise"
    return (
        f"RBN: expected a state of {needed}, got one with {'; '.join(told)}. "
        f"Nothing was changed; {way_out}, or pass strict=False to leave it out."
    )

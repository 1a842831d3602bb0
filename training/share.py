"""Which part of every batch a process of a run gets."""

from __future__ import annotations

from dataclasses import dataclass

from rbn.training.preset import Preset
from rbn_core.errors import RBNValueError


@dataclass(frozen=True)
class Share:
    """Which part of every batch a process gets.

    Args:
        index: The process.
        count: How many there are.
    """

    index: int = 0
    count: int = 1


ALONE = Share()
"""All of every batch."""


def check_parts(preset: Preset, parts: int) -> None:
    """Refuse a batch of which the processes or devices would get parts of several sizes.

    Args:
        preset: The run.
        parts: How many processes or devices there are.

    Raises:
        RBNValueError: It would be so.
    """
    number = parts * preset.accumulate
    if preset.batch_size % number:
        lower = preset.batch_size // number * number
        raise RBNValueError(
            f"train: expected a batch_size that is a multiple of {number}, for {parts} processes or devices "
            f"with accumulate = {preset.accumulate}, got {preset.batch_size}. Give for example "
            f"--batch-size {lower or number}."
        )

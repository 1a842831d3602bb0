"""What a run writes down: a row of CSV now and then, and the same for TensorBoard."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from types import TracebackType

from tensorboardX import SummaryWriter

COLUMNS = (
    "step",
    "epoch",
    "learning_rate",
    "loss",
    "top1",
    "images_per_second",
    "evaluation_loss",
    "evaluation_top1",
    "evaluation_top5",
)
"""Losses and accuracies, in percent, are means: of training since the last row, and of a whole evaluation."""


class Log:
    """The files `log.csv` and those of TensorBoard in a run's folder.

    Args:
        folder: The run's folder.
        step: How many steps the run has made: later rows of an earlier run go, so that there is one curve.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / "log.csv"
        rows = []
        if step and self.path.is_file():
            with self.path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if (row.get("step") or "").isdecimal()]
        kept = [row for row in rows if int(row["step"]) <= step]
        self.file = self.path.open("w", newline="")
        self.writer = csv.DictWriter(self.file, COLUMNS, extrasaction="ignore")
        self.writer.writeheader()
        self.writer.writerows(kept)
        self.file.flush()
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        self.board.close()

    def row(self, step: int, values: dict[str, float]) -> None:
        """Write a row.

        Args:
            step: How many steps the run has made.
            values: What belongs to it, of `COLUMNS`.
        """
        self.writer.writerow({"step": step} | {name: f"{value:.10g}" for name, value in values.items()})
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)


def read_log(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's log; what a row lacks is left out of it."""
    rows = csv.DictReader(io.StringIO((folder / "log.csv").read_text()))
    return [{name: float(value) for name, value in row.items() if value} for row in rows]

"""The measurements as a picture: time per framework, one bar for each form, and what memory allows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rbn.benchmarks.cases import (
    BATCH_NORM,
    COPY_PASSES,
    EQUATIONS,
    EVALUATION,
    PASSES,
    PLAIN,
    RBN,
    TRAINING,
)
from rbn.benchmarks.runner import Run
from rbn.benchmarks.worker import Measurement

STYLES = {
    BATCH_NORM: ("#56B4E9", ""),
    RBN: ("#D55E00", ""),
    PLAIN: ("#E69F00", "//"),
    EQUATIONS: ("#999999", ".."),
}
"""Okabe and Ito's colours, which the colour-blind tell apart, and hatches, which a printer does."""


FLOOR = "copy bandwidth"
"""What the passes that no form can avoid take at the speed of a copy."""


def write_plot(path: Path, runs: Sequence[Run], title: str) -> None:
    """Draw a row for each way a framework works, with training on the left and evaluation on the right.

    Args:
        path: The file to write; its suffix is the format.
        runs: What was measured.
        title: What is written above it all.
    """
    rows = [(run, variant) for run in runs for variant in dict.fromkeys(m.variant for m in run.measurements)]
    figure = Figure(figsize=(12, 1 + 2.2 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 2, squeeze=False, sharey="col")
    for line, (run, variant) in zip(grid, rows, strict=True):
        for axes, phase in zip(line, (TRAINING, EVALUATION), strict=True):
            _draw(axes, [m for m in run.measurements if (m.variant, m.phase) == (variant, phase)], phase)
            axes.set_title(f"{run.name} {variant}".rstrip() + f", {phase}", fontsize=9, loc="left")
    shown: dict[str, Any] = {}
    for axes in grid.flat:
        shown |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    labels = [label for label in (*STYLES, FLOOR) if label in shown]
    handles = [shown[label] for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=100)


def _draw(axes: Axes, measurements: Sequence[Measurement], phase: str) -> None:
    """Groups of bars, one for each shape, and across each group the time of the passes over memory alone."""
    shapes = list(dict.fromkeys(m.shape for m in measurements))
    times = {(m.form, m.shape): m.comparison.seconds for m in measurements}
    times |= {(BATCH_NORM, m.shape): m.comparison.other_seconds for m in measurements if m.form == RBN}
    forms = [form for form in STYLES if any((form, shape) in times for shape in shapes)]
    places, width = np.arange(len(shapes)), 0.8 / len(forms)
    for index, form in enumerate(forms):
        color, hatch = STYLES[form]
        heights = [1000 * times[form, shape] for shape in shapes]
        left = places - 0.4 + index * width
        axes.bar(left, heights, width, align="edge", color=color, hatch=hatch, edgecolor="white", label=form)
    copies = PASSES[phase] / COPY_PASSES
    floor = {m.shape: 1000 * copies * m.copy_seconds for m in measurements if m.copy_seconds is not None}
    axes.hlines(list(floor.values()), places - 0.45, places + 0.45, color="black", label=FLOOR)
    axes.set_yscale("log")
    axes.set_ylabel("ms", fontsize=8)
    axes.set_xticks(places, [" ".join(map(str, shape)) for shape in shapes], fontsize=7)
    axes.tick_params(axis="y", labelsize=7)

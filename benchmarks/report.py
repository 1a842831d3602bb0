"""What was measured: a table for each framework on the terminal, and everything as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import rbn
from rbn import kernels
from rbn.benchmarks.cases import (
    COPY_PASSES,
    EQUATIONS,
    NETWORK_TARGET,
    PASSES,
    PLAIN,
    RBN,
    TARGETS,
    Options,
)
from rbn.benchmarks.runner import Run
from rbn.benchmarks.worker import Measurement
from rbn.progress import Row

COLUMNS = (
    "BatchNorm\nms",
    "RBN\nms",
    "RBN /\nBatchNorm",
    "at\nmost",
    "is\nit?",
    "fused\n=False",
    "equa-\ntions",
    "of\ncopy",
)
"""RBN's time and its ratio with quartiles, the other forms' ratios, and RBN's share of the copy bandwidth."""


def progress_row(run: Run) -> Row:
    """How far a run is."""
    stage = f"{len(run.measurements)} of {run.total}"
    if run.now == "importing":
        stage = "importing" + (" (on first use Jittor compiles itself)" if run.name == "jittor" else "")
    elif run.now:
        stage += f", {run.now}"
    else:
        stage = f"done, {run.seconds:.0f} s" if run.seconds else "waiting"
    return Row(run.name, len(run.measurements), run.total, stage, bool(run.now))


def share_of_copy(measurement: Measurement) -> float | None:
    """How much of the machine's copy bandwidth a form reaches, counting the passes that it cannot avoid."""
    if measurement.copy_seconds is None:
        return None
    copies = PASSES[measurement.phase] / COPY_PASSES
    return copies * measurement.copy_seconds / measurement.comparison.seconds


def target(name: str, phase: str, options: Options) -> float:
    """What RBN may cost at most, in units of BatchNorm."""
    return NETWORK_TARGET if options.network else TARGETS[name][phase]


def render(runs: Sequence[Run], options: Options) -> RenderableType:
    """A table for each framework, and for each how often its targets are reached."""
    parts: list[RenderableType] = [
        Text(f"{machine()}; ratios to BatchNorm: medians pair by pair, with quartiles")
    ]
    for run in runs:
        if run.measurements:
            parts += [_table(run, options), Text(_summary(run, options))]
        if run.failure:
            parts.append(Text(f"{run.name}: {run.failure}", style="red"))
    return Group(*parts)


def machine() -> str:
    """What it was measured on."""
    found = description()
    return f"{found['processor']}, {found['processors']} processors, compiled loops: {found['loops']}"


def _table(run: Run, options: Options) -> Table:
    of = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    what = f"{options.network}, " if options.network else ""
    title = f"{what}{of}, {options.dtype} on {options.device}, {run.threads} threads"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("", "shape", "phase"):
        table.add_column(name, no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for own in (each for each in run.measurements if each.form == RBN):
        others = {
            each.form: f"{each.comparison.ratio:.2f}"
            for each in run.measurements
            if (each.variant, each.shape, each.phase) == (own.variant, own.shape, own.phase)
        }
        limit = target(run.name, own.phase, options)
        found, share = own.comparison, share_of_copy(own)
        ratio = f"{found.ratio:.2f} ({found.low:.2f}-{found.high:.2f})"
        table.add_row(
            own.variant,
            " ".join(map(str, own.shape)),
            own.phase,
            f"{1000 * found.other_seconds:.2f}",
            f"{1000 * found.seconds:.2f}",
            Text(ratio, style="green" if found.ratio <= limit else "red"),
            f"{limit:.2f}",
            "yes" if found.ratio <= limit else "no",
            others.get(PLAIN, "-"),
            others.get(EQUATIONS, "-"),
            "-" if share is None else f"{100 * share:.0f} %",
        )
    return table


def _summary(run: Run, options: Options) -> str:
    texts = []
    for phase in dict.fromkeys(each.phase for each in run.measurements):
        mine = [each for each in run.measurements if each.form == RBN and each.phase == phase]
        limit = target(run.name, phase, options)
        reached = sum(each.comparison.ratio <= limit for each in mine)
        texts.append(f"{reached} of {len(mine)} are at most {limit:.2f} in {phase}")
    return f"{run.name}: {', '.join(texts)}; measured in {run.seconds:.0f} s"


def description() -> dict[str, Any]:
    """The machine and the software, but for the frameworks."""
    return {
        "rbn": rbn.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "processors": len(os.sched_getaffinity(0)),
        "loops": kernels.problem() or kernels.instructions(),
    }


def _processor() -> str:
    """The processor's name, which Python's `platform` does not know on Linux."""
    file = Path("/proc/cpuinfo")
    if file.exists():
        for line in file.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_json(path: Path, runs: Sequence[Run], options: Options, command: str) -> None:
    """Write everything: every measurement, with versions, threads and the machine."""
    content = {
        **description(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "options": dataclasses.asdict(options),
        "frameworks": {
            run.name: {
                "versions": run.versions,
                "threads": run.threads,
                "seconds": run.seconds,
                "failure": run.failure,
                "measurements": [_plain(run.name, each, options) for each in run.measurements],
            }
            for run in runs
        },
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def _plain(name: str, measurement: Measurement, options: Options) -> dict[str, Any]:
    """A measurement as JSON, beside what was to be reached."""
    limit = target(name, measurement.phase, options) if measurement.form == RBN else None
    found = measurement.comparison
    return {
        "variant": measurement.variant,
        "shape": measurement.shape,
        "phase": measurement.phase,
        "form": measurement.form,
        "seconds": found.seconds,
        "batch_norm_seconds": found.other_seconds,
        "ratio": found.ratio,
        "ratio_quartiles": (found.low, found.high),
        "pairs": found.pairs,
        "copy_seconds": measurement.copy_seconds,
        "share_of_copy": share_of_copy(measurement),
        "target": limit,
        "reached": None if limit is None else found.ratio <= limit,
    }

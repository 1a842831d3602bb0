"""The file of a run: the canonical weight file, with all that the run needs to go on."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import rbn
from rbn.backends import frameworks
from rbn.training.preset import Preset, from_dict
from rbn_core import weights
from rbn_core.errors import RBNValueError
from rbn_core.matching import State
from rbn_core.networks import Network
from rbn_core.training import Training


@dataclass
class Meter:
    """The sums since the last row of the log.

    Args:
        count: The images.
        loss: The sum of their losses.
        correct: How many the network has classified right.
    """

    count: int = 0
    loss: float = 0.0
    correct: int = 0


@dataclass
class Progress:
    """Where a run stands. What a step does follows from the preset's seed and the number of the step alone.

    Args:
        step: How many steps it has made.
        best: The highest top-1 of an evaluation so far, in percent.
        meter: The sums since the last row of the log.
    """

    step: int = 0
    best: float = -1.0
    meter: Meter = field(default_factory=Meter)


@dataclass(frozen=True)
class Saved:
    """What the file of a run holds.

    Args:
        state: The weights, under canonical names.
        training: Where the optimizer stands.
        network: The network.
        preset: The run's values.
        progress: Where the run stands.
        framework: Which framework wrote it.
    """

    state: State
    training: Training
    network: Network
    preset: Preset
    progress: Progress
    framework: str


def save(path: Path, saved: Saved, *, epoch: int) -> None:
    """Write the file in one step: what was there stays until the new one is whole.

    Args:
        path: Where.
        saved: What it holds.
        epoch: The epoch that the run is in, for who looks into the file.

    Raises:
        RBNValueError: The file cannot be written, as on a full disk; what was there is as it was.
    """
    run: Mapping[str, Any] = {
        "preset": saved.preset.as_dict(),
        "progress": asdict(saved.progress),
        "epoch": epoch,
        "framework": saved.framework,
        "versions": {
            "rbn": rbn.__version__,
            "python": platform.python_version(),
            "numpy": metadata.version("numpy"),
            **frameworks.versions(saved.framework),
        },
    }
    try:
        weights.save(
            path,
            saved.state,
            layers=saved.network.layers(),
            network=saved.network,
            training=saved.training,
            run=run,
        )
    except OSError as error:
        raise RBNValueError(
            f"train: expected to write {path}, got: {error.strerror or error}. Make room, or give another "
            "folder with --out; the file that was there before is whole."
        ) from error


def load(path: Path) -> Saved:
    """Read the file of a run.

    Raises:
        RBNValueError: It is damaged, or no run's.
    """
    try:
        read = weights.read(path)
    except OSError as error:
        raise RBNValueError(
            f"train: expected to read {path}, got: {error.strerror or error}. Check the path."
        ) from error
    if read.run is None or read.network is None or read.training is None:
        raise RBNValueError(
            f"train: expected the file of a run, as rbn train writes it, got {path}, which holds no run. "
            "Give last.safetensors or best.safetensors of a run's folder."
        )
    try:
        found = read.run["progress"]
        progress = Progress(int(found["step"]), float(found["best"]), Meter(**found["meter"]))
        framework = str(read.run["framework"])
        values = dict(read.run["preset"])
    except (KeyError, TypeError, ValueError) as error:
        raise RBNValueError(
            f"train: expected the file of a run, got {path}, whose run is damaged ({error!r}). Take another "
            "file of the run."
        ) from error
    preset = from_dict(values, str(path))
    return Saved(read.state, read.training, read.network, preset, progress, framework)

"""What a framework does in a run: `loop_<framework>.py` has a class `Loop` of this form for each."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from rbn.training.preset import Preset
from rbn_core.errors import RBNValueError
from rbn_core.matching import State
from rbn_core.networks import Network
from rbn_core.training import Training

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""AdamW's, as every framework has them by default."""


@dataclass(frozen=True)
class Scores:
    """What evaluation finds for a batch: sums over its images.

    Args:
        count: The images.
        loss: The sum of their losses, without label smoothing.
        top1: How many of them have their class first.
        top5: How many have it among the first five.
    """

    count: int = 0
    loss: float = 0.0
    top1: int = 0
    top5: int = 0

    def __add__(self, other: Scores) -> Scores:
        return Scores(
            self.count + other.count,
            self.loss + other.loss,
            self.top1 + other.top1,
            self.top5 + other.top5,
        )


class Loop(Protocol):
    """A network and its optimizer.

    The gradient is that of the mean over the batch of -sum_k q_k log p_k, with q_k = (1 - s) [k = class] +
    s / classes for a label smoothing of s.

    Args:
        network: What to build.
        preset: The optimizer and its options.
        device: As the framework calls it; empty for its default.
    """

    def __init__(self, network: Network, preset: Preset, device: str) -> None: ...

    def step(self, images: NDArray[Any], labels: NDArray[Any], learning_rate: float) -> tuple[float, int]:
        """One update.

        Args:
            images: (N, 3, H, W), float32.
            labels: (N,), int64.
            learning_rate: That of this update.

        Returns:
            The mean loss before the update, and how many images were classified right.
        """

    def evaluate(self, images: NDArray[Any], labels: NDArray[Any]) -> Scores:
        """The scores of a batch in evaluation; what has the class -1 does not count."""

    def state(self) -> State:
        """Copies of all weights and statistics, under canonical names."""

    def training(self) -> Training:
        """Where the optimizer stands."""

    def load(self, state: State, training: Training | None) -> None:
        """Take weights and statistics, and where an optimizer stands.

        Raises:
            RBNValueError: They are of another network or optimizer.
        """


def build(framework: str, network: Network, preset: Preset, device: str) -> Loop:
    """The loop of a framework.

    Raises:
        RBNValueError: The device is not there, or the framework has no float64 for this.
    """
    module = importlib.import_module(f"rbn.training.loop_{framework}")
    loop: Loop = module.Loop(network, preset, device)
    return loop


def check_device(device: str, known: list[str]) -> None:
    """Refuse a device that is not there.

    Args:
        device: As the user calls it.
        known: Those that are there.

    Raises:
        RBNValueError: It is not there.
    """
    if device not in known:
        raise RBNValueError(
            f"train: expected a device that is there, {', '.join(known)}, got {device!r}. Give one of these "
            "with --device, or leave it out."
        )

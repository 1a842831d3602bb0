"""What a framework does in a run: `loop_<framework>.py` has `join` and such a class `Loop` for each."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from rbn.training.preset import Preset
from rbn.training.share import ALONE, Share
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


@dataclass(frozen=True)
class Means:
    """How PyTorch computes a run in less time or memory; the other frameworks have none of these.

    Args:
        amp: "bfloat16" or "float16" for autocast, and empty without it.
        compile: Whether `torch.compile` compiles the network.
        channels_last: Whether images and weights lie in memory with their channels last.
    """

    amp: str = ""
    compile: bool = False
    channels_last: bool = False


PLAIN = Means()
"""Nothing of that."""


class Loop(Protocol):
    """A network and its optimizer, in one of several processes that go through every batch together.

    The gradient is that of the mean over the batch of -sum_k q_k log p_k, with q_k = (1 - s) [k = class] +
    s / classes for a label smoothing of s. With `accumulate` parts it is the mean of theirs, each with batch
    statistics of its own.

    Args:
        network: What to build.
        preset: The optimizer and its options.
        device: As the framework calls it; empty for its default.
        share: What part of every batch this process gets.

    Attributes:
        share: The same.
        parts: Over how many processes or devices a batch is spread.
        sync: Whether batch statistics are those of all of them together.
    """

    share: Share
    parts: int
    sync: bool

    def __init__(self, network: Network, preset: Preset, device: str, share: Share) -> None: ...

    def step(self, images: NDArray[Any], labels: NDArray[Any], learning_rate: float) -> tuple[float, int]:
        """One update.

        Args:
            images: This process's, (N, 3, H, W), float32.
            labels: (N,), int64.
            learning_rate: That of this update.

        Returns:
            The mean loss before the update, and how many images were classified right, of the whole batch.
        """

    def evaluate(self, images: NDArray[Any], labels: NDArray[Any]) -> Scores:
        """The scores of the whole batch in evaluation; what has the class -1 does not count."""

    def align(self) -> None:
        """Give all processes the running statistics of process 0, which are what is saved."""

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""

    def state(self) -> State:
        """Copies of all weights and statistics, under canonical names."""

    def training(self) -> Training:
        """Where the optimizer stands."""

    def load(self, state: State, training: Training | None) -> None:
        """Take weights and statistics, and where an optimizer stands.

        Raises:
            RBNValueError: They are of another network or optimizer.
        """


def join(framework: str, device: str) -> Share:
    """Join the other processes of a run, if a launcher has started several.

    Args:
        framework: One of `rbn.backends.frameworks.FRAMEWORKS`.
        device: As the framework calls it; empty for its default.

    Returns:
        What part of every batch this process gets: all of it where there is no other.
    """
    module = importlib.import_module(f"rbn.training.loop_{framework}")
    share: Share = module.join(device)
    return share


def build(
    framework: str,
    network: Network,
    preset: Preset,
    device: str,
    share: Share = ALONE,
    means: Means = PLAIN,
) -> Loop:
    """The loop of a framework.

    Args:
        framework: One of `rbn.backends.frameworks.FRAMEWORKS`.
        network: What to build.
        preset: The optimizer and its options.
        device: As the framework calls it; empty for its default.
        share: What `join` has returned.
        means: PyTorch's options.

    Raises:
        RBNValueError: The device is not there, the framework has no float64 or none of the means, or batches
            cannot be dealt to all processes and devices.
    """
    if framework != "torch" and means != PLAIN:
        raise RBNValueError(
            f"train: expected --amp, --compile and --channels-last in PyTorch, which alone has them, got "
            f"{framework}. Leave them out, or give --framework torch."
        )
    module = importlib.import_module(f"rbn.training.loop_{framework}")
    own = (means,) if framework == "torch" else ()
    loop: Loop = module.Loop(network, preset, device, share, *own)
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

"""A run in Jittor."""

from __future__ import annotations

from typing import Any

from rbn.backends.jittor import (
    from_numpy,
    networks,
    optimizer_from_numpy,
    optimizer_to_numpy,
    parameter_groups,
    to_numpy,
)

# isort: split
# Behind the backend, which sets up what Jittor reads when it is imported.
import jittor as jt
import numpy as np
from jittor import Module, Var, nn
from jittor.optim import SGD, AdamW
from numpy.typing import NDArray

from rbn.training.loop import BETAS, EPSILON, Scores, check_device
from rbn.training.preset import Preset
from rbn_core.matching import State
from rbn_core.networks import Network
from rbn_core.training import Training


class Loop:
    """See `rbn.training.loop.Loop`; devices are "cpu" and "cuda"."""

    def __init__(self, network: Network, preset: Preset, device: str) -> None:
        known = ["cpu", *(["cuda"] if jt.has_cuda else [])]
        check_device(device or known[-1], known)
        jt.flags.use_cuda = int((device or known[-1]) == "cuda")
        self.preset = preset
        self.model = networks.Network(network)
        if preset.dtype == "float64":
            self.model.float64()
        self.model.train()
        self.optimizer = _optimizer(self.model, preset)

    def step(self, images: NDArray[Any], labels: NDArray[Any], learning_rate: float) -> tuple[float, int]:
        """One update."""
        self.optimizer.lr = learning_rate
        logits = self.model(jt.array(images.astype(self.preset.dtype, copy=False)))
        loss = _losses(logits, labels, self.preset.label_smoothing).mean()
        self.optimizer.step(loss)
        found = logits.numpy().argmax(1)
        return float(loss.numpy().item()), int((found == labels).sum())

    def evaluate(self, images: NDArray[Any], labels: NDArray[Any]) -> Scores:
        """The scores of a batch."""
        self.model.eval()
        with jt.no_grad():
            logits = self.model(jt.array(images.astype(self.preset.dtype, copy=False)))
            real = labels >= 0
            losses = _losses(logits, np.where(real, labels, 0), 0.0).numpy()
        self.model.train()
        found = np.argsort(-logits.numpy(), axis=1, kind="stable")[:, :5] == labels[:, None]
        return Scores(int(real.sum()), float(losses[real].sum()), int(found[:, 0].sum()), int(found.sum()))

    def state(self) -> State:
        """The weights."""
        return to_numpy(self.model)

    def training(self) -> Training:
        """Where the optimizer stands."""
        return optimizer_to_numpy(self.optimizer, self.model)

    def load(self, state: State, training: Training | None) -> None:
        """Take a state."""
        from_numpy(self.model, state)
        if training is not None:
            optimizer_from_numpy(self.optimizer, self.model, training)


def _losses(logits: Var, labels: NDArray[Any], smoothing: float) -> Var:
    """The loss of every image."""
    logp = nn.log_softmax(logits, dim=1)
    count = logits.shape[1]
    q = (1 - smoothing) * np.eye(count)[labels] + smoothing / count
    return -(logp * jt.array(q.astype(str(logits.dtype)))).sum(1)


def _optimizer(model: Module, preset: Preset) -> Any:
    groups = parameter_groups(model, preset.weight_decay)
    if preset.decay_norms:
        parameters = [each for group in groups for each in group["params"]]
        groups = [{"params": parameters, "weight_decay": preset.weight_decay}]
    if preset.optimizer == "sgd":
        return SGD(groups, preset.learning_rate, preset.momentum, preset.weight_decay)
    return AdamW(groups, preset.learning_rate, EPSILON, BETAS, preset.weight_decay)

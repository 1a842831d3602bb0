"""A run in MindSpore."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.experimental.optim import AdamW
from numpy.typing import NDArray

from rbn.backends.mindspore import (
    from_numpy,
    networks,
    optimizer_from_numpy,
    optimizer_to_numpy,
    parameter_groups,
    to_numpy,
)
from rbn.backends.mindspore.devices import devices
from rbn.training.loop import BETAS, EPSILON, Scores, check_device
from rbn.training.preset import Preset
from rbn_core.errors import RBNValueError
from rbn_core.matching import State
from rbn_core.networks import Network
from rbn_core.training import Training


class Loop:
    """See `rbn.training.loop.Loop`; devices are "CPU", "GPU" and "Ascend"."""

    def __init__(self, network: Network, preset: Preset, device: str) -> None:
        known = [each.partition(" ")[0] for each in devices()]
        device = device or known[-1]
        check_device(device, known)
        if ms.get_context("device_target") != device:  # MindSpore refuses any call once it has computed
            ms.set_device(device)
        if preset.dtype != "float32":
            raise RBNValueError(
                f"train: expected float32 in MindSpore, whose optimizers have no other, got {preset.dtype}. "
                "Leave --dtype out, or take another framework."
            )
        self.preset = preset
        self.model = networks.Network(network)
        self.optimizer = _optimizer(self.model, preset)
        self.differentiate = ms.value_and_grad(self._loss, None, self.optimizer.parameters, has_aux=True)

    def step(self, images: NDArray[Any], labels: NDArray[Any], learning_rate: float) -> tuple[float, int]:
        """One update."""
        for rate in _rates(self.optimizer):
            rate.copy_(Tensor(learning_rate, ms.float32))
        self.model.set_train(True)
        (loss, logits), gradients = self.differentiate(Tensor(images), Tensor(labels.astype(np.int32)))
        self.optimizer(gradients)
        found = logits.asnumpy().argmax(1)
        return float(loss.asnumpy().item()), int((found == labels).sum())

    def evaluate(self, images: NDArray[Any], labels: NDArray[Any]) -> Scores:
        """The scores of a batch."""
        self.model.set_train(False)
        logits = self.model(Tensor(images))
        real = labels >= 0
        targets = Tensor(np.where(real, labels, 0).astype(np.int32))
        losses = ops.cross_entropy(logits, targets, reduction="none").asnumpy()
        found = np.argsort(-logits.asnumpy(), axis=1, kind="stable")[:, :5] == labels[:, None]
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

    def _loss(self, x: Tensor, target: Tensor) -> Any:
        logits = self.model(x)
        loss = ops.cross_entropy(logits, target, label_smoothing=self.preset.label_smoothing)
        return loss, logits


def _optimizer(model: nn.Cell, preset: Preset) -> Any:
    groups = parameter_groups(model, preset.weight_decay)
    if preset.decay_norms:
        groups = [{"params": model.trainable_params(), "weight_decay": preset.weight_decay}]
    if preset.optimizer == "sgd":
        return nn.Momentum(groups, preset.learning_rate, preset.momentum)
    return AdamW(groups, preset.learning_rate, BETAS, EPSILON)


def _rates(optimizer: Any) -> list[Any]:
    """What the optimizer keeps its learning rate in."""
    if isinstance(optimizer, AdamW):
        return list(optimizer.lrs)
    return [optimizer.learning_rate]

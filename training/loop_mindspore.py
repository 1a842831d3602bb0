"""A run in MindSpore."""

from __future__ import annotations

import os
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.communication import GlobalComm, get_group_size, get_rank, init
from mindspore.experimental.optim import AdamW
from numpy.typing import NDArray

from rbn.backends.mindspore import (
    distributed,
    from_numpy,
    networks,
    optimizer_from_numpy,
    optimizer_to_numpy,
    parameter_groups,
    to_numpy,
)
from rbn.backends.mindspore.devices import devices
from rbn.backends.mindspore.layers import CalibratedNorm
from rbn.training.loop import BETAS, EPSILON, Scores, check_device
from rbn.training.preset import Preset
from rbn.training.share import ALONE, Share, check_parts
from rbn_core.errors import RBNValueError
from rbn_core.matching import State
from rbn_core.networks import Network, Norm
from rbn_core.training import Training


def join(device: str) -> Share:
    """Join the processes of `msrun`; the one that only brings the others together does not return."""
    if "MS_ROLE" not in os.environ:
        return ALONE
    if not GlobalComm.INITED:
        _set_device(device)
        init()
    return Share(get_rank(), get_group_size())


class Loop:
    """See `rbn.training.loop.Loop`; devices are "CPU", "GPU" and "Ascend"."""

    def __init__(self, network: Network, preset: Preset, device: str, share: Share) -> None:
        _set_device(device)
        self.share, self.parts, self.sync = share, share.count, preset.sync
        check_parts(preset, self.parts)
        if preset.dtype != "float32":
            raise RBNValueError(
                f"train: expected float32 in MindSpore, whose optimizers have no other, got {preset.dtype}. "
                "Leave --dtype out, or take another framework."
            )
        self.preset = preset
        self.model = networks.Network(network)
        if share.count > 1 and preset.sync:
            _share_statistics(self.model, network)
        self.optimizer = _optimizer(self.model, preset)
        if share.count > 1:
            self.reduce = nn.DistributedGradReducer(self.optimizer.parameters, True, share.count)
        self.differentiate = ms.value_and_grad(self._loss, None, self.optimizer.parameters, has_aux=True)

    def step(self, images: NDArray[Any], labels: NDArray[Any], learning_rate: float) -> tuple[float, int]:
        """One update."""
        for rate in _rates(self.optimizer):
            rate.copy_(Tensor(learning_rate, ms.float32))
        self.model.set_train(True)
        parts = self.preset.accumulate
        sums: Any = None
        loss_sum, correct = 0.0, 0.0
        for x, target in zip(np.split(images, parts), np.split(labels, parts), strict=True):
            (loss, logits), gradients = self.differentiate(Tensor(x), Tensor(target.astype(np.int32)))
            sums = gradients if sums is None else tuple(map(ops.add, sums, gradients))
            loss_sum += float(loss.asnumpy().item())
            correct += (logits.asnumpy().argmax(1) == target).sum()
        if parts > 1:
            sums = tuple(each / parts for each in sums)
        self.optimizer(self.reduce(sums) if self.share.count > 1 else sums)
        loss_sum, correct = self._total(loss_sum, correct)
        return loss_sum / parts / self.share.count, int(correct)

    def evaluate(self, images: NDArray[Any], labels: NDArray[Any]) -> Scores:
        """The scores of a batch."""
        self.model.set_train(False)
        logits = self.model(Tensor(images))
        real = labels >= 0
        targets = Tensor(np.where(real, labels, 0).astype(np.int32))
        losses = ops.cross_entropy(logits, targets, reduction="none").asnumpy()
        found = np.argsort(-logits.asnumpy(), axis=1, kind="stable")[:, :5] == labels[:, None]
        sums = self._total(real.sum(), losses[real].sum(), found[:, 0].sum(), found.sum())
        return Scores(int(sums[0]), sums[1], int(sums[2]), int(sums[3]))

    def align(self) -> None:
        """Take the statistics of process 0."""
        if self.share.count > 1:
            for parameter in self.model.get_parameters():
                if not parameter.requires_grad and parameter.dtype == ms.float32:  # and no count of batches
                    # Each at once, so that all processes have them in one order.
                    gathered = ops.AllGather()(parameter.expand_dims(0)).asnumpy()
                    parameter.set_data(Tensor(gathered[0]))

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return self._total(flag)[0] > 0

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

    def _total(self, *values: float) -> list[float]:
        """The sums over all processes."""
        numbers = [float(value) for value in values]
        if self.share.count == 1:
            return numbers
        share = distributed.Share(0, GlobalComm.WORLD_COMM_GROUP)
        total: list[float] = share.total_of_doubles(Tensor(numbers, ms.float64)).asnumpy().tolist()
        return total

    def _loss(self, x: Tensor, target: Tensor) -> Any:
        logits = self.model(x)
        loss = ops.cross_entropy(logits, target, label_smoothing=self.preset.label_smoothing)
        return loss, logits


def _set_device(device: str) -> None:
    """Compute on a device.

    Raises:
        RBNValueError: It is not there.
    """
    known = [each.partition(" ")[0] for each in devices()]
    device = device or known[-1]
    check_device(device, known)
    if ms.get_context("device_target") != device:  # MindSpore refuses any call once it has computed
        ms.set_device(device)


def _share_statistics(model: nn.Cell, network: Network) -> None:
    """Let layers take their batch statistics over all processes.

    Raises:
        RBNValueError: One is MindSpore's own, which does not.
    """
    if any(isinstance(node, Norm) and node.layer == "bn" for node in network.nodes):
        raise RBNValueError(
            "train: expected RBN, IEBN or BNET for --sync in MindSpore, whose BatchNorm has those of "
            "its process, got bn. Leave --sync out, or give --norm rbn."
        )
    for cell in model.cells_and_names():
        if isinstance(cell[1], CalibratedNorm):
            cell[1].sync = True


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

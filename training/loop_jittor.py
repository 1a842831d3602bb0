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

from rbn.backends.jittor import distributed
from rbn.training.loop import BETAS, EPSILON, Scores, check_device
from rbn.training.preset import Preset
from rbn.training.share import ALONE, Share, check_parts
from rbn_core.matching import State
from rbn_core.networks import Network
from rbn_core.training import Training


def join(device: str) -> Share:
    """Join the processes of `mpirun`, as Jittor has done when it was imported."""
    return Share(jt.rank, jt.world_size) if jt.in_mpi else ALONE


class Loop:
    """See `rbn.training.loop.Loop`; devices are "cpu" and "cuda"."""

    def __init__(self, network: Network, preset: Preset, device: str, share: Share) -> None:
        known = ["cpu", *(["cuda"] if jt.has_cuda else [])]
        check_device(device or known[-1], known)
        jt.flags.use_cuda = int((device or known[-1]) == "cuda")
        self.preset = preset
        self.share, self.parts, self.sync = share, share.count, preset.sync
        check_parts(preset, self.parts)
        self.model = networks.Network(network)
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm):  # as our layers are, too
                module.sync = preset.sync
        if preset.dtype == "float64":
            self.model.float64()
        self.model.train()
        self.optimizer = _optimizer(self.model, preset)

    def step(self, images: NDArray[Any], labels: NDArray[Any], learning_rate: float) -> tuple[float, int]:
        """One update."""
        self.optimizer.lr = learning_rate
        parts, steps = self.preset.accumulate, self.optimizer.n_step
        loss_sum, correct = 0.0, 0.0
        for x, target in zip(np.split(images, parts), np.split(labels, parts), strict=True):
            logits = self.model(jt.array(x.astype(self.preset.dtype, copy=False)))
            loss = _losses(logits, target, self.preset.label_smoothing).mean()
            self.optimizer.backward(loss / parts if parts > 1 else loss)  # the mean over all processes
            loss_sum += float(loss.numpy().item())
            correct += (logits.numpy().argmax(1) == target).sum()
        self.optimizer.n_step = steps + 1  # which counts gradients, and AdamW corrects its moments by it
        self.optimizer.step()
        loss_sum, correct = self._total(loss_sum, correct)
        return loss_sum / parts / self.share.count, int(correct)

    def evaluate(self, images: NDArray[Any], labels: NDArray[Any]) -> Scores:
        """The scores of a batch."""
        self.model.eval()
        with jt.no_grad():
            logits = self.model(jt.array(images.astype(self.preset.dtype, copy=False)))
            real = labels >= 0
            losses = _losses(logits, np.where(real, labels, 0), 0.0).numpy()
        self.model.train()
        found = np.argsort(-logits.numpy(), axis=1, kind="stable")[:, :5] == labels[:, None]
        sums = self._total(real.sum(), losses[real].sum(), found[:, 0].sum(), found.sum())
        return Scores(int(sums[0]), sums[1], int(sums[2]), int(sums[3]))

    def align(self) -> None:
        """Take the statistics of process 0."""
        if self.share.count > 1:
            jt.sync_all()
            for module in self.model.modules():
                if isinstance(module, nn.BatchNorm):
                    for statistic in (module.running_mean, module.running_var):
                        statistic.update(statistic.mpi_broadcast().sync())

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
        jt.sync_all()  # in one order on all of them: what is pending has sums of its own
        total: list[float] = distributed.AllReduce.apply(jt.array(numbers, dtype="float64")).numpy().tolist()
        return total


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

"""A run in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from rbn.backends.torch import from_numpy, networks, optimizer_from_numpy, optimizer_to_numpy, to_numpy
from rbn.backends.torch.recipes import parameter_groups
from rbn.training.loop import BETAS, EPSILON, Scores, check_device
from rbn.training.preset import Preset
from rbn_core.matching import State
from rbn_core.networks import Network
from rbn_core.training import Training


class Loop:
    """See `rbn.training.loop.Loop`; devices are "cpu", "cuda" and "cuda:0" and so on."""

    def __init__(self, network: Network, preset: Preset, device: str) -> None:
        cuda = torch.cuda.device_count()
        known = ["cpu", *(["cuda"] if cuda else []), *(f"cuda:{index}" for index in range(cuda))]
        self.device = device or ("cuda" if cuda else "cpu")
        check_device(self.device, known)
        self.preset = preset
        self.dtype = getattr(torch, preset.dtype)
        self.model: nn.Module = networks.Network(network).to(self.device, self.dtype)
        self.optimizer = _optimizer(self.model, preset)
        self.steps = 0

    def step(self, images: NDArray[Any], labels: NDArray[Any], learning_rate: float) -> tuple[float, int]:
        """One update."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        x, target = self._tensors(images, labels)
        self.model.train()
        logits = self.model(x)
        loss = F.cross_entropy(logits, target, label_smoothing=self.preset.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        return loss.item(), int((logits.argmax(1) == target).sum())

    @torch.no_grad()
    def evaluate(self, images: NDArray[Any], labels: NDArray[Any]) -> Scores:
        """The scores of a batch."""
        x, target = self._tensors(images, labels)
        self.model.eval()
        logits = self.model(x)
        real = target >= 0
        loss = F.cross_entropy(logits, target, ignore_index=-1, reduction="sum")
        found = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
        return Scores(int(real.sum()), loss.item(), int(found[:, 0].sum()), int(found.sum()))

    def state(self) -> State:
        """The weights."""
        return to_numpy(self.model)

    def training(self) -> Training:
        """Where the optimizer stands."""
        return optimizer_to_numpy(self.optimizer, self.model, step=self.steps)

    def load(self, state: State, training: Training | None) -> None:
        """Take a state."""
        from_numpy(self.model, state)
        if training is not None:
            optimizer_from_numpy(self.optimizer, self.model, training)
            self.steps = training.step

    def _tensors(self, images: NDArray[Any], labels: NDArray[Any]) -> tuple[Tensor, Tensor]:
        x = torch.from_numpy(images).to(self.device, self.dtype, non_blocking=True)
        return x, torch.from_numpy(labels).to(self.device, non_blocking=True)


def _optimizer(model: nn.Module, preset: Preset) -> torch.optim.Optimizer:
    """The optimizer of a run."""
    groups: Any = parameter_groups(model, preset.weight_decay)
    if preset.decay_norms:
        groups = [{"params": list(model.parameters()), "weight_decay": preset.weight_decay}]
    if preset.optimizer == "sgd":
        return torch.optim.SGD(groups, preset.learning_rate, preset.momentum)
    return torch.optim.AdamW(groups, preset.learning_rate, BETAS, EPSILON)

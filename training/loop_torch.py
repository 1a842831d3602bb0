"""A run in PyTorch."""

from __future__ import annotations

import atexit
import os
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from rbn.backends.torch import (
    convert_sync_rbn,
    from_numpy,
    networks,
    optimizer_from_numpy,
    optimizer_to_numpy,
    to_numpy,
)
from rbn.backends.torch.recipes import parameter_groups
from rbn.training.loop import BETAS, EPSILON, Means, Scores, check_device
from rbn.training.preset import Preset
from rbn.training.share import ALONE, Share, check_parts
from rbn_core.errors import RBNValueError
from rbn_core.matching import State
from rbn_core.networks import Network
from rbn_core.training import Training

HALVES = ("bfloat16", "float16")


def join(device: str) -> Share:
    """Join the processes of `torchrun`, each with the GPU of its number on its host."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return ALONE
    if not dist.is_initialized():
        if torch.cuda.is_available() and device != "cpu":
            torch.cuda.set_device(_own_device(device))
        dist.init_process_group()  # gloo for what is on the CPU, NCCL for what is on GPUs
        atexit.register(dist.destroy_process_group)
    return Share(dist.get_rank(), dist.get_world_size())


class Loop:
    """See `rbn.training.loop.Loop`; devices are "cpu", "cuda" and "cuda:0" and so on."""

    def __init__(
        self,
        network: Network,
        preset: Preset,
        device: str,
        share: Share,
        means: Means,
    ) -> None:
        self.device = _own_device(device)
        self.preset, self.share = preset, share
        self.parts, self.sync = share.count, preset.sync
        check_parts(preset, self.parts)
        kind = torch.device(self.device).type
        _check_amp(means.amp, kind, preset.dtype)
        self.dtype = getattr(torch, preset.dtype)
        self.layout = torch.channels_last if means.channels_last else torch.preserve_format
        self.model: nn.Module = networks.Network(network).to(
            self.device, self.dtype, memory_format=self.layout
        )
        self.module = self.model
        if share.count > 1:
            if preset.sync:
                convert_sync_rbn(self.model)
                _check_sync(self.model, kind)
            self.module = DistributedDataParallel(self.model, [self.device] if kind == "cuda" else None)
        if means.compile:
            self.module.compile()
        self.autocast = torch.autocast(kind, getattr(torch, means.amp or "bfloat16"), bool(means.amp))
        self.scaler = torch.amp.GradScaler(kind, enabled=means.amp == "float16")
        self.optimizer = _optimizer(self.model, preset)
        self.steps = 0

    def step(self, images: NDArray[Any], labels: NDArray[Any], learning_rate: float) -> tuple[float, int]:
        """One update."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        images_and_targets = self._tensors(images, labels)
        self.module.train()
        self.optimizer.zero_grad()
        parts = self.preset.accumulate
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for part, (x, target) in enumerate(zip(*(t.chunk(parts) for t in images_and_targets), strict=True)):
            waits = part + 1 < parts and isinstance(self.module, DistributedDataParallel)
            with self.module.no_sync() if waits else nullcontext():
                with self.autocast:
                    logits = self.module(x)
                    loss = F.cross_entropy(logits, target, label_smoothing=self.preset.label_smoothing)
                self.scaler.scale(loss / parts).backward()
            sums += torch.stack([loss.detach().double(), (logits.argmax(1) == target).sum().double()])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.steps += 1
        total, correct = self._total(sums)
        return total / parts / self.share.count, int(correct)

    @torch.no_grad()
    def evaluate(self, images: NDArray[Any], labels: NDArray[Any]) -> Scores:
        """The scores of a batch."""
        x, target = self._tensors(images, labels)
        self.module.eval()
        with self.autocast:
            logits = self.module(x)
            loss = F.cross_entropy(logits, target, ignore_index=-1, reduction="sum")
        found = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
        sums = [(target >= 0).sum(), loss, found[:, 0].sum(), found.sum()]
        count, total, top1, top5 = self._total(torch.stack([each.double() for each in sums]))
        return Scores(int(count), total, int(top1), int(top5))

    def align(self) -> None:
        """Nothing: DistributedDataParallel takes those of process 0 before every forward pass."""

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        if self.share.count == 1:
            return flag
        return self._total(torch.tensor([float(flag)], device=self.device))[0] > 0

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
        x = torch.from_numpy(images).to(self.device, self.dtype, non_blocking=True, memory_format=self.layout)
        return x, torch.from_numpy(labels).to(self.device, non_blocking=True)

    def _total(self, values: Tensor) -> list[float]:
        """The sums over all processes."""
        if self.share.count > 1:
            dist.all_reduce(values)
        total: list[float] = values.tolist()
        return total


def _own_device(device: str) -> str:
    """What a device means in this process.

    Raises:
        RBNValueError: It is not there.
    """
    cuda = torch.cuda.device_count()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # each has its own, which nobody can name for all
        own = int(os.environ.get("LOCAL_RANK", 0))
        device = device or ("cuda" if cuda else "cpu")
        known = ["cpu", *(["cuda"] if cuda > own else [])]
        check_device(device, known)
        return f"cuda:{own}" if device == "cuda" else device
    known = ["cpu", *(["cuda"] if cuda else []), *(f"cuda:{index}" for index in range(cuda))]
    device = device or ("cuda" if cuda else "cpu")
    check_device(device, known)
    return device


def _check_amp(amp: str, kind: str, dtype: str) -> None:
    """Refuse what autocast cannot do here.

    Raises:
        RBNValueError: It is so.
    """
    if amp and amp not in HALVES:
        raise RBNValueError(f"train: expected --amp {' or '.join(HALVES)}, got {amp!r}. Give one of these.")
    if amp == "float16" and kind == "cpu":
        raise RBNValueError(
            "train: expected a GPU for --amp float16, got cpu. Give --amp bfloat16, or leave --amp out."
        )
    if amp and dtype != "float32":
        raise RBNValueError(
            f"train: expected --dtype float32 with --amp, got {dtype}. Leave one of them out."
        )


def _check_sync(model: nn.Module, kind: str) -> None:
    """Refuse a BatchNorm of PyTorch's own on the CPU, where it has no synchronised statistics.

    Raises:
        RBNValueError: There is one.
    """
    if kind == "cpu" and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        raise RBNValueError(
            "train: expected RBN, IEBN or BNET for --sync on the CPU, where PyTorch has no SyncBatchNorm, "
            "got bn. Leave --sync out, or give --norm rbn."
        )


def _optimizer(model: nn.Module, preset: Preset) -> torch.optim.Optimizer:
    """The optimizer of a run."""
    groups: Any = parameter_groups(model, preset.weight_decay)
    if preset.decay_norms:
        groups = [{"params": list(model.parameters()), "weight_decay": preset.weight_decay}]
    if preset.optimizer == "sgd":
        return torch.optim.SGD(groups, preset.learning_rate, preset.momentum)
    return torch.optim.AdamW(groups, preset.learning_rate, BETAS, EPSILON)

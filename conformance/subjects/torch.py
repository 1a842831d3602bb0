"""PyTorch modules as subjects, and the project's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rbn.backends.torch import BNET, IEBN, RBN, from_numpy, to_numpy
from rbn.conformance.cases import LAYERS
from rbn.conformance.shares import Devices, processes, start
from rbn.conformance.subject import Array, LayerSubject, Outcome, Subject
from rbn.conformance.subjects.numpy import laid_out
from rbn_core.config import Config
from rbn_core.matching import State
from rbn_core.names import NAMES


class TorchModule(LayerSubject):
    """Any `torch.nn.Module`; `make` gets the dtype of the parameters as a `torch.dtype`.

    Attributes:
        device: Where it runs.
    """

    device = "cpu"

    def build(self, config: Config, state: State, dtype: str, layout: str = "channels_first") -> None:
        """Make the module, with parameters in at least float32."""
        stored = torch.promote_types(getattr(torch, dtype), torch.float32)
        self.layer: nn.Module = self.make_layer(config, stored).to(self.device)
        self.layout = layout
        self.load(state)

    def load(self, state: State) -> None:
        """Fill the module."""
        own = self.layer.state_dict()
        with torch.no_grad():
            for name, value in self.own(state, own).items():
                own[name].copy_(torch.from_numpy(value))

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        """Forward and backward through autograd."""
        self.layer.train(training)
        self.layer.zero_grad()
        leaf = tensor(x, self.layout, self.device).requires_grad_(x.dtype.kind in "fV")
        y = self.layer(leaf)
        dense = "channels_first" if self.layout in ("strided", "expanded") else self.layout
        y.backward(tensor(cotangent, dense, self.device))
        gradients = {name: array(p.grad) for name, p in self.layer.named_parameters() if p.grad is not None}
        return Outcome(array(y), array(leaf.grad), self.canonical(gradients), self.state(), array(leaf))

    def state(self) -> State:
        """The module's state."""
        return self.canonical({name: array(value) for name, value in self.layer.state_dict().items()})


class Torch(TorchModule):
    """The project's PyTorch layers.

    Args:
        sync: Whether they share their statistics with the other processes of `torch.distributed`.
        fused: Whether one operator computes them, where it can.
        device: Where they run, "cpu" or "cuda".
    """

    def __init__(self, sync: bool = False, fused: bool = True, device: str = "cpu") -> None:
        names = ["torch", *(() if device == "cpu" else (device,)), *(() if fused else ("plain",))]
        super().__init__(".".join(names), self.make_rbn, NAMES["torch"], momentum="new", layers=LAYERS)
        self.sync = sync
        self.fused = fused
        self.device = device
        self.devices = 4 if device == "cpu" else 1

    def make_rbn(self, config: Config, dtype: torch.dtype) -> nn.Module:
        """RBN, IEBN or BNET."""
        common: dict[str, Any] = {
            "eps": config.eps,
            "momentum": config.momentum,
            "track_running_stats": config.track_running_stats,
            "running_var": config.running_var,
            "sync": self.sync,
            "fused": self.fused,
            "dtype": dtype,
        }
        if config.kernel_size is not None:
            return BNET(config.num_features, config.kernel_size, spatial_dims=config.spatial_dims, **common)
        common |= {"affine": config.gamma, "bias": config.beta}
        if config.layer == "IEBN":
            return IEBN(config.num_features, **common)
        for name in ("centering", "scaling", "restrict"):
            common[name] = getattr(config, name)
        return RBN(config.num_features, **common)

    def load(self, state: State) -> None:
        """Fill the module as users do."""
        from_numpy(self.layer, state)

    def state(self) -> State:
        """The module's state as users get it."""
        return to_numpy(self.layer)

    def spread(self, shares: tuple[int, ...]) -> Subject:
        """The layers on so many processes of gloo."""
        return Devices(
            self.name, processes("rbn.conformance.subjects.torch:device", len(shares), launch), shares
        )


def plain() -> Torch:
    """The project's PyTorch layers in PyTorch's own operations."""
    return Torch(fused=False)


def cuda() -> Torch:
    """The project's PyTorch layers on a GPU."""
    return Torch(device="cuda")


def launch(script: list[str], world: int, folder: Path) -> list[subprocess.Popen[bytes]]:
    """Start a process for each rank."""
    return [start([sys.executable, *script], folder / f"{rank}.log", RANK=str(rank)) for rank in range(world)]


def device(world: int, folder: Path) -> tuple[int, Subject]:
    """The layers on one of several processes."""
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world
    )
    return rank, Torch(sync=True)


def tensor(x: Array, layout: str, device: str = "cpu") -> torch.Tensor:
    """The array as a tensor in a layout; NumPy's bfloat16 goes through float32."""
    if x.dtype.name == "bfloat16":
        here = torch.from_numpy(laid_out(x.astype("float32"), layout)).bfloat16()
    else:
        here = torch.from_numpy(laid_out(x, layout))
    if device == "cpu":
        return here
    there = torch.empty_strided(here.shape, here.stride(), dtype=here.dtype, device=device)
    images = slice(1) if layout == "expanded" else slice(None)  # the others are the first one's memory
    there[images].copy_(here[images])
    return there


def array(tensor: torch.Tensor) -> Array:
    """The tensor as an array of its own dtype."""
    tensor = tensor.detach().cpu()
    return tensor.float().numpy().astype("bfloat16") if tensor.dtype == torch.bfloat16 else tensor.numpy()

"""PyTorch modules as subjects, and the project's own."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rbn.backends.torch import from_numpy, layers, to_numpy
from rbn.conformance.cases import LAYERS, PRECISIONS, PRECISIONS_OF, SHARED_WITH
from rbn.conformance.shares import Devices, processes, start
from rbn.conformance.subject import Array, LayerSubject, Outcome, Subject
from rbn.conformance.subjects.numpy import laid_out
from rbn_core.config import Config, arguments
from rbn_core.matching import State
from rbn_core.names import NAMES


class TorchModule(LayerSubject):
    """Any `torch.nn.Module`; `make` gets the dtype of the parameters as a `torch.dtype`.

    Mixed precision is PyTorch's autocast, and the input is as an autocast convolution leaves it.

    Attributes:
        device: Where it runs.
        precision: The way into mixed precision, if any.
    """

    device = "cpu"
    precision = ""
    refusals: tuple[type[Exception], ...] = (ValueError, TypeError, RuntimeError)

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
        with self.autocast():
            y = self.layer(leaf)
        dense = "channels_first" if self.layout in ("strided", "expanded") else self.layout
        scaler = torch.amp.GradScaler(
            self.device, init_scale=256.0, enabled=self.precision.endswith("scaled")
        )
        dy = tensor(cotangent, dense, self.device)
        if self.precision:  # the loss is float32
            scaler.scale((y.float() * dy.float()).sum()).backward()
        else:
            y.backward(dy)
        scale = scaler.get_scale()
        gradients = {
            name: array(p.grad / scale) for name, p in self.layer.named_parameters() if p.grad is not None
        }
        dx = array(leaf.grad.float() / scale if self.precision else leaf.grad)
        return Outcome(array(y), dx, self.canonical(gradients), self.state(), array(leaf))

    def autocast(self) -> AbstractContextManager[object]:
        """The scope of mixed precision, if there is one."""
        if not self.precision:
            return nullcontext()
        return torch.autocast(self.device, getattr(torch, PRECISIONS[self.precision]))

    def under(self, precision: str) -> Subject:
        """The same under autocast, and with a scaled loss where the way says so."""
        other = copy.copy(self)
        other.precision = precision
        return other

    def spoil(self, name: str, kind: str) -> None:
        """Assign another tensor, or none."""
        path, _, own = self.names[name].rpartition(".")
        owner = self.layer.get_submodule(path)
        value: Tensor | None = None
        if kind == "shared":
            stored = self.layer.state_dict()
            value = next(
                stored[self.names[other]] for other in SHARED_WITH[name] if self.names[other] in stored
            )
        elif kind != "missing":
            value = SPOILT[kind](getattr(owner, own).detach())
        if own in owner._parameters and value is not None:
            value = nn.Parameter(value, requires_grad=value.is_floating_point())
        setattr(owner, own, value)

    def state(self) -> State:
        """The module's state, but for what has no numbers."""
        stored = self.layer.state_dict().items()
        return self.canonical({name: array(value) for name, value in stored if not value.is_meta})


class Wrapping(Tensor):
    """A tensor that stands for another and has no memory of its own."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapping:
        """With the shape, dtype and device of the other."""
        wrapper: Wrapping = Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device
        )
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do with the other what is done with this."""
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)

        def unwrapped(value: Any) -> Any:
            return value.inner if isinstance(value, cls) else value

        return func(*pytree.tree_map(unwrapped, args), **pytree.tree_map(unwrapped, kwargs or {}))


SPOILT: dict[str, Callable[[Tensor], Tensor]] = {
    "short": lambda value: value[:-1].clone(),
    "one": lambda value: value[:1].clone(),
    "long": lambda value: torch.cat((value, value)),
    "empty": lambda value: value[:0].clone(),
    "elsewhere": lambda value: torch.empty_like(value, device="meta"),
    "half": lambda value: value.half(),
    "double": lambda value: value.double(),
    "integer": lambda value: value.long(),
    "subclass": lambda value: Wrapping(value.clone()),
    "strided": lambda value: torch.stack((value, torch.full_like(value, torch.nan)), -1)[..., 0],
}
"""What can happen to a tensor, by its kind."""


class Torch(TorchModule):
    """The project's PyTorch layers.

    What they refuse they refuse themselves, before PyTorch has to.

    Args:
        sync: Whether they share their statistics with the other processes of `torch.distributed`.
        fused: Whether one operator computes them, where it can.
        device: Where they run, "cpu" or "cuda".
    """

    precisions = tuple(PRECISIONS_OF["torch"])
    spoils = (*SPOILT, "missing", "shared")
    refusals = (ValueError, TypeError)

    def __init__(self, sync: bool = False, fused: bool = True, device: str = "cpu") -> None:
        names = ["torch", *(() if device == "cpu" else (device,)), *(() if fused else ("plain",))]
        super().__init__(".".join(names), self.make_rbn, NAMES["torch"], momentum="old", layers=LAYERS)
        self.sync = sync
        self.fused = fused
        self.device = device
        self.devices = 4 if device == "cpu" else 1

    def make_rbn(self, config: Config, dtype: torch.dtype) -> nn.Module:
        """RBN, IEBN or BNET."""
        options = arguments("torch", config)
        own = {"sync": self.sync, "fused": self.fused, "dtype": dtype}
        return getattr(layers, config.layer)(config.num_features, **options, **own)

    def load(self, state: State) -> None:
        """Fill the module as users do."""
        from_numpy(self.layer, state)

    def build(self, config: Config, state: State, dtype: str, layout: str = "channels_first") -> None:
        """Make the module, with nothing spoilt."""
        self.is_spoilt = False
        super().build(config, state, dtype, layout)

    def spoil(self, name: str, kind: str) -> None:
        """Assign another tensor, or none."""
        super().spoil(name, kind)
        self.is_spoilt = True

    def state(self) -> State:
        """The module's state as users get it."""
        return super().state() if self.is_spoilt else to_numpy(self.layer)

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
    tensor = (tensor.inner if isinstance(tensor, Wrapping) else tensor).detach().cpu()
    return tensor.float().numpy().astype("bfloat16") if tensor.dtype == torch.bfloat16 else tensor.numpy()

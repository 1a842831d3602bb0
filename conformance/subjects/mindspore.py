"""The MindSpore layers as a subject of the suite."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

os.environ.setdefault("GLOG_v", "4")  # MindSpore's warnings would break the printed matrix

import mindspore as ms
import ml_dtypes
import numpy as np
from mindspore import Parameter, Tensor, amp, nn, ops
from mindspore.communication import get_rank, init

from rbn.backends.mindspore import from_numpy, layers, to_numpy
from rbn.backends.mindspore.internals import end_gradient
from rbn.backends.mindspore.weights import stored
from rbn.conformance.cases import LAYERS, PRECISIONS_OF, SHARED_SPOILS, SHARED_WITH
from rbn.conformance.shares import Devices, processes, start
from rbn.conformance.subject import Array, LayerSubject, Outcome, Subject
from rbn_core.config import Config, arguments
from rbn_core.matching import State
from rbn_core.names import NAMES, PARAMETERS

# MindSpore gives NumPy a "bfloat16" of its own, which knows no arithmetic: the name is the suite's again.
np.sctypeDict["bfloat16"] = ml_dtypes.bfloat16

# On the cases' small arrays MindSpore's threads wait for each other, three times as long as one computes.
ms.set_context(runtime_num_threads=1)


class MindSporeCell(LayerSubject):
    """Any MindSpore cell that follows `set_train`; `make` gets the dtype of the parameters as MindSpore's.

    In mixed precision the cell is cast, entered with half precision, and its loss is in float32.
    """

    precision = ""

    def build(self, config: Config, state: State, dtype: str, layout: str = "channels_first") -> None:
        """Make the cell, with parameters in at least float32."""
        self.layout = layout
        self.compiled = False
        self.layer: nn.Cell = self.make_layer(config, ms.float64 if dtype == "float64" else ms.float32)
        self.load(state)
        self.entry = self.layer
        if self.precision:
            self.folder = tempfile.TemporaryDirectory()  # level O1 writes code, which a graph reads
            with contextlib.chdir(self.folder.name):
                self.entry = cast(self.layer, self.precision.removesuffix(".graph"))

    def load(self, state: State) -> None:
        """Fill the cell."""
        parameters = self.stored()
        for name, value in self.own(state, {name: p.asnumpy() for name, p in parameters.items()}).items():
            parameters[name].set_data(Tensor(value, parameters[name].dtype))

    def stored(self) -> dict[str, ms.Parameter]:
        """Everything the cell stores, under its own names."""
        return dict(self.layer.parameters_and_names())

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        """Forward and backward through MindSpore's functional gradient."""
        try:
            through_loss = self.precision or self.compiled
            return (self.run_loss if through_loss else self.run_vjp)(x, training, cotangent)
        except Exception:
            # Else the next case's graph would be compiled as the gradient of a gradient.
            end_gradient()
            raise

    def run_vjp(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        """Forward and backward through the cell as it was made, in PyNative mode."""
        self.layer.set_train(training)
        leaf = tensor(x, self.layout)
        learned = {self.names[name] for name in PARAMETERS if name in self.names}
        weights = {name: weight for name, weight in self.stored().items() if name in learned}
        y, vjp = ops.vjp(self.layer, leaf, weights=list(weights.values()) or None)
        gradients: Any
        # Without weights the input's gradient is not one of a pair.
        pulled = vjp(tensor(cotangent, "channels_last" if self.layout == "channels_last" else ""))
        (dx,), gradients = pulled if weights else (pulled, ())
        named = self.canonical({name: g.asnumpy() for name, g in zip(weights, gradients, strict=True)})
        y, dx, leaf = (array(value, self.layout) for value in (y, dx, leaf))
        return Outcome(y, dx, named, self.state(), leaf)

    def run_loss(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        """Forward and backward through a loss, in which the cell may be cast, in either mode."""
        self.entry.set_train(training)
        leaf, dy = tensor(x, self.layout), Tensor(cotangent.astype("float32"))
        learned = {self.names[name] for name in PARAMETERS if name in self.names}
        weights = {name: weight for name, weight in self.stored().items() if name in learned}

        def loss(x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.entry(x)
            return (y.astype(ms.float32) * dy).sum(), y

        graph = self.compiled or self.precision.endswith(".graph")
        ms.set_context(mode=ms.GRAPH_MODE if graph else ms.PYNATIVE_MODE)
        try:
            step = ms.value_and_grad(loss, 0, list(weights.values()), has_aux=True)
            (_, y), (dx, gradients) = step(leaf)
        finally:
            ms.set_context(mode=ms.PYNATIVE_MODE)
        named = {name: array(g, "") for name, g in zip(weights, gradients, strict=True)}
        y, dx, leaf = (array(value, self.layout) for value in (y, dx, leaf))
        return Outcome(y, dx, self.canonical(named), self.state(), leaf)

    def under(self, precision: str) -> Self:
        """The same as MindSpore casts it."""
        other = copy.copy(self)
        other.precision = precision
        return other

    def spoil(self, name: str, kind: str) -> None:
        """Change a parameter's data or dtype, or assign another one or none."""
        *path, own = self.names[name].split(".")
        owner = functools.reduce(getattr, path, self.layer)
        parameter = getattr(owner, own)
        value = parameter.asnumpy().copy()
        stored = self.stored()
        dtypes = {"half": ms.float16, "double": ms.float64, "integer": ms.int32}
        lengths: dict[str, Callable[[], Array]] = {
            "short": lambda: value[:-1],
            "one": lambda: value[:1],
            "long": lambda: np.concatenate((value, value)),
            "empty": lambda: value[:0],
        }
        if kind == "missing":
            setattr(owner, own, None)
        elif kind in dtypes:
            parameter.set_dtype(dtypes[kind])
        elif kind in lengths:
            parameter.set_data(Tensor(np.ascontiguousarray(lengths[kind]())), slice_shape=True)
        elif kind in SHARED_SPOILS:
            self.compiled = kind == "shared_compiled"
            partners = (self.names.get(other) for other in SHARED_WITH[name])
            parameter.set_data(next(stored[partner] for partner in partners if partner in stored))
        else:
            strided = Tensor(np.repeat(value, 2, -1))[..., ::2]
            setattr(owner, own, Parameter(strided, parameter.name, parameter.requires_grad))

    def state(self) -> State:
        """The cell's state."""
        return self.canonical({name: parameter.asnumpy() for name, parameter in self.stored().items()})


def cast(cell: nn.Cell, way: str) -> nn.Cell:
    """A cell in mixed precision: itself cast, with a list of cells, or at one of MindSpore's levels."""
    if way == "to_float16":
        return cell.to_float(ms.float16)
    if way == "custom":
        return amp.custom_mixed_precision(cell, black_list=[nn.LayerNorm])
    return amp.auto_mixed_precision(cell, way)


class MindSpore(MindSporeCell):
    """The project's MindSpore layers, in PyNative mode; in mixed precision in graph mode, too.

    Args:
        sync: Whether they share their statistics with the other processes of msrun.
        fused: Whether one operator computes them, where it can.
    """

    devices = 2
    precisions = tuple(PRECISIONS_OF["mindspore"])
    spoils = (
        *("short", "one", "long", "empty", "missing", "half", "double", "integer"),
        *("shared", "shared_compiled", "strided"),
    )

    def __init__(self, sync: bool = False, fused: bool = True) -> None:
        super().__init__(
            "mindspore" if fused else "mindspore.plain",
            self.make_rbn,
            NAMES["mindspore"],
            momentum="old",
            layers=LAYERS,
            absent={"*/0x*": "MindSpore has no gradient of an empty batch; a test of its own evaluates one"},
        )
        self.sync = sync
        self.fused = fused

    def make_rbn(self, config: Config, dtype: Any) -> nn.Cell:
        """RBN, IEBN or BNET."""
        whole = replace(config, gamma=True, beta=True, track_running_stats=True)  # MindSpore's layers are
        own: dict[str, Any] = {
            "use_batch_statistics": None if config.track_running_stats else True,
            "data_format": "NHWC" if self.layout == "channels_last" else "NCHW",
            "dtype": dtype,
            "sync": self.sync,
            "fused": self.fused,
        }
        if config.layer != "BNET":
            own["affine"] = config.gamma or config.beta
        return getattr(layers, config.layer)(config.num_features, **arguments("mindspore", whole), **own)

    def under(self, precision: str) -> Self:
        """The same as MindSpore casts it."""
        other = super().under(precision)
        other.make = other.make_rbn
        return other

    def load(self, state: State) -> None:
        """Fill the cell as users do; gamma, beta and the statistics are always there."""
        from_numpy(self.layer, to_numpy(self.layer) | state)

    def stored(self) -> dict[str, ms.Parameter]:
        """What the case has of it."""
        mine = self.config.state_shapes()
        return {self.names[name]: value for name, value in stored(self.layer).items() if name in mine}

    def state(self) -> State:
        """The cell's state as users get it, as far as the case has it."""
        mine = self.config.state_shapes()
        return {name: value for name, value in to_numpy(self.layer).items() if name in mine}

    def spread(self, shares: tuple[int, ...]) -> Subject:
        """The layers on so many processes of msrun."""
        factory = "rbn.conformance.subjects.mindspore:device"
        return Devices(self.name, processes(factory, len(shares), launch), shares)


def plain() -> MindSpore:
    """The project's MindSpore layers in MindSpore's own operations."""
    return MindSpore(fused=False)


def launch(script: list[str], world: int, folder: Path) -> list[subprocess.Popen[bytes]]:
    """Start msrun, which runs the first `python` on the path."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    bin = Path(sys.executable).parent
    workers = [f"--worker_num={world}", f"--local_worker_num={world}", f"--master_port={port}"]
    command = [str(bin / "msrun"), *workers, f"--log_dir={folder}", "--join=True", *script]
    return [start(command, folder / "msrun.log", PATH=f"{bin}{os.pathsep}{os.environ['PATH']}")]


def device(world: int, folder: Path) -> tuple[int, Subject]:
    """The layers on one of several processes."""
    init()
    return get_rank(), MindSpore(sync=True)


def tensor(x: Array, layout: str) -> Tensor:
    """The array as a tensor in a layout; NumPy's bfloat16 goes through float32."""
    if layout == "channels_last":
        x = np.moveaxis(x, 1, -1)
    if x.dtype.name == "bfloat16":
        return Tensor(x.astype("float32"), ms.bfloat16)
    result = Tensor(np.ascontiguousarray(x))
    if layout == "strided":
        return ops.stack((result, result), -1).reshape((*x.shape[:-1], 2 * x.shape[-1]))[..., ::2]
    if layout == "expanded":
        return ops.broadcast_to(result[:1], x.shape)
    return result


def array(tensor: Tensor, layout: str) -> Array:
    """The tensor as an array of its own dtype, channels first."""
    if tensor.dtype == ms.bfloat16:
        result: Array = tensor.astype(ms.float32).asnumpy().astype("bfloat16")
    else:
        result = tensor.asnumpy()
    return np.moveaxis(result, -1, 1) if layout == "channels_last" else result

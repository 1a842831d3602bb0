"""What training recipes that look for BatchNorm do, for our layers and BatchNorm alike."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import jittor as jt
import numpy as np
from jittor import Module, Var, nn

from rbn.backends.jittor.layers import CalibratedNorm
from rbn.backends.jittor.surgery import is_frozen, stay_frozen
from rbn.backends.jittor.weights import assign, config_of, layers, to_numpy
from rbn_core import folding
from rbn_core.config import Config
from rbn_core.errors import RBNTypeError, RBNValueError
from rbn_core.matching import COUNTER, Row, Table

NORMS = (nn.BatchNorm, CalibratedNorm)
LINEAR = (nn.Conv, nn.Conv1d, nn.Conv3d, nn.Linear)


def update_rbn(model: Module, batches: Iterable[Any]) -> None:
    """Take the running statistics anew, in place, as the plain mean over batches: for averaged weights.

    Modes and momentum are afterwards what they were. Of a layer that is called several times in a batch all
    calls count, but of BatchNorm the last. Frozen layers keep their statistics.

    Args:
        model: A model with RBN, IEBN, BNET or BatchNorm layers.
        batches: What the model is called with; of a tuple or list the first.

    Raises:
        RBNValueError: There is no batch, or no such layer. After this and any error of the model or of the
            batches the statistics are what they were, too.

    Example:
        >>> from rbn.backends.jittor import RBN, update_rbn
        >>> import jittor as jt
        >>> layer, x = RBN(3), jt.ones((2, 3, 4, 4))
        >>> update_rbn(layer, [x, 3 * x])
        >>> layer.running_mean.tolist()
        [2.0, 2.0, 2.0]
    """
    norms = [norm for norm in _norms(model, "update_rbn").values() if not is_frozen(norm)]
    modes = [(module, module.is_training()) for module in model.modules()]
    momenta = [(norm, norm.momentum) for norm in norms]
    names = ("running_mean", "running_var", COUNTER)
    stored = [getattr(norm, name, None) for norm in norms for name in names]
    before = [(var, var.numpy().copy()) for var in stored if isinstance(var, Var)]
    total: list[list[Any]] = [[0.0, 0.0] for _ in norms]
    count = 0
    try:
        for module, _ in modes:
            module.is_train = True
        for norm in norms:
            norm.momentum = None if isinstance(norm, CalibratedNorm) else 1.0
        with jt.no_grad():
            for batch in batches:
                for norm in norms:
                    if isinstance(norm, CalibratedNorm):
                        assign(norm.num_batches_tracked, np.zeros(1, np.int32))
                model(batch[0] if isinstance(batch, tuple | list) else batch)
                for sums, norm in zip(total, norms, strict=True):
                    sums[0] = sums[0] + norm.running_mean.numpy().astype(np.float64)
                    sums[1] = sums[1] + norm.running_var.numpy().astype(np.float64)
                count += 1
    except BaseException:
        for var, value in before:
            assign(var, value)
        raise
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum
        for module, mode in modes:
            module.is_train = mode
    if not count or not norms:
        raise RBNValueError(
            f"update_rbn: expected batches and layers that can train, got {count} batches and {len(norms)} "
            "layers. Pass both."
        )
    for (mean, var), norm in zip(total, norms, strict=True):
        assign(norm.running_mean, mean / count)
        assign(norm.running_var, var / count)
        if isinstance(getattr(norm, COUNTER, None), Var):
            assign(norm.num_batches_tracked, np.array([count], np.int32))


def freeze(model: Module) -> Table:
    """Let the normalizations of a model evaluate even in training and keep their parameters, in place.

    Whatever `train()` sets, they take their running statistics. Their parameters get no gradient, also after
    `model.eval()` and `model.train()`, which would give it back. Freeze before an optimizer is built.

    Args:
        model: A model with RBN, IEBN, BNET or BatchNorm layers.

    Returns:
        A row for each layer.

    Raises:
        RBNValueError: There is no such layer.
    """
    norms = _norms(model, "freeze")
    modules = model.modules()
    for norm in norms.values():
        stay_frozen(norm, modules)
    return Table(tuple(Row(name, "frozen", type(norm).__name__) for name, norm in norms.items()))


def parameter_groups(model: Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for Jittor's optimizers: kernels decay, and what else is learned does not.

    Kernels are the `weight` of convolutions, linear layers and the like. Biases and every parameter of a
    normalization do not decay: gamma and beta, w_m, w_v and w_b, and BNET's convolution. The running
    statistics, which `parameters()` has, too, are in neither group.

    Args:
        model: Any model.
        weight_decay: That of the first group.

    Returns:
        Groups for `jt.optim.SGD(groups, lr)` and its like.
    """
    normalizing = (*NORMS, nn.InstanceNorm, nn.LayerNorm, nn.GroupNorm)
    still = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, normalizing)
        for parameter in module.parameters()
    }
    named = [(name, each) for name, each in model.named_parameters() if not each.is_stop_grad()]
    decays = {name: name.rpartition(".")[2] != "bias" and id(each) not in still for name, each in named}
    return [
        {"params": [each for name, each in named if decays[name] == decay], "weight_decay": rate}
        for decay, rate in ((True, weight_decay), (False, 0.0))
    ]


def fold(model: Module, x: Var) -> tuple[Module, Table]:
    """A model for evaluation with normalizations folded into the convolution or linear layer before them.

    The weight is multiplied by a, and its bias becomes a bias + b, with a = gamma / sqrt(Var + eps) and
    b = beta - a E. A layer can be folded where it is BatchNorm in evaluation: where w_m = 0 and w_v = 0, or
    the calibration is off, and where BNET's kernels are 0 beside their centres.

    Args:
        model: A model; not changed.
        x: What it is called with, best a small batch of images or noise: the model is run once, and once more
            for each layer, to see what follows what and what else takes that.

    Returns:
        Another model, in evaluation, and a row for each layer: "folded", or "kept" with the reason.

    Raises:
        RBNValueError: A layer is calibrated; all are named. Or there is none.
    """
    _norms(model, "fold")
    new = deepcopy(model)
    new.eval()
    seen = _Seen(new, x)
    rows, wrong = [], []
    for name, norm in _norms(new, "fold").items():
        affine = folding.plain_affine(_config(norm), to_numpy(norm))
        why = seen.why_not(norm)
        if isinstance(affine, str):
            wrong.append(name)
        elif why:
            rows.append(Row(name, "kept", type(norm).__name__, why))
        else:
            rows.append(Row(name, "folded", type(norm).__name__))
            _fold(new, seen.before[id(norm)], norm, *affine)
    if wrong:
        raise RBNValueError(
            f"fold: expected layers that are BatchNorm in evaluation, got {len(wrong)} that are not: "
            f"{', '.join(wrong)}. Their w_m, w_v or kernel is not 0: keep them as they are."
        )
    return new, Table(tuple(rows))


def _fold(model: Module, before: Any, norm: Any, a: Any, b: Any) -> None:
    weight = before.weight.numpy().astype(np.float64)
    assign(before.weight, weight * a.reshape(-1, *(1,) * (weight.ndim - 1)))
    if isinstance(before.bias, Var):
        assign(before.bias, before.bias.numpy() * a + b)
    else:
        before.bias = jt.array(b.astype(np.float32)).cast(before.weight.dtype)
    for module in model.modules():
        for place in (vars(module), vars(module).get("layers")):  # the latter is a Sequential's
            if isinstance(place, dict):
                place |= {name: nn.Identity() for name, value in place.items() if value is norm}


class _Seen:
    """Which layer each normalization of a model follows, and what else takes the output of that.

    Attributes:
        before: By the identity of a normalization the layer before it.
    """

    def __init__(self, model: Module, x: Var) -> None:
        self.before: dict[int, Any] = {}
        self._calls: dict[int, int] = {}
        self._outputs: dict[int, tuple[Var, Any]] = {}
        self._results: dict[int, Var] = {}
        self._changed: int | None = None
        kinds: list[tuple[Any, Any]] = [
            (module, type(module)) for _, module in layers(model) if isinstance(module, (*NORMS, *LINEAR))
        ]
        try:
            for module, kind in kinds:
                module.__class__ = self._telling(kind)
            with jt.no_grad():
                due = model(x)
                sources = {id(source) for source in self.before.values()}
                self._elsewhere = {each for each in sources if self._differs(model, x, each, due)}
        finally:
            for module, kind in kinds:
                module.__class__ = kind

    def why_not(self, norm: Any) -> str:
        """Why a normalization cannot be folded into what is before it; empty where it can."""
        source = self.before.get(id(norm))
        if source is None:
            return "no convolution or linear layer before it"
        if max(self._calls[id(norm)], self._calls[id(source)]) > 1:
            return "called more than once"
        others = [each for each in self.before.values() if each is source]
        return "its input is used elsewhere, too" if len(others) > 1 or id(source) in self._elsewhere else ""

    def _differs(self, model: Module, x: Var, source: int, due: Var) -> bool:
        """Whether what a layer gives matters to more than the normalizations behind it, which keep theirs."""
        self._changed = source
        return not np.array_equal(model(x).numpy(), due.numpy(), equal_nan=True)

    def _telling(self, kind: Any) -> Any:
        def execute(layer: Any, x: Var) -> Var:
            return self._called(layer, x, kind.execute(layer, x), issubclass(kind, NORMS))

        return type(kind.__name__, (kind,), {"execute": execute})

    def _called(self, layer: Any, x: Var, y: Var, is_norm: bool) -> Var:
        if self._changed is not None:
            if is_norm and id(self.before.get(id(layer))) == self._changed:
                return self._results[id(layer)]
            return 1 - y if id(layer) == self._changed else y
        self._results[id(layer)] = y
        self._calls[id(layer)] = self._calls.get(id(layer), 0) + 1
        if not is_norm:
            self._outputs[id(y)] = (y, layer)  # kept, so that no other has its identity
        elif id(x) in self._outputs:
            self.before[id(layer)] = self._outputs[id(x)][1]
        return y


def _config(norm: Any) -> Config:
    if isinstance(norm, CalibratedNorm):
        return config_of(norm)
    affine: dict[str, Any] = {"gamma": norm.affine, "beta": norm.affine}
    return Config(norm.num_features, norm.eps, 1 - norm.momentum, centering=None, scaling=None, **affine)


def _norms(model: Module, who: str) -> dict[str, Any]:
    """The normalizations by their first paths.

    Raises:
        RBNTypeError: This is no model.
        RBNValueError: There are none.
    """
    if not isinstance(model, Module):
        raise RBNTypeError(f"{who}: expected a Jittor module, got {type(model).__name__}. Pass the model.")
    found: dict[int, tuple[str, Any]] = {}
    for path, module in layers(model):
        if isinstance(module, NORMS):
            found.setdefault(id(module), (path, module))
    if not found:
        raise RBNValueError(
            f"{who}: expected RBN, IEBN, BNET or BatchNorm layers, got none. Check the model."
        )
    return dict(found.values())

"""What training recipes that look for BatchNorm do, for our NNX layers and BatchNorm alike."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rbn.backends.flax import functional, uses
from rbn.backends.flax.nnx.layers import CalibratedNorm, assign, config_of
from rbn.backends.flax.nnx.surgery import is_frozen, put, stay_frozen
from rbn.backends.flax.nnx.weights import modules, to_numpy
from rbn_core import folding
from rbn_core.errors import RBNTypeError, RBNValueError
from rbn_core.matching import Row, Table

NORMS = (nnx.BatchNorm, CalibratedNorm)
MODES = ("use_running_average", "deterministic")
"""What `train()` and `eval()` set."""


def update_rbn(model: nnx.Module, batches: Iterable[Any], **call: Any) -> None:
    """Take the running statistics anew, in place, as the plain mean over batches: for averaged weights.

    Modes and momentum are afterwards what they were. Of a layer that is called several times in a batch all
    calls count, but of BatchNorm the last. Frozen layers keep their statistics.

    Args:
        model: A model with RBN, IEBN, BNET or BatchNorm layers.
        batches: What the model is called with; of a tuple or list the first.
        call: What it is called with besides.

    Raises:
        RBNValueError: There is no batch, or no such layer. After this and any error of the model or of the
            batches the statistics are what they were, too.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from rbn.backends.flax.nnx import RBN, update_rbn
        >>> layer, x = RBN(3, rngs=nnx.Rngs(0)), jnp.ones((2, 4, 4, 3))
        >>> update_rbn(layer, [x, 3 * x])
        >>> layer.mean[...].tolist()
        [2.0, 2.0, 2.0]
    """
    norms = {name: norm for name, norm in _norms(model, "update_rbn").items() if not is_frozen(norm)}
    kept = [
        (module, name, getattr(module, name))
        for _, module in modules(model)
        for name in (*MODES, "momentum")
        if hasattr(module, name) and (name != "momentum" or isinstance(module, NORMS))
    ]
    before = [
        (variable, variable[...])
        for norm in norms.values()
        for variable in (norm.mean, norm.var, getattr(norm, "num_batches_tracked", None))
        if variable is not None
    ]
    total: dict[str, Any] = {}
    count = 0
    try:
        model.train()
        for norm in norms.values():
            norm.momentum = None if isinstance(norm, CalibratedNorm) else 0.0
        for batch in batches:
            for norm in norms.values():
                if getattr(norm, "num_batches_tracked", None) is not None:
                    assign(norm.num_batches_tracked, jnp.zeros((), jnp.int32))
            model(batch[0] if isinstance(batch, tuple | list) else batch, **call)
            for name, norm in norms.items():
                for own in ("mean", "var"):
                    key = f"{name}/{own}"
                    total[key] = total.get(key, 0.0) + np.asarray(getattr(norm, own)[...], np.float64)
            count += 1
    except BaseException:
        for variable, value in before:
            assign(variable, value)
        raise
    finally:
        for module, name, value in kept:
            setattr(module, name, value)
    if not count or not norms:
        raise RBNValueError(
            f"update_rbn: expected batches and layers that can train, got {count} batches and {len(norms)} "
            "layers. Pass both."
        )
    for name, norm in norms.items():
        for own in ("mean", "var"):
            variable = getattr(norm, own)
            assign(variable, jnp.asarray(total[f"{name}/{own}"] / count, variable[...].dtype))
        if getattr(norm, "num_batches_tracked", None) is not None:
            assign(norm.num_batches_tracked, jnp.asarray(count, jnp.int32))


def freeze(model: nnx.Module) -> Table:
    """Let the normalizations of a model evaluate even in training and keep their parameters, in place.

    Whatever `train()` or a call says, they take their running statistics, and their parameters become
    `FrozenParam`, which `nnx.grad` and `nnx.Optimizer` leave alone. Build the optimizer afterwards.

    Args:
        model: A model with RBN, IEBN, BNET or BatchNorm layers.

    Returns:
        A row for each layer.

    Raises:
        RBNValueError: There is no such layer.
    """
    norms = _norms(model, "freeze")
    for norm in norms.values():
        stay_frozen(norm)
    return Table(tuple(Row(name, "frozen", type(norm).__name__) for name, norm in norms.items()))


def parameter_groups(model: nnx.Module) -> Callable[[Any], Any]:
    """Which parameters of a model decay, as optax's masks: `optax.adamw(rate, mask=parameter_groups(model))`.

    All do but biases (`bias`), scales (`scale`) and every parameter of an RBN, IEBN, BNET or BatchNorm: gamma
    and beta, w_m, w_v and w_b, and BNET's convolution.

    Args:
        model: Any model.

    Returns:
        A function of a state like `nnx.state(model, nnx.Param)` to truth values in one like it, which optax
        calls. They are labels, too:
        `optax.multi_transform({True: decaying, False: other}, parameter_groups(model))`.
    """
    norms = [path for path, module in modules(model) if isinstance(module, NORMS)]

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        names = tuple(key.key for key in path if hasattr(key, "key"))  # a variable adds a key of its own
        return names[-1] not in ("bias", "scale") and not any(names[: len(norm)] == norm for norm in norms)

    return functools.partial(jax.tree_util.tree_map_with_path, decays)


def fold(model: nnx.Module, *args: Any, **kwargs: Any) -> tuple[nnx.Module, Table]:
    """A model for evaluation with normalizations folded into the `nnx.Conv` or `nnx.Linear` before them.

    The kernel is multiplied by a, and of the layer the addition of b is left, with
    a = gamma / sqrt(Var + eps) and b = beta - a E. A layer can be folded where it is BatchNorm in evaluation:
    as in `rbn.backends.flax.fold`.

    Args:
        model: A model; not changed.
        args: What it is called with in evaluation, such as a batch; it is traced and not run.
        kwargs: The same.

    Returns:
        Another model, in evaluation, and a row for each layer: "folded", or "kept" with the reason.

    Raises:
        RBNValueError: A layer is calibrated, or there is none.
    """
    _norms(model, "fold")
    new = nnx.clone(model)
    new.eval()
    found = uses.Uses()
    paths: dict[int, str] = {}
    kinds: dict[int, tuple[Any, Any]] = {}
    stacks: dict[int, Any] = {}
    for path, module in modules(new):
        paths.setdefault(id(module), ".".join(map(str, path)))
        if isinstance(module, NORMS) and np.ndim(module.mean[...]) != 1:
            stacks.setdefault(id(module), module)
        elif isinstance(module, (nnx.Conv, nnx.Linear, *NORMS)):
            kinds.setdefault(id(module), (module, type(module)))
    inside = {
        id(norm.conv)
        for norm in (*stacks.values(), *(norm for norm, _ in kinds.values()))
        if hasattr(norm, "conv") and isinstance(norm, NORMS)
    }
    try:
        for key, (module, kind) in kinds.items():
            if key not in inside:
                module.__class__ = _telling(kind, found, key)
        # What is traced are other objects of these classes: NNX's transformations need the trace's own.
        graph, values = nnx.split(new)
        found.trace(lambda values: nnx.merge(graph, values)(*args, **kwargs), values)
    finally:
        for module, kind in kinds.values():
            module.__class__ = kind
    rows = [
        Row(paths[key], "kept", type(norm).__name__, "stands for several layers")
        for key, norm in stacks.items()
    ]
    wrong, planned = [], []
    for key in found.norms:
        name, norm = paths[key], kinds[key][0]
        affine = folding.plain_affine(config_of(norm), to_numpy(norm))
        why = found.why_not(key, functional.channel_axis(norm.axis))
        if isinstance(affine, str):
            wrong.append(name)
        elif why:
            rows.append(Row(name, "kept", type(norm).__name__, why))
        else:
            before = kinds[found.before[key]][0]
            planned.append((before, norm, affine, found.outputs[key].dtype))
            rows.append(Row(name, "folded", type(norm).__name__, f"into {paths[found.before[key]]}"))
    uses.check_inert(wrong, rows)
    for before, norm, (a, b), dtype in planned:
        for own in ("kernel", "bias"):
            variable = getattr(before, own, None)
            if variable is not None:
                assign(variable, jnp.asarray(variable[...] * a, variable[...].dtype))
        bias = AddBias(jnp.asarray(b, norm.mean[...].dtype), dtype)
        for path, module in list(modules(new)):
            if module is norm:
                put(new, path, bias)
    return new, Table(tuple(rows))


class AddBias(nnx.Module):
    """What is left of a normalization that is folded: x + b, b of shape (C,)."""

    def __init__(self, bias: Any, dtype: Any) -> None:
        self.bias = nnx.Param(bias)
        self.dtype = dtype

    def __call__(self, x: Any, use_running_average: bool | None = None, *, mask: Any = None) -> Any:
        """The sum; what else BatchNorm is told says nothing here."""
        return (x + self.bias[...]).astype(self.dtype)


def _telling(kind: Any, found: uses.Uses, key: int) -> Any:
    """The class of a layer that tells of its calls."""

    def call(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        follow: Callable[[], Any] = functools.partial(kind.__call__, self, x, *args, **kwargs)
        return found.norm(key, x, follow, self) if issubclass(kind, NORMS) else found.linear(key, follow)

    return type(kind.__name__, (kind,), {"__call__": call})


def _norms(model: nnx.Module, who: str) -> dict[str, Any]:
    """The normalizations by their first paths.

    Raises:
        RBNTypeError: This is no model.
        RBNValueError: There are none.
    """
    if not isinstance(model, nnx.Module):
        raise RBNTypeError(
            f"{who}: expected an NNX module, got {type(model).__name__}. Pass the model itself."
        )
    found: dict[int, tuple[str, Any]] = {}
    for path, module in modules(model):
        if isinstance(module, NORMS):
            found.setdefault(id(module), (".".join(map(str, path)), module))
    if not found:
        raise RBNValueError(
            f"{who}: expected RBN, IEBN, BNET or BatchNorm layers, got none. Check the model."
        )
    return dict(found.values())

"""What training recipes that look for BatchNorm do, for our linen layers and BatchNorm alike.

For NNX see `rbn.backends.flax.nnx.recipes`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import core, traverse_util

from rbn.backends.flax import functional, uses
from rbn.backends.flax.layers import CalibratedNorm
from rbn.backends.flax.surgery import below
from rbn.backends.flax.weights import Variables, config_of, flat, path_of
from rbn_core import folding
from rbn_core.errors import RBNTypeError, RBNValueError
from rbn_core.matching import Row, Table

NORMS = (nn.BatchNorm, CalibratedNorm)
Path = tuple[str, ...]


def update_rbn(
    model: nn.Module, variables: Mapping[str, Any], batches: Iterable[Any], **call: Any
) -> Variables:
    """Take the running statistics anew, as the plain mean over batches: for averaged weights, as SWA's.

    Args:
        model: A linen model with RBN, IEBN, BNET or BatchNorm layers.
        variables: Its variables; not changed.
        batches: What the model is called with; of a tuple or list the first.
        call: What training passes to `model.apply` besides, such as `train=True` or `rngs=`.

    Returns:
        The variables with new `mean` and `var`, and a counter of as many batches.

    Raises:
        RBNValueError: There is no batch, or no such layer that the call trains.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rbn.backends.flax import RBN, update_rbn
        >>> x = jnp.ones((2, 4, 4, 3))
        >>> variables = RBN().init(jax.random.key(0), x, use_running_average=True)
        >>> variables = update_rbn(RBN(), variables, [x, 3 * x], use_running_average=False)
        >>> variables["batch_stats"]["mean"].tolist()
        [2.0, 2.0, 2.0]
    """
    given = core.unfreeze(variables)
    trained: dict[Path, None] = {}
    counters = {
        own: np.shape(nn.unbox(leaf))  # of a stack of layers there are several
        for own, leaf in flat(given).items()
        if own.split("/")[-1] == "num_batches_tracked"
    }
    start = _with(given, {own: np.zeros(shape) for own, shape in counters.items()})

    @jax.jit
    def measured(x: Any) -> Any:
        with nn.intercept_methods(_answering(functools.partial(_anew, trained))):
            return model.apply(start, x, mutable=["batch_stats"], **call)[1]

    total: dict[str, Any] = {}
    count = 0
    for batch in batches:
        stats = flat(
            nn.unbox(core.unfreeze(measured(batch[0] if isinstance(batch, tuple | list) else batch)))
        )
        for path in trained:
            for name in ("mean", "var"):
                own = "/".join(("batch_stats", *path, name))
                total[own] = total.get(own, 0.0) + np.asarray(stats[own], np.float64)
        count += 1
    if not total:
        raise RBNValueError(
            "update_rbn: expected batches and a model that trains RBN, IEBN, BNET or BatchNorm layers, "
            f"got {count} batches and none. Pass what training passes, such as train=True."
        )
    new = {own: value / count for own, value in total.items()}
    new |= {
        own: np.full(shape, count)
        for own, shape in counters.items()
        if own.rpartition("/")[0] + "/mean" in new
    }
    return _with(given, new)


def _anew(trained: dict[Path, None], old: Any, args: Any, kwargs: Any) -> Any:
    """What answers for a layer that trains so that its statistics become the batch's."""
    if evaluates(old, args, kwargs):
        return old(*args, **kwargs)
    trained[path_of(old.scope)] = None
    momentum = None if isinstance(old, CalibratedNorm) else 0.0
    return old.clone(momentum=momentum, parent=old.scope, name=None)(*args, **kwargs)


class Frozen(nn.Module):
    """A linen model whose normalizations always evaluate; it is called as the model is.

    Attributes:
        evaluated: The model.
    """

    evaluated: nn.Module

    def setup(self) -> None:
        """Let the model's variables keep their names."""
        nn.share_scope(self, self.evaluated)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns."""
        with nn.intercept_methods(_answering(_evaluated)):
            return self.evaluated(*args, **kwargs)


def _evaluated(old: Any, args: Any, kwargs: Any) -> Any:
    """What a layer gives in evaluation, whatever it is told."""
    new = old.clone(use_running_average=True, parent=old.scope, name=None)
    kept = {name: value for name, value in kwargs.items() if name != "use_running_average"}
    return new(args[0] if args else kept.pop("x"), **kept)


def freeze(model: nn.Module, variables: Mapping[str, Any]) -> tuple[Frozen, Variables, Table]:
    """Let the normalizations of a linen model evaluate even in training, and tell which parameters stay.

    A linen layer has no mode and no parameters of its own. So this returns another model, whose layers
    evaluate whatever they are told, and labels, by which optax leaves their parameters alone.

    Args:
        model: A linen model with RBN, IEBN, BNET or BatchNorm layers.
        variables: Its variables.

    Returns:
        The model, the labels "trained" and "frozen" in a tree like `variables["params"]`, and a row for each
        layer. They are for `optax.multi_transform({"trained": tx, "frozen": optax.set_to_zero()}, labels)`.

    Raises:
        RBNValueError: There is no such layer.
    """
    paths = norm_paths(variables, "freeze")
    labels = {
        own.partition("/")[2]: "frozen" if _is_below(own, paths) else "trained"
        for own in flat(core.unfreeze(variables))
        if own.startswith("params/")
    }
    rows = tuple(Row(".".join(path), "frozen") for path in paths)
    return Frozen(model), traverse_util.unflatten_dict(labels, sep="/"), Table(rows)


def parameter_groups(variables: Mapping[str, Any]) -> Variables:
    """Which parameters of a linen model decay, as optax's masks: `optax.adamw(rate, mask=...)`.

    All do but biases (`bias`), scales (`scale`) and every parameter of a layer that has running statistics:
    gamma and beta, w_m, w_v and w_b, and BNET's convolution.

    Args:
        variables: All variables of the model: the statistics tell what a normalization is.

    Returns:
        A tree of truth values like `variables["params"]`. They are labels, too:
        `optax.multi_transform({True: decaying, False: other}, parameter_groups(variables))`.
    """
    paths = norm_paths(variables, None)
    mask = {
        own.partition("/")[2]: own.rpartition("/")[2] not in ("bias", "scale") and not _is_below(own, paths)
        for own in flat(core.unfreeze(variables))
        if own.startswith("params/")
    }
    return traverse_util.unflatten_dict(mask, sep="/")


class Folded(nn.Module):
    """A linen model for evaluation, of which some normalizations only add a bias; called as the model is.

    Attributes:
        unfolded: The model.
        folded: The paths of these, with the dtypes of their outputs.
    """

    unfolded: nn.Module
    folded: tuple[tuple[Path, str], ...]

    def setup(self) -> None:
        """Let the model's variables keep their names."""
        nn.share_scope(self, self.unfolded)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns."""
        depth, dtypes = len(path_of(self.scope)), dict(self.folded)

        def answer(following: Any, args: Any, kwargs: Any, context: Any) -> Any:
            dtype = dtypes.get(path_of(context.module.scope)[depth:]) if _is_call(context) else None
            if dtype is None:
                return following(*args, **kwargs)
            bias = context.module.scope.get_variable("params", "bias")
            return (args[0] + bias).astype(dtype)

        with nn.intercept_methods(answer):
            return self.unfolded(*args, **kwargs)


def fold(
    model: nn.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any
) -> tuple[nn.Module, Variables, Table]:
    """A linen model for evaluation with normalizations folded into the `nn.Conv` or `nn.Dense` before them.

    The kernel is multiplied by a, and of the layer the addition of b is left, with
    a = gamma / sqrt(Var + eps) and b = beta - a E. A layer can be folded where it is BatchNorm in evaluation:
    where w_m = 0 and w_v = 0, or the calibration is off, and where BNET's kernels are 0 beside their centres.
    If one is not, that is an error, which names all that are not.

    Args:
        model: A linen model.
        variables: Its variables; not changed.
        args: What it is called with in evaluation, such as a batch; it is traced and not run.
        kwargs: The same, such as `train=False`.

    Returns:
        The model, its variables, and a row for each layer: "folded", or "kept" with the reason, where no
        convolution is before it.

    Raises:
        RBNValueError: A layer is calibrated, is called in training, or there is none.
    """
    given = core.unfreeze(variables)
    stored = flat(nn.unbox(given))
    found = uses.Uses()

    def note(following: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, (nn.Conv, nn.Dense, *NORMS)):
            return following(*args, **kwargs)
        is_norm = isinstance(module, NORMS)
        if is_norm and not evaluates(module, args, kwargs):
            raise RBNValueError("fold: expected a call in evaluation, got one in training. Pass train=False.")
        call = functools.partial(following, *args, **kwargs)
        if not is_norm:
            return found.linear(path_of(module.scope), call)
        return found.norm(path_of(module.scope), args[0], call, module)

    def run(values: Any) -> Any:
        with nn.intercept_methods(note):
            return model.apply(values, *args, **kwargs)

    found.trace(run, given)
    rows, wrong, folded = [], [], []
    for path, norm in found.norms.items():
        state, name = below(stored, path), ".".join(path)
        if np.ndim(state["running_mean"]) != 1:
            rows.append(Row(name, "kept", type(norm).__name__, "stands for several layers"))
            continue
        affine = folding.plain_affine(config_of(norm, len(state["running_mean"])), state)
        if isinstance(affine, str):
            wrong.append(name)
        elif why := found.why_not(path, functional.channel_axis(norm.axis)):
            rows.append(Row(name, "kept", type(norm).__name__, why))
        else:
            before = found.before[path]
            for own in ("kernel", "bias"):
                place = "/".join(("params", *before, own))
                if place in stored:
                    stored[place] = jnp.asarray(stored[place] * affine[0], stored[place].dtype)
            dtype = next(
                leaf.dtype for own, leaf in stored.items() if own.startswith("/".join(("batch_stats", *path)))
            )
            for collection in ("params", "batch_stats"):
                prefix = "/".join((collection, *path)) + "/"
                stored = {own: leaf for own, leaf in stored.items() if not own.startswith(prefix)}
            stored["/".join(("params", *path, "bias"))] = jnp.asarray(affine[1], dtype)
            folded.append((path, found.outputs[path].dtype.name))
            rows.append(Row(name, "folded", type(norm).__name__, f"into {'.'.join(before)}"))
    uses.check_inert(wrong, rows)
    return Folded(model, tuple(folded)), traverse_util.unflatten_dict(stored, sep="/"), Table(tuple(rows))


def evaluates(norm: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a normalization is called with its running statistics."""
    told = args[1] if len(args) > 1 else kwargs.get("use_running_average")
    return bool(norm.use_running_average if told is None else told)


def norm_paths(variables: Mapping[str, Any], who: str | None) -> tuple[Path, ...]:
    """Where there are running statistics.

    Args:
        variables: All that a model stores.
        who: Who cannot do without any; `None` if that is no error.

    Raises:
        RBNTypeError: These are no variables.
        RBNValueError: There are none.
    """
    if not isinstance(variables, Mapping) or "params" not in variables:
        got = list(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise RBNTypeError(
            f"RBN: expected all variables of a linen model, with params and batch_stats, got {got}. "
            "Pass what init returned."
        )
    names = [own.split("/") for own in flat(core.unfreeze(variables))]
    found = tuple(tuple(path) for first, *path, last in names if (first, last) == ("batch_stats", "mean"))
    if who and not found:
        raise RBNValueError(
            f"{who}: expected RBN, IEBN, BNET or BatchNorm layers, got none. Check the model."
        )
    return found


def _answering(answer: Callable[[Any, Any, Any], Any]) -> Any:
    """An interceptor that answers for each normalization, once: also where a `Converted` answers, too."""
    answered: list[Path] = []

    def intercept(following: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if not _is_call(context) or path_of(context.module.scope) in answered:
            return following(*args, **kwargs)
        answered.append(path_of(context.module.scope))
        try:
            return answer(context.module, args, kwargs)
        finally:
            answered.pop()

    return intercept


def _is_call(context: Any) -> bool:
    return context.method_name == "__call__" and isinstance(context.module, NORMS)


def _is_below(own: str, paths: tuple[Path, ...]) -> bool:
    parts = tuple(own.split("/")[1:])
    return any(parts[: len(path)] == path for path in paths)


def _with(variables: Variables, new: Mapping[str, Any]) -> Variables:
    """Variables with other values, in their boxes and dtypes."""
    leaves = flat(variables)
    for own, value in new.items():
        old = leaves[own]
        array = jnp.asarray(value, nn.unbox(old).dtype)
        leaves[own] = old.replace_boxed(array) if isinstance(old, nn.meta.AxisMetadata) else array
    return traverse_util.unflatten_dict(leaves, sep="/")

"""What training recipes that look for BatchNorm do, for our layers and BatchNorm alike."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn
from numpy.typing import NDArray

from rbn.backends.mindspore.layers import CalibratedNorm
from rbn.backends.mindspore.networks import LAYERS, Network
from rbn.backends.mindspore.surgery import exchange
from rbn.backends.mindspore.weights import (
    BATCH_NORMS,
    KINDS,
    MINT_BATCH_NORMS,
    config_of,
    from_numpy,
    layers,
    to_numpy,
)
from rbn_core import folding
from rbn_core.config import Config
from rbn_core.errors import RBNTypeError, RBNValueError
from rbn_core.matching import Row, Table
from rbn_core.names import RUNNING_STATISTICS

FOLDED_INTO = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Dense)
"""What a norm layer can be folded into."""

NORMS = (*LAYERS.values(), *BATCH_NORMS)
"""What can be folded."""

Affine = tuple[NDArray[Any], NDArray[Any]]
"""a and b of a X + b, (C,) each."""

LISTED = 6
"""How many layers an error names."""


def update_rbn(model: nn.Cell, batches: Iterable[Any]) -> None:
    """Take the running statistics of RBN, IEBN, BNET and BatchNorm anew, as a plain mean over batches.

    For weights that were averaged or changed after training. The model runs in training mode and in PyNative
    mode, without gradients; momentum and modes are then what they were. A layer that `freeze` froze stays as
    it is.

        update_rbn(model, [mindspore.ops.randn(8, 3, 32, 32) for _ in range(4)])

    Args:
        model: Any cell.
        batches: What the model takes, one batch after another; of a tuple or list, such as one of images and
            labels, the first element.

    Raises:
        RBNValueError: No layer takes statistics, there is no batch, or a layer did not run. After this and
            any error of the model or of the batches the statistics are what they were, too.
        RBNTypeError: The model has a BatchNorm of `mint.nn`.
    """
    own = {
        id(layer): (path, layer) for path, layer in _norms(model, "update_rbn") if _takes_statistics(layer)
    }
    if not own:
        raise RBNValueError(
            "update_rbn: expected a model with RBN, IEBN, BNET or BatchNorm that takes statistics in "
            f"training, got none in a {type(model).__name__}. Frozen layers, and a BatchNorm with "
            "momentum=1.0, take none."
        )
    first = list(itertools.islice(iterator := iter(batches), 1))
    if not first:
        raise RBNValueError(
            "update_rbn: expected one batch or more, got none. Pass a list or a new iterator; an iterator "
            "gives its batches once."
        )
    takers = {key: _Taker(layer) for key, (_, layer) in own.items()}
    cells = list(model.cells_and_names())
    modes = [(cell, cell.training) for _, cell in cells]
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    taken = False
    try:
        model.set_train()
        for batch in itertools.chain(first, iterator):
            model(batch[0] if isinstance(batch, tuple | list) else batch)
        silent = [path or "the model itself" for key, (path, _) in own.items() if not takers[key].times]
        if silent:
            raise RBNValueError(
                f"update_rbn: expected every layer to run, got no run of {_listed(silent)}. Pass the part of "
                "the model that runs, without mindspore.jit."
            )
        taken = True
    finally:
        for taker in takers.values():
            taker.end(taken)
        for cell, training in modes:  # a cell comes before those inside it, which have the last word
            cell.set_train(training)
        ms.set_context(mode=mode)


class _Taker:
    """Takes the statistics of every call of a layer, and their mean in the end."""

    def __init__(self, layer: nn.Cell) -> None:
        self.layer = layer
        self.before = {name: value for name, value in to_numpy(layer).items() if name in RUNNING_STATISTICS}
        self.sums = {name: np.zeros(self.before[name].shape) for name in ("running_mean", "running_var")}
        self.times = 0
        self.momentum = layer.momentum if isinstance(layer, CalibratedNorm) else None
        self.weight = 1.0 if isinstance(layer, CalibratedNorm) else _inner(layer).momentum
        self.handles = [
            layer.register_forward_pre_hook(self._clear),
            layer.register_forward_hook(self._add),
        ]
        if isinstance(layer, CalibratedNorm):
            layer.momentum = None  # the first batch counts fully then

    def _clear(self, cell: nn.Cell, inputs: Any) -> None:
        """Let a call add its statistics to zeros."""
        from_numpy(
            self.layer, {name: np.zeros_like(value) for name, value in self.before.items()}, strict=False
        )

    def _add(self, cell: nn.Cell, inputs: Any, output: Any) -> None:
        """Take what a call has added."""
        found = to_numpy(self.layer)
        for name, total in self.sums.items():
            total += found[name].astype(np.float64) / self.weight
        self.times += 1

    def end(self, taken: bool) -> None:
        """Leave the layer as it was, but for its statistics where they were taken."""
        for handle in self.handles:
            handle.remove()
        if isinstance(self.layer, CalibratedNorm):
            self.layer.momentum = self.momentum
        values = dict(self.before)
        if taken:
            values |= {name: total / self.times for name, total in self.sums.items()}
            values |= {
                name: np.array(self.times, value.dtype) for name, value in values.items() if not value.ndim
            }
        from_numpy(self.layer, values, strict=False)


def freeze(model: nn.Cell) -> Table:
    """Let RBN, IEBN, BNET and BatchNorm evaluate from now on, also in training, with parameters that stay.

    Sets `use_batch_statistics=False`, which `set_train` leaves alone, and `requires_grad=False`. Graphs that
    this process has compiled are dropped. Build the optimizer afterwards.

        print(freeze(model))

    Args:
        model: Any cell.

    Returns:
        A row for each layer, "frozen".

    Raises:
        RBNValueError: The model has no such layer.
        RBNTypeError: The model has a BatchNorm of `mint.nn`, which has no such option; nothing has changed.
    """
    norms = _norms(model, "freeze")
    if not norms:
        raise RBNValueError(
            "freeze: expected a model with RBN, IEBN, BNET or BatchNorm, got none in a "
            f"{type(model).__name__}. Pass the model that has them."
        )
    for _, layer in norms:
        _inner(layer).use_batch_statistics = False
        for parameter in layer.get_parameters():
            parameter.requires_grad = False
    ms.ms_memory_recycle()
    return Table(tuple(Row(path, "frozen", type(layer).__name__) for path, layer in norms))


def parameter_groups(model: nn.Cell, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters in groups for an optimizer: kernels decay, and biases and norm layers do not.

        optimizer = nn.Momentum(parameter_groups(model, 1e-4), learning_rate=0.1, momentum=0.9)

    Args:
        model: Any cell. What needs no gradient is left out.
        weight_decay: That of the first group.

    Returns:
        The group that decays: what has two axes or more, as kernels have. Then the one that does not: what
        has fewer, as biases have, and every parameter of a norm layer, BNET's convolution among them. An
        empty group, which MindSpore's optimizers refuse, is left out.
    """
    in_norms = {
        id(parameter)
        for _, cell in model.cells_and_names()
        if isinstance(cell, KINDS["norm"])
        for parameter in cell.get_parameters()
    }
    decaying: list[Parameter] = []
    others: list[Parameter] = []
    for parameter in model.trainable_params():
        (others if parameter.ndim < 2 or id(parameter) in in_norms else decaying).append(parameter)
    groups = ((decaying, weight_decay), (others, 0.0))
    return [{"params": group, "weight_decay": decay} for group, decay in groups if group]


def fold(model: nn.Cell, pairs: Sequence[tuple[str, str]] | None = None) -> nn.Cell:
    """A copy for evaluation, with norm layers folded into the convolution or linear layer before them.

        weight' = weight gamma' / sqrt(Var + eps)
        bias'   = beta + (bias - E) gamma' / sqrt(Var + eps)

    gamma' is gamma, times R(w_b) where there is a scaling calibration. RBN, IEBN and BNET are folded where
    they are plain BatchNorms in evaluation: with w_m = 0 and w_v = 0, and BNET with kernels that are 0 beside
    their centres. BatchNorm is folded, too. What was a norm layer is `nn.Identity` then.

        faster = fold(nn.SequentialCell(nn.Conv2d(3, 8, 3), RBN(8)))
        faster = fold(resnet, [("conv1", "bn1"), ("layer1.0.conv1", "layer1.0.bn1")])

    Args:
        model: Any cell.
        pairs: The dotted paths of each convolution or linear layer and of the norm layer that alone takes
            what it gives: MindSpore's cells do not tell what they do. Without them pairs are found where
            they are certain: neighbours in an `nn.SequentialCell`, which runs them one
            after another, and in a network of `rbn.backends.mindspore.network`. A model that also uses what
            is between two such neighbours needs `pairs`. A norm layer in no pair stays as it is.

    Returns:
        The copy, in evaluation. It gives what the model gives in evaluation, to rounding.

    Raises:
        RBNValueError: A calibration is at work, in a pair or not, and all such layers are listed; a pair does
            not fit; or there is none. The model never changes.
    """
    norms = _norms(model, "fold")
    plain = _plain_affines(norms)
    known = dict(layers(model))
    chosen = _found_pairs(model) if pairs is None else list(pairs)
    if not chosen:
        raise RBNValueError(
            f"fold: expected layers to fold, found no pair that is certain in a {type(model).__name__}. Name "
            "them: fold(model, [('conv1', 'bn1'), ...])."
        )
    for pair in chosen:
        _check_pair(pair, known, plain)
    for place in (0, 1):
        used = [id(known[pair[place]]) for pair in chosen]
        if len(set(used)) < len(used):
            raise RBNValueError(
                "fold: expected every layer in one pair, got one that is in several. A layer that runs more "
                "than once cannot be folded: leave it out."
            )
    folded = copy.deepcopy(model).set_train(False)
    copied = dict(layers(folded))
    for first, last in chosen:
        _fold_into(copied[first], *plain[id(known[last])])
        for _, cell in layers(folded):
            exchange(cell, copied[last], nn.Identity().set_train(False))
    return folded


def _found_pairs(model: nn.Cell) -> list[tuple[str, str]]:
    """Convolutions and linear layers whose result goes to one norm layer and nowhere else, for certain."""
    cells = list(layers(model))
    times: dict[int, int] = {}
    for _, cell in cells:
        times[id(cell)] = times.get(id(cell), 0) + 1
    known = dict(cells)
    paths: list[tuple[str, str]] = []
    for path, cell in cells:
        if type(cell) is nn.SequentialCell:
            names = [f"{path}.{name}" if path else name for name in cell._cells]
            paths += itertools.pairwise(names)
        elif type(cell) is Network:
            takers: dict[str, list[str]] = {}
            for node in cell.description.nodes:
                for name in node.inputs:
                    takers.setdefault(name, []).append(node.name)
            start = f"{path}." if path else ""
            paths += [(start + name, start + taken[0]) for name, taken in takers.items() if len(taken) == 1]
    return [
        (first, last)
        for first, last in paths
        if type(known.get(first)) in FOLDED_INTO
        and type(known.get(last)) in NORMS
        and times[id(known[first])] == times[id(known[last])] == 1
        and not _has_more(known[first])
    ]


def _check_pair(pair: tuple[str, str], known: dict[str, nn.Cell], plain: dict[int, Affine]) -> None:
    """Refuse what cannot be folded.

    Raises:
        RBNValueError: A path is unknown, or a layer is none of those.
    """
    first, last = pair
    for path in pair:
        if path not in known:
            raise RBNValueError(
                f"fold: expected dotted paths of cells of the model, got {path!r}. "
                "See model.cells_and_names()."
            )
    before, norm = known[first], known[last]
    if type(before) not in FOLDED_INTO or _has_more(before) or type(norm) not in NORMS:
        raise RBNValueError(
            f"fold: expected a convolution or linear layer without an activation, and a norm layer, got "
            f"{first!r}, a {type(before).__name__}, and {last!r}, a {type(norm).__name__}. "
            "Leave the pair out."
        )
    channels = len(plain[id(norm)][0])
    if before.weight.shape[0] != channels:
        raise RBNValueError(
            f"fold: expected a norm layer of {before.weight.shape[0]} channels behind {first!r}, got "
            f"{last!r} of {channels}. Leave the pair out."
        )


def _has_more(cell: nn.Cell) -> bool:
    """Whether a layer computes something after its product: a Dense with an activation."""
    return getattr(cell, "activation", None) is not None


def _fold_into(cell: nn.Cell, a: NDArray[Any], b: NDArray[Any]) -> None:
    """Let a convolution or linear layer do what a norm layer does behind it, which is a X + b."""
    weight = cell.weight.astype(ms.float32).asnumpy().astype(np.float64)
    bias = cell.bias.astype(ms.float32).asnumpy() if cell.has_bias else 0.0
    shift = b + bias * a
    weight = weight * a.reshape(-1, *(1,) * (weight.ndim - 1))
    dtype = cell.weight.dtype
    cell.weight.set_data(Tensor(weight.astype(np.float32)).astype(dtype))
    data = Tensor(shift.astype(np.float32)).astype(dtype)
    if cell.has_bias:
        cell.bias.set_data(data)
    else:
        cell.has_bias = True
        cell.bias = Parameter(data, name=f"{cell.weight.name.removesuffix('weight')}bias")
        if isinstance(cell, nn.Dense):
            cell.bias_add = ms.ops.BiasAdd()


def _plain_affines(norms: list[tuple[str, nn.Cell]]) -> dict[int, Affine]:
    """By the id of every norm layer a and b of what it gives in evaluation, a X + b.

    Raises:
        RBNValueError: A layer gives something else; all are listed.
    """
    found: dict[int, Affine] = {}
    refused = []
    for path, layer in norms:
        affine: Affine | str = "takes the statistics of the batch in evaluation, too"
        if not _inner(layer).use_batch_statistics:
            affine = folding.plain_affine(_config(layer), to_numpy(layer))
        if isinstance(affine, str):
            refused.append(f"{path} {affine}")
        else:
            found[id(layer)] = affine
    if refused:
        raise RBNValueError(
            "fold: expected layers that are plain BatchNorms in evaluation, got "
            f"{len(refused)} that are not: {_listed(refused, '; ')}. Use the model as it is."
        )
    return found


def _config(layer: nn.Cell) -> Config:
    """The options of a norm layer, of MindSpore's BatchNorm, too."""
    if isinstance(layer, CalibratedNorm):
        return config_of(layer)
    inner = _inner(layer)
    return Config(inner.num_features, inner.eps, 1 - inner.momentum, centering=None, scaling=None)


def _norms(model: nn.Cell, caller: str) -> list[tuple[str, nn.Cell]]:
    """Our layers and MindSpore's BatchNorms, each once, with their paths.

    Raises:
        RBNTypeError: There is one of `mint.nn`.
    """
    found = {id(cell): (path, cell) for path, cell in reversed(list(layers(model)))}
    mint = [path for path, cell in found.values() if isinstance(cell, MINT_BATCH_NORMS)]
    if mint:
        raise RBNTypeError(
            f"{caller}: expected RBN, IEBN, BNET and the BatchNorms of nn, got those of mint.nn: "
            f"{_listed(mint)}. Convert them, or build them of nn."
        )
    return [
        (path, cell)
        for path, cell in reversed(list(found.values()))
        if isinstance(cell, (CalibratedNorm, *BATCH_NORMS))
    ]


def _takes_statistics(layer: nn.Cell) -> bool:
    """Whether a layer's running statistics change in training."""
    inner = _inner(layer)
    return inner.use_batch_statistics is not False and (
        isinstance(layer, CalibratedNorm)
        or inner.momentum > 0  # MindSpore stores the weight of the new value
    )


def _inner(layer: nn.Cell) -> nn.Cell:
    """The cell that has a norm layer's options: `nn.BatchNorm3d` wraps one."""
    return layer.bn2d if isinstance(layer, nn.BatchNorm3d) else layer


def _listed(texts: list[str], separator: str = ", ") -> str:
    """The first of some texts, in one."""
    return f"{separator.join(texts[:LISTED])}{f'{separator}...' if len(texts) > LISTED else ''}"

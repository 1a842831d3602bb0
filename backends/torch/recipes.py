"""What training recipes that look for BatchNorm do, for our layers and BatchNorm alike."""

from __future__ import annotations

import copy
import itertools
import operator
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from rbn.backends.torch.surgery import BATCH_NORMS, HAS_ACTIVATION, convert, evaluate, is_frozen, stay_frozen
from rbn.backends.torch.weights import KINDS, unwrapped
from rbn_core.errors import RBNValueError
from rbn_core.matching import Row, Table

NORMS = next(types for types, kind in KINDS if kind == "norm")
"""What normalizes, ours and PyTorch's."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def update_rbn(model: nn.Module, batches: Iterable[Any]) -> None:
    """Take the running statistics of RBN, IEBN, BNET and BatchNorm anew, as a plain mean over batches.

    As `torch.optim.swa_utils.update_bn` does after weights were averaged. The model runs in training mode and
    without gradients; momentum and modes are then what they were. A layer that `freeze` froze stays as it is.

        update_rbn(model, [torch.randn(8, 3, 32, 32) for _ in range(4)])

    Args:
        model: Any model.
        batches: What the model takes, one batch after another; of a tuple or list, such as one of images and
            labels, the first element.

    Raises:
        RBNValueError: No layer keeps statistics that could change, or there is no batch. After this and
            any error of the model or of the batches the statistics are what they were, too.
    """
    layers = [layer for _, layer in _batch_norms(model) if _keeps_statistics(layer) and not is_frozen(layer)]
    if not layers:
        raise RBNValueError(
            "update_rbn: expected a model with RBN, IEBN, BNET or BatchNorm that keeps running statistics, "
            f"got none in a {type(model).__name__}. Build the layers with track_running_stats=True."
        )
    iterator = iter(batches)
    first = list(itertools.islice(iterator, 1))
    if not first:
        raise RBNValueError(
            "update_rbn: expected one batch or more, got none. Pass a list or a new DataLoader; an iterator "
            "gives its batches once."
        )
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(layer, layer.momentum) for layer in layers]
    before = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers(recurse=False)]
    taken = False
    try:
        model.train()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
        with torch.no_grad():
            for batch in itertools.chain(first, iterator):
                model(batch[0] if isinstance(batch, tuple | list) else batch)
        taken = True
    finally:
        for buffer, value in before if not taken else ():
            buffer.copy_(value)
        for layer, momentum in momenta:
            layer.momentum = momentum
        for module, mode in modes:
            module.training = mode


def freeze(model: nn.Module) -> Table:
    """Let RBN, IEBN, BNET and BatchNorm evaluate from now on, also in training, with parameters that stay.

    A hook at each layer turns evaluation on again where `model.train()` has turned it off, and stays in
    copies and in files of whole models. Build the optimizer afterwards.

        print(freeze(model))

    Args:
        model: Any model, or a layer.

    Returns:
        A row for each layer, "frozen".

    Raises:
        RBNValueError: The model has no such layer.
    """
    layers = _batch_norms(model)
    if not layers:
        raise RBNValueError(
            "freeze: expected a model with RBN, IEBN, BNET or BatchNorm, got none in a "
            f"{type(model).__name__}. Pass the model that has them."
        )
    for _, layer in layers:
        stay_frozen(layer)
    return Table(tuple(Row(path, "frozen", type(layer).__name__) for path, layer in layers))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters in two groups for an optimizer: kernels decay, and biases and norm layers do not.

        optimizer = torch.optim.SGD(parameter_groups(model, 1e-4), lr=0.1, momentum=0.9)

    Args:
        model: Any model. What needs no gradient is left out.
        weight_decay: That of the first group.

    Returns:
        The group that decays: what has two axes or more, as kernels have. Then the one that does not: what
        has fewer, as biases have, and every parameter of a norm layer, BNET's convolution among them.
    """
    in_norms = {id(p) for module in model.modules() if isinstance(module, NORMS) for p in module.parameters()}
    groups: tuple[list[Tensor], list[Tensor]] = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[parameter.dim() < 2 or id(parameter) in in_norms].append(parameter)
    decay = (weight_decay, 0.0)
    return [{"params": group, "weight_decay": own} for group, own in zip(groups, decay, strict=True)]


def fold(model: nn.Module) -> fx.GraphModule:
    """A copy for evaluation, with norm layers folded into the convolution or linear layer before them.

    RBN, IEBN and BNET are folded where they are plain BatchNorms in evaluation: with w_m = 0 and w_v = 0, so
    that R(w_b) is a factor of gamma, and BNET with kernels that are 0 beside their centres. BatchNorm is
    folded, too. A layer stays where nothing of that kind comes before it, something else uses what that
    gives, or it has an activation. The copy gives what the model gives in evaluation, to rounding.

        faster = fold(nn.Sequential(nn.Conv2d(3, 8, 3), RBN(8)))

    Args:
        model: A model that `torch.fx` can trace.

    Raises:
        RBNValueError: A calibration is at work, or a layer has no running statistics: all are listed.
        torch.fx.proxy.TraceError: `torch.fx` cannot trace the model.
    """
    model = copy.deepcopy(unwrapped(model)).eval()
    plain = _as_batch_norms(model)
    graph = fx.symbolic_trace(model)
    modules = dict(graph.named_modules(remove_duplicate=False))
    calls = Counter(id(modules[node.target]) for node in graph.graph.nodes if node.op == "call_module")
    for node in list(graph.graph.nodes):
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        norm, first = plain.get(modules[node.target]), modules[before.target]
        if norm is None or calls[id(first)] > 1 or _has_hooks(first) or _has_hooks(modules[node.target]):
            continue
        if type(first) in CONVOLUTIONS:
            folded = fuse_conv_bn_eval(first, norm)
        elif type(first) in TRANSPOSED and first.groups == 1:
            folded = fuse_conv_bn_eval(first, norm, transpose=True)
        elif type(first) is nn.Linear:
            folded = fuse_linear_bn_eval(first, norm)
            _expect_two_axes(graph.graph, before)
        else:
            continue
        graph.set_submodule(before.target, folded)
        node.replace_all_uses_with(before)
        graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


def _as_batch_norms(model: nn.Module) -> dict[nn.Module, _BatchNorm]:
    """Every norm layer of a model with the BatchNorm that gives the same in evaluation."""
    found, refused = {}, []
    for path, layer in _batch_norms(model):
        holder = nn.Sequential(copy.deepcopy(layer))  # the layer itself may have to stay
        kept = [row.detail for row in convert(holder, "bn").rows if row.status == "kept"]
        reasons = [reason for reason in kept if reason != HAS_ACTIVATION]
        if not _keeps_statistics(layer):
            reasons = ["has no running statistics"]
        refused += [f"{path} {reason}" for reason in reasons]
        if type(holder[0]) in (*BATCH_NORMS, nn.SyncBatchNorm):  # a class of its own may do more
            found[layer] = holder[0]
    if refused:
        raise RBNValueError(
            "fold: expected layers that are plain BatchNorms in evaluation, "
            f"got {len(refused)} that are not: {'; '.join(refused[:6])}"
            f"{'; ...' if len(refused) > 6 else ''}. Use the model as it is."
        )
    return found


def _expect_two_axes(graph: fx.Graph, linear: fx.Node) -> None:
    """Refuse what the norm after a linear layer would have taken along another axis."""
    with graph.inserting_before(linear):
        axes = graph.call_method("dim", (linear.args[0],))
        text = "fold: expected inputs of shape (N, C) for a linear layer with a norm folded into it."
        graph.call_function(torch._assert, (graph.call_function(operator.eq, (axes, 2)), text))


def _batch_norms(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    """Our layers and PyTorch's BatchNorms, each once, with their paths."""
    return [(path, layer) for path, layer in model.named_modules() if isinstance(layer, _BatchNorm)]


def _keeps_statistics(layer: _BatchNorm) -> bool:
    return layer.running_mean is not None and layer.running_var is not None


def _has_hooks(layer: nn.Module) -> bool:
    """Whether something else than `freeze` hangs on a layer, which may change its weights or its output."""
    hooks = (*layer._forward_pre_hooks.values(), *layer._forward_hooks.values())
    return any(hook is not evaluate for hook in hooks)

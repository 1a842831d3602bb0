"""Changes to the layers of a whole PyTorch model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from rbn.backends.torch.activated import ACTIVATED, Activated
from rbn.backends.torch.layers import BNET, CalibratedNorm
from rbn.backends.torch.networks import LAYERS
from rbn.backends.torch.weights import config_of, to_numpy, to_tensor, unwrapped
from rbn_core import conversion
from rbn_core.errors import RBNTypeError, RBNWarning
from rbn_core.matching import State, Table
from rbn_core.names import NAMES, RUNNING_STATISTICS
from rbn_core.options import kept_arguments

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""PyTorch's own, by the number of spatial axes minus one."""

HAS_ACTIVATION = "has an activation, which no BatchNorm has but timm's BatchNormAct2d that it was made of"
"""Why a layer that is inert does not become a BatchNorm."""

KEPT = (*kept_arguments("torch"), "device", "dtype", "sync", "process_group")
"""What a layer takes over from the one before, so that it is no option of a conversion."""


def convert(
    model: nn.Module, to: str = "rbn", *, where: str | None = None, preserve: bool = False, **options: Any
) -> Table:
    r"""Replace BatchNorm by RBN, IEBN or BNET in any model, or those by BatchNorm, in place.

    The new layers have the old ones' parameters (the very objects, so that an optimizer goes on with them),
    statistics, eps, momentum, dtype, device, mode and hooks; half-precision statistics become float32.
    What they add is learned unless all parameters before have `requires_grad=False`; the table says so then.
    `nn.SyncBatchNorm` is `sync=True`. Convert before wrapping a model in `DistributedDataParallel`, which
    does not learn of new parameters, and before building an optimizer for them.

    Args:
        model: Any model; `nn.DataParallel` and the like are looked through.
        to: "rbn", "iebn" or "bnet" replace every `nn.BatchNorm*d` and `nn.SyncBatchNorm`; "bn" replaces every
            RBN, IEBN and BNET whose calibration is inert.
        where: A regular expression for whole dotted paths of layers; all by default.
        preserve: Whether the model must give what it gave before: gamma is divided by R(w_b), and BNET's
            kernel is gamma in its centre. "bn" always does.
        options: The new layers', such as `scaling="channel_std"` or `kernel_size=5`; for "bn" there is
            `spatial_dims`, 2 by default, of layers that never were a BatchNorm.

    Returns:
        A row for each layer that was "replaced", or "kept" and why. In the place of a `FrozenBatchNorm2d`,
        such as torchvision's, is a layer that is frozen as by `freeze`.

    Raises:
        RBNError: `to`, `where` or an option is refused, `where` matches no layer, or the model itself is what
            is to be replaced; nothing has changed.

    Warns:
        RBNWarning: The model is that of a `YOLO` of ultralytics, whose `train` would drop the new layers.
    """
    chosen = conversion.chooser(to, where)
    model = unwrapped(model)
    conversion.check_options(
        to,
        options,
        KEPT,
        lambda **given: LAYERS[to](1, device="meta", **given),
        of_batch_norm=("spatial_dims",),
    )
    if _is_replaceable(model, to):
        raise RBNTypeError(
            f"convert: expected a model with layers inside, got a {type(model).__name__} itself, which "
            "cannot be replaced in place. Put it into nn.Sequential."
        )
    found = [
        (path, module)
        for path, module in model.named_modules(remove_duplicate=False)
        if _is_replaceable(module, to) or (to != "bn" and _is_frozen_batch_norm(module))
    ]
    planned = conversion.plans(found, chosen, where, lambda _, module: _plan(module, to, preserve, options))
    rows = conversion.rows(found, planned, _Replacement.described)
    for path, module in found:
        plan = planned.get(id(module))
        if isinstance(plan, _Replacement):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, plan.carry_out())
    if to != "bn" and any(row.status == "replaced" for row in rows) and _is_of_yolo(model):
        warnings.warn(
            "convert: expected a model that is trained as it is, got one of ultralytics' YOLO. YOLO.train "
            "builds it anew, with BatchNorm, and drops the new layers. Convert in a class of your own, as "
            "docs/libraries.md shows.",
            RBNWarning,
            stacklevel=2,
        )
    return conversion.report(rows, to)


def convert_sync_rbn(model: nn.Module, process_group: ProcessGroup | None = None) -> nn.Module:
    """Let RBN, IEBN, BNET and BatchNorm take their batch statistics over all processes, in place.

    PyTorch's own BatchNorms become `torch.nn.SyncBatchNorm`, which runs on GPUs alone; our layers stay, with
    `sync=True`, and classes of others' stay as they are: convert timm's `BatchNormAct2d` first.
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` refuses a model with our layers.

        model = convert_sync_rbn(nn.Sequential(nn.Conv2d(3, 8, 3), RBN(8)))

    Args:
        model: The model; its layers keep their parameters, statistics and mode, and ours their hooks.
        process_group: The processes; all by default.

    Returns:
        The model; of a BatchNorm itself the `SyncBatchNorm` in its place.
    """
    if isinstance(model, CalibratedNorm):
        model.sync, model.process_group = True, process_group
    elif type(model) in BATCH_NORMS:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model, process_group)
    for name, module in model.named_children():
        converted = convert_sync_rbn(module, process_group)
        if converted is not module:
            setattr(model, name, converted)
    return model


class _Replacement(NamedTuple):
    """A new layer, which has the old one's tensors, and what those are to become."""

    layer: nn.Module
    values: Mapping[str, Tensor]

    def described(self) -> str:
        """What the table says of the new layer."""
        learned = [parameter.requires_grad for parameter in self.layer.parameters()]
        return conversion.replaced_by(
            type(self.layer).__name__, frozen=is_frozen(self.layer), learns=any(learned) or not learned
        )

    def carry_out(self) -> nn.Module:
        """The layer with its values, which until now the old one may have had."""
        with torch.no_grad():
            for name, value in self.values.items():
                self.layer.get_parameter(name).copy_(value)
        return self.layer


def _is_replaceable(module: nn.Module, to: str) -> bool:
    """Whether a module is one of the layers before: ours for "bn", and else PyTorch's."""
    ours = isinstance(module, CalibratedNorm)
    return ours if to == "bn" else isinstance(module, _BatchNorm) and not ours


def _is_frozen_batch_norm(module: nn.Module) -> bool:
    """Whether a module is what torchvision, timm, detectron2 or transformers have for frozen BatchNorms."""
    return "FrozenBatchNorm" in type(module).__name__


def _is_of_yolo(model: nn.Module) -> bool:
    """Whether a model belongs to a `YOLO` of ultralytics, which gives it a task."""
    return any(
        type(module).__module__.startswith("ultralytics.") and {"yaml", "task"} <= vars(module).keys()
        for module in model.modules()
    )


def _is_activated(module: nn.Module) -> bool:
    """Whether a layer is timm's `BatchNormAct2d`, or one of ours that is like it."""
    theirs = type(module).__name__ == "BatchNormAct2d" and module._modules.keys() == {"drop", "act"}
    return theirs or type(module) in ACTIVATED.values()


def _plan(module: nn.Module, to: str, preserve: bool, options: Mapping[str, Any]) -> _Replacement | str:
    """What takes a module's place, or why nothing does; nothing changes yet."""
    if _is_frozen_batch_norm(module):
        return _frozen(module, to, preserve, options)
    if parametrize.is_parametrized(module):
        return "has parametrizations: remove them first"
    if isinstance(module, LazyModuleMixin):
        return "has not seen an input yet: run the model once"
    activated = _is_activated(module)
    if not activated and type(module) not in (*BATCH_NORMS, nn.SyncBatchNorm, *LAYERS.values()):
        return "is a class of its own"
    if to == "bn":
        return _batch_norm(module, options)
    if bool(module._modules) != activated or set(module._parameters) | set(module._buffers) != {
        "weight",
        "bias",
        *RUNNING_STATISTICS,
    }:
        return "has more parameters, buffers or modules than a BatchNorm"
    return _calibrated(module, to, preserve, options)


def _frozen(module: nn.Module, to: str, preserve: bool, options: Mapping[str, Any]) -> _Replacement | str:
    """The frozen layer that takes the place of a FrozenBatchNorm2d."""
    stored = {name: value for name, value in module._buffers.items() if name != RUNNING_STATISTICS[-1]}
    if module._modules or module._parameters or stored.keys() != {"weight", "bias", *RUNNING_STATISTICS[:-1]}:
        return "has more parameters, buffers or modules than a BatchNorm"
    weight = stored["weight"]
    norm = nn.BatchNorm2d(len(weight), getattr(module, "eps", 1e-5), device=weight.device, dtype=weight.dtype)
    norm.load_state_dict(stored, strict=False)
    norm.eval()
    images = torch.linspace(-2, 2, 4, dtype=weight.dtype, device=weight.device).expand(1, len(weight), 1, 4)
    with torch.no_grad():
        if not torch.allclose(norm(images), module(images), rtol=1e-3, atol=1e-3):
            return "does not give what a BatchNorm with its numbers gives"
    plan = _calibrated(norm, to, preserve, options)
    if isinstance(plan, _Replacement):
        stay_frozen(plan.layer)
    return plan


def stay_frozen(layer: nn.Module) -> None:
    """Let a layer evaluate, also in training, with parameters that stay."""
    layer.eval().requires_grad_(False)
    if not is_frozen(layer):
        layer.register_forward_pre_hook(evaluate)


def is_frozen(layer: nn.Module) -> bool:
    """Whether `stay_frozen` was called for a layer, or for the one in whose place it is."""
    return evaluate in layer._forward_pre_hooks.values()


def evaluate(layer: nn.Module, _: Any) -> None:
    """The hook of a frozen layer."""
    if layer.training:
        layer.eval()


def _calibrated(norm: _BatchNorm, to: str, preserve: bool, options: Mapping[str, Any]) -> _Replacement | str:
    """The RBN, IEBN or BNET that takes a BatchNorm's place."""
    sync = isinstance(norm, nn.SyncBatchNorm)
    known = _common(norm) | {"sync": sync, "process_group": norm.process_group if sync else None}
    activated = _is_activated(norm)
    if to == "bnet":
        known["spatial_dims"] = BATCH_NORMS.index(type(norm)) + 1 if type(norm) in BATCH_NORMS else 2
    else:
        known |= {"affine": norm.weight is not None, "bias": norm.bias is not None}
    layer = (ACTIVATED if activated else LAYERS)[to](norm.num_features, **known | dict(options))
    if activated:
        layer.drop, layer.act = norm.drop, norm.act
    state = conversion.from_batch_norm(config_of(layer), to_numpy(norm), True) if preserve else {}
    if isinstance(state, str):
        return state
    if not sync:
        layer.batch_norm = type(norm)  # what "bn" makes of it again
    if isinstance(layer, BNET):
        _learn_alike(layer.conv, norm)
    return _taking_over(layer, norm, state)


def _batch_norm(module: CalibratedNorm, options: Mapping[str, Any]) -> _Replacement | str:
    """The BatchNorm that takes a layer's place."""
    config = config_of(module)
    state = conversion.to_batch_norm(config, to_numpy(module))
    if isinstance(state, str):
        return state
    if isinstance(module, Activated) and (module.sync or not hasattr(module, "batch_norm")):
        return HAS_ACTIVATION
    dims = config.spatial_dims if isinstance(module, BNET) else options.get("spatial_dims", 2)
    kind, known = getattr(module, "batch_norm", BATCH_NORMS[dims - 1]), _common(module)
    if module.sync:
        kind, known["process_group"] = nn.SyncBatchNorm, module.process_group
    layer = kind(module.num_features, affine="gamma" in state, **known)
    if isinstance(module, Activated):
        layer.drop, layer.act = module.drop, module.act
    if "beta" not in state:
        layer.register_parameter("bias", None)
    if isinstance(module, BNET):
        _learn_alike(layer, module.conv)
    return _taking_over(layer, module, state)


def _common(old: nn.Module) -> dict[str, Any]:
    """The options that are the same in a layer and in the one that takes its place."""
    tensors = [tensor for tensor in (*old.parameters(), *old.buffers()) if tensor.is_floating_point()]
    return {
        "eps": old.epsilon if isinstance(old, CalibratedNorm) else old.eps,
        "momentum": old.momentum,
        "track_running_stats": old.running_mean is not None,
        "device": tensors[0].device if tensors else None,
        "dtype": tensors[0].dtype if tensors else None,
    }


def _taking_over(layer: nn.Module, old: nn.Module, state: State) -> _Replacement:
    """A new layer with an old one's tensors, mode and hooks, and the state that it is to have."""
    for name in ("weight", "bias"):
        if old._parameters.get(name) is not None and layer._parameters.get(name) is not None:
            layer._parameters[name] = old._parameters[name]
    for name in RUNNING_STATISTICS:
        buffer = old._buffers.get(name)
        if buffer is not None:
            half = buffer.dtype in (torch.float16, torch.bfloat16)
            layer._buffers[name] = buffer.float() if half else buffer
    for name, value in vars(old).items():
        if "_hook" in name:  # the dictionaries themselves, so that a hook's handle still removes it
            vars(layer)[name] = value
    if (before := list(old.parameters())) and not any(parameter.requires_grad for parameter in before):
        layer.requires_grad_(False)
    layer.track_running_stats = old.track_running_stats
    layer.train(old.training)
    arrays = {NAMES["torch"][name]: array for name, array in state.items()}
    return _Replacement(
        layer, {name: to_tensor(arrays[name]) for name, _ in layer.named_parameters() if name in arrays}
    )


def _learn_alike(new: nn.Module, old: nn.Module) -> None:
    """Let weight and bias be learned if those before them were."""
    for name in ("weight", "bias"):
        before, after = getattr(old, name), getattr(new, name)
        if before is not None and after is not None:
            after.requires_grad_(before.requires_grad)

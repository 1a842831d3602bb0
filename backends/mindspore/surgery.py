"""Changes to the layers of a whole MindSpore model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import mindspore as ms
from mindspore import mint, nn

from rbn.backends.mindspore.layers import CalibratedNorm
from rbn.backends.mindspore.networks import LAYERS
from rbn.backends.mindspore.weights import (
    BATCH_NORMS,
    MINT_BATCH_NORMS,
    config_of,
    from_numpy,
    layers,
    stored,
    to_numpy,
)
from rbn_core import conversion
from rbn_core.config import old_value_weight
from rbn_core.errors import RBNTypeError
from rbn_core.matching import State, Table
from rbn_core.names import NAMES, PARAMETERS, RUNNING_STATISTICS
from rbn_core.options import kept_arguments

KEPT = (
    *kept_arguments("mindspore"),
    *("affine", "gamma_init", "beta_init", "moving_mean_init", "moving_var_init", "use_batch_statistics"),
    *("data_format", "dtype", "sync", "process_groups"),
)
"""What a layer takes over from the one before, so that it is no option of a conversion."""

TWINS = {"conv_weight": "gamma", "conv_bias": "beta", "gamma": "conv_weight", "beta": "conv_bias"}
"""What is learned in a layer if its twin was in the one before: BNET has a convolution for gamma and beta."""


def convert(
    model: nn.Cell, to: str = "rbn", *, where: str | None = None, preserve: bool = False, **options: Any
) -> Table:
    r"""Replace BatchNorm by RBN, IEBN or BNET in any model, or those by BatchNorm, in place.

    The new layers have the old ones' parameters (the very objects, so that an optimizer goes on with them),
    statistics, eps, momentum, dtype, mode, flags and hooks; half-precision statistics become float32, and
    names of parameters follow the old ones'. What they add is learned if gamma or beta was; else the table
    says so: MindSpore does not tell a BatchNorm with `affine=False` from one that is frozen.
    `nn.SyncBatchNorm` is `sync=True`. Graphs that this process has compiled run the old layers, so they are
    dropped, as by `mindspore.ms_memory_recycle`. Convert before building an optimizer for the new parameters.

    Args:
        model: Any cell.
        to: "rbn", "iebn" or "bnet" replace every BatchNorm of `nn` and `mint.nn`; "bn" replaces every RBN,
            IEBN and BNET whose calibration is inert.
        where: A regular expression for whole dotted paths of layers; all by default.
        preserve: Whether the model must give what it gave before: gamma is divided by R(w_b), and BNET's
            kernel is gamma in its centre. "bn" always does.
        options: The new layers', such as `scaling="channel_std"` or `kernel_size=5`; for "bn" there is
            `spatial_dims`, 2 by default, of layers that never were a BatchNorm.

    Returns:
        A row for each layer that was "replaced", or "kept" and why. Where there is none, a note says so.

    Raises:
        RBNError: `to`, `where` or an option is refused, `where` matches no such layer, or the model itself is
            what is to be replaced; nothing has changed.
    """
    chosen = conversion.chooser(to, where)
    replaceable = CalibratedNorm if to == "bn" else (*BATCH_NORMS, *MINT_BATCH_NORMS)
    conversion.check_options(
        to, options, KEPT, lambda **given: LAYERS[to](1, **given), of_batch_norm=("spatial_dims",)
    )
    if isinstance(model, replaceable):
        raise RBNTypeError(
            f"convert: expected a model with layers inside, got a {type(model).__name__} itself, which "
            "cannot be replaced in place. Put it into nn.SequentialCell."
        )
    cells = list(layers(model))
    found = [(path, cell) for path, cell in cells if isinstance(cell, replaceable)]
    planned = conversion.plans(
        found, chosen, where, lambda path, cell: _plan(path, cell, to, preserve, options)
    )
    rows = conversion.rows(found, planned, _Replacement.described)
    replacements = [plan for plan in planned.values() if isinstance(plan, _Replacement)]
    for plan in replacements:
        plan.carry_out([cell for _, cell in cells])
    if replacements:
        ms.ms_memory_recycle()
    return conversion.report(rows, to)


class _Replacement(NamedTuple):
    """A new layer, the old one and its path, and the state that the new one is to have."""

    layer: nn.Cell
    old: nn.Cell
    path: str
    state: State

    def described(self) -> str:
        """What the table says of the new layer."""
        return conversion.replaced_by(type(self.layer).__name__, frozen=False, learns=_learns(self.old))

    def carry_out(self, cells: list[nn.Cell]) -> None:
        """Put the layer wherever the old one is, with its parameters, and with the state."""
        layer, old = self.layer, self.old
        names = {own: parameter.name for own, parameter in old.parameters_and_names()}
        prefixes = [name.removesuffix(own) for own, name in names.items() if name.endswith(f".{own}")]
        _take_parameters(layer, old)
        # The names tell of cells around this model, which the path does not.
        layer.update_parameters_name(prefixes[0] if prefixes else f"{self.path}.")
        from_numpy(layer, self.state, strict=False)  # a BatchNorm does not count, a new BNET has its kernel
        _take_modes_and_hooks(layer, old)
        for cell in cells:
            exchange(cell, old, layer)


def _plan(
    path: str, cell: nn.Cell, to: str, preserve: bool, options: Mapping[str, Any]
) -> _Replacement | str:
    """What takes a cell's place, or why nothing does; nothing changes yet."""
    if type(cell) not in (*BATCH_NORMS, *MINT_BATCH_NORMS, *LAYERS.values()):
        return "is a class of its own"
    layer = _batch_norm(cell, options) if to == "bn" else _calibrated(cell, to, options)
    if isinstance(layer, str):
        return layer
    if to == "bn":
        state = conversion.to_batch_norm(config_of(cell), to_numpy(cell))
    else:
        state = conversion.from_batch_norm(config_of(layer), to_numpy(cell), preserve)
    return state if isinstance(state, str) else _Replacement(layer, cell, path, state)


def _calibrated(norm: nn.Cell, to: str, options: Mapping[str, Any]) -> CalibratedNorm | str:
    """The RBN, IEBN or BNET that takes a BatchNorm's place."""
    if isinstance(norm, mint.nn.SyncBatchNorm):
        return "synchronizes a group of processes that is known by its name alone"
    inner = norm.bn2d if isinstance(norm, nn.BatchNorm3d) else norm
    cells = 1 + isinstance(norm, nn.BatchNorm3d)
    if (
        not stored(norm).keys() <= {"gamma", "beta", *RUNNING_STATISTICS}
        or len(list(norm.cells_and_names())) > cells
    ):
        return "has more parameters or cells than a BatchNorm"
    ours = isinstance(norm, BATCH_NORMS)
    family = BATCH_NORMS if ours else MINT_BATCH_NORMS
    dims = 2 if isinstance(norm, nn.SyncBatchNorm) else family.index(type(norm)) + 1
    known: dict[str, Any] = {"eps": inner.eps, "dtype": inner.gamma.dtype if ours else inner.dtype}
    if ours:
        known["momentum"] = round(
            1.0 - inner.momentum, 15
        )  # MindSpore turns it round: 0.3, not 1 - (1 - 0.3)
        known |= {"use_batch_statistics": inner.use_batch_statistics, "data_format": inner.format}
    else:
        known["momentum"] = old_value_weight(inner.momentum)
        known["use_batch_statistics"] = None if inner.track_running_stats else True
    if isinstance(norm, nn.SyncBatchNorm):
        known |= {"sync": True, "process_groups": norm.process_groups}
    if to == "bnet":
        known["spatial_dims"] = dims
    else:
        known["affine"] = any(parameter.requires_grad for parameter in stored(norm).values())
    layer = LAYERS[to](inner.num_features, **known | dict(options))
    layer.batch_norm = BATCH_NORMS[dims - 1]  # what "bn" makes of it again
    return layer


def _batch_norm(layer: CalibratedNorm, options: Mapping[str, Any]) -> nn.Cell | str:
    """The BatchNorm that takes a layer's place."""
    if layer.momentum is None:
        return "averages all batches, with momentum=None, which MindSpore's BatchNorm cannot"
    if layer.running_var == "biased":
        return "accumulates the biased variance, which MindSpore's BatchNorm cannot"
    if layer.data_format != "NCHW":
        return "takes NHWC, which MindSpore's BatchNorm cannot"
    dtype = (layer.conv.weight if layer.layer == "BNET" else layer.gamma).dtype
    if dtype not in (ms.float32, ms.float16):
        return f"is of {dtype}, which MindSpore's BatchNorm cannot be"
    known: dict[str, Any] = {
        "eps": layer.eps,
        "momentum": layer.momentum,
        "use_batch_statistics": layer.use_batch_statistics,
        "dtype": dtype,
    }
    if layer.sync:
        groups = layer.process_groups
        known["process_groups"] = None if groups is None else [list(ranks) for ranks in groups]
        return nn.SyncBatchNorm(layer.num_features, **known)
    dims = layer.spatial_dims or options.get("spatial_dims", 2)
    return getattr(layer, "batch_norm", BATCH_NORMS[dims - 1])(layer.num_features, **known)


def _take_parameters(layer: nn.Cell, old: nn.Cell) -> None:
    """Let a layer have the parameters of the one before, and learn what that has learned."""
    holder = layer.bn2d if isinstance(layer, nn.BatchNorm3d) else layer
    before = stored(old)
    learns = _learns(old)
    for name, parameter in stored(layer).items():
        if name in before and before[name].dtype == parameter.dtype:
            holder.insert_param_to_cell(NAMES["mindspore"][name], before[name])
        elif (twin := name if name in before else TWINS.get(name)) in before:
            parameter.requires_grad = before[twin].requires_grad
        elif name in PARAMETERS and not learns:
            parameter.requires_grad = False


def _learns(cell: nn.Cell) -> bool:
    """Whether a layer learns a parameter, or has none that it could."""
    learned = [parameter.requires_grad for name, parameter in stored(cell).items() if name in PARAMETERS]
    return any(learned) or not learned


def _take_modes_and_hooks(layer: nn.Cell, old: nn.Cell) -> None:
    """Let a layer have the modes, flags and hooks of the one before."""
    layer.set_grad(old.requires_grad)
    layer.add_flags_recursive(**old.get_flags() | {"training": old.training})
    for name, value in vars(old).items():
        if name.startswith("_lazy_") and "hook" in name:  # the dictionaries: a hook's handle still removes it
            vars(layer)[name] = value
    # What runs the hooks of the backward pass knows its cell; it comes with the first of them.
    if vars(old)["_lazy_backward_hook"]:
        layer.register_backward_hook(_no_hook).remove()
    if vars(old)["_lazy_backward_pre_hook"]:
        layer.register_backward_pre_hook(_no_hook).remove()


def _no_hook(*gradients: Any) -> None:
    """Leave gradients as they are."""


def exchange(cell: nn.Cell, old: nn.Cell, new: nn.Cell) -> None:
    """Let a cell hold a new layer for an old one, also in lists such as a SequentialCell's."""
    for name, child in cell._cells.items():
        if child is old:
            cell._cells[name] = new
    for name, held in vars(cell).items():
        if type(held) in (list, tuple) and any(item is old for item in held):
            vars(cell)[name] = type(held)(new if item is old else item for item in held)

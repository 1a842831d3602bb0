"""BatchNorm to RBN, IEBN and BNET in an NNX model, and back."""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from rbn.backends.flax import distributed, places
from rbn.backends.flax.networks import redescribed
from rbn.backends.flax.nnx import layers
from rbn.backends.flax.nnx.layers import CalibratedNorm, assign, config_of
from rbn.backends.flax.nnx.networks import Network
from rbn.backends.flax.nnx.weights import Path, modules, variables
from rbn_core import conversion
from rbn_core.config import CALIBRATION_STARTS
from rbn_core.errors import RBNTypeError, RBNValueError
from rbn_core.matching import COUNTER, State, Table
from rbn_core.names import own_name, to_layout
from rbn_core.options import kept_arguments

BATCH_NORM = inspect.signature(nnx.BatchNorm.__init__).parameters  # the class itself hides them

PROMOTE_DTYPE = BATCH_NORM["promote_dtype"].default if "promote_dtype" in BATCH_NORM else None
"""BatchNorm's own way to make its arrays of one dtype, where it has one; the layers have another."""

SHARED = ("scale", "bias", "mean", "var")
"""The variables that BatchNorm and the layers have in common; the objects stay."""

KEPT = (*kept_arguments("flax.nnx"), "use_running_average", "axis", "dtype", "param_dtype", "rngs")
"""What a layer takes over from the one before, so that it is no option of a conversion."""

OF_BATCH_NORM = tuple(name for name in BATCH_NORM if name not in ("self", *KEPT))
"""The options that BatchNorm has."""


def convert(
    model: nnx.Module,
    to: str = "rbn",
    *,
    where: str | None = None,
    preserve: bool = False,
    rngs: nnx.Rngs | None = None,
    **options: Any,
) -> Table:
    """Make every BatchNorm of a model an RBN, IEBN or BNET, or the other way round, in place.

    Weights, statistics, epsilon, momentum, axis, dtypes, mode and the variables themselves stay, so that what
    selects or shards them still does; an optimizer has to be built anew. What the layers add is an
    `nnx.Param` if a parameter before was; else the table says so. The running variance stays biased, as
    BatchNorm's is in Flax, unless `running_var` says otherwise.

    Args:
        model: Any NNX module that holds such layers, in attributes, lists or dictionaries.
        to: "rbn", "iebn" or "bnet"; or "bn", for layers whose calibration is inert.
        where: A regular expression for the whole dotted paths of the layers; every path by default.
        preserve: Whether the outputs must stay: gamma is divided by R(w_b), and BNET starts as BatchNorm.
        rngs: The random keys that new kernels of BNET are drawn from, unless the outputs stay.
        options: Options of the new layers, such as `scaling=`, `kernel_size=` and `scale_bias_init=`.

    Returns:
        Every layer that could have been converted, by its path: "replaced", or "kept" with the reason.

    Raises:
        RBNTypeError: The model itself is such a layer, or an option is unknown.
        RBNValueError: `to`, `where` or an option is wrong, or a layer is a stack of several, as `nnx.vmap`
            makes them, that do not lie on the first axis. Nothing has changed then.
    """
    pattern = conversion.chooser(to, where)
    source = CalibratedNorm if to == "bn" else nnx.BatchNorm
    if isinstance(model, source):
        raise RBNTypeError(
            f"convert: expected a model that holds layers, got a {type(model).__name__}, which cannot be "
            "replaced in place. Pass the model that holds it."
        )
    rngs = rngs or nnx.Rngs(0)
    build = functools.partial(getattr(layers, to.upper(), nnx.BatchNorm), 1, rngs=nnx.Rngs(0))
    conversion.check_options(to, options, KEPT, build, OF_BATCH_NORM)
    sources = [(path, module) for path, module in modules(model) if isinstance(module, source)]
    found = [(".".join(map(str, path)), module) for path, module in sources]
    planned = conversion.plans(
        found, pattern, where, lambda path, old: _plan(old, path, to, preserve, options, rngs)
    )
    rows = conversion.rows(found, planned, _Replacement.described)
    replaced = [
        (path, plan) for path, old in sources if isinstance(plan := planned.get(id(old)), _Replacement)
    ]
    _check_holders(model, [path for path, _ in replaced])
    for plan in planned.values():
        if isinstance(plan, _Replacement):
            plan.carry_out()
    for path, plan in replaced:
        put(model, path, plan.new)
    if isinstance(model, Network):
        converted = {".".join(map(str, path)): (to, config_of(plan.new)) for path, plan in replaced}
        model.description = redescribed(model.description, converted)
    return conversion.report(rows, to)


class _Replacement(NamedTuple):
    """A layer, the one that takes its place, and the arrays of that under Flax's names."""

    old: Any
    new: Any
    arrays: places.Stored

    def described(self) -> str:
        """What the table says of the new layer."""
        learns = issubclass(_parameter_kind(self.old), nnx.Param)
        return conversion.replaced_by(type(self.new).__name__, frozen=is_frozen(self.old), learns=learns)

    def carry_out(self) -> None:
        """Give the new layer the variables of the old one, and its arrays."""
        for name in SHARED:
            if getattr(self.old, name, None) is not None and getattr(self.new, name, None) is not None:
                setattr(self.new, name, getattr(self.old, name))
        for own, variable in variables(self.new).items():
            assign(variable, jnp.asarray(self.arrays[own], variable[...].dtype))
        if is_frozen(self.old):
            stay_frozen(self.new)
        else:
            _make_parameters(self.new, _parameter_kind(self.old))


def _plan(
    old: Any, path: str, to: str, preserve: bool, options: dict[str, Any], rngs: nnx.Rngs
) -> _Replacement | str:
    """What takes the place of a layer, or why it stays."""
    if isinstance(old.axis, tuple | list) and len(old.axis) != 1:
        return f"has channels on the axes {tuple(old.axis)}"
    common = {
        "use_running_average": old.use_running_average,
        "axis": old.axis if isinstance(old.axis, int) else old.axis[0],
        "momentum": old.momentum,
        "epsilon": old.epsilon,
        "dtype": old.dtype,
        "param_dtype": old.param_dtype,
        "axis_name": old.axis_name,
        "axis_index_groups": old.axis_index_groups,
    }
    if (spatial := distributed.names(getattr(old, "spatial_axis_name", None))) and to == "bn":
        common["axis_name"] = (*distributed.names(old.axis_name), *spatial)
    promote = getattr(old, "promote_dtype", None)
    if promote is not None and promote is not PROMOTE_DTYPE:
        common["promote_dtype"] = promote
    own = {name: np.asarray(variable[...]) for name, variable in variables(old).items()}
    leads = _leads(path, old, own, to)
    each = [places.canonical(one, {"": "norm"})[0] for one in places.unstacked(own, leads)]
    if to == "bn":
        if old.momentum is None:
            return "averages all batches, which Flax's BatchNorm does not"
        given = [conversion.to_batch_norm(config_of(old), state) for state in each]
        affine = {f"use_{own}": isinstance(given[0], dict) and name in given[0] for name, own in AFFINE}
        common |= {"use_fast_variance": False} | affine
    else:
        common["running_var"] = "biased"
        if to != "bnet":
            common |= {"use_scale": old.scale is not None, "use_bias": old.bias is not None}
    kind: Any = nnx.BatchNorm if to == "bn" else getattr(layers, to.upper())
    whole = max(leads.values(), key=len)
    build = functools.partial(kind, old.num_features, **common | options)
    new = _stack(lambda rngs: build(rngs=rngs), whole)(rngs)
    fresh = {name: np.asarray(variable[...]) for name, variable in variables(new).items()}
    starts = places.unstacked(fresh, dict.fromkeys(places.COLLECTIONS, whole))
    if to != "bn":
        given = [
            conversion.from_batch_norm(config_of(new), state | _calibration(start), preserve)
            for state, start in zip(each, starts, strict=True)
        ]
    made = []
    for number, (state, start) in enumerate(zip(given, starts, strict=True)):
        if isinstance(state, str):
            return f"{state}, in layer {number} of the stack" if len(given) > 1 else state
        values = {
            own_name("flax", "", name, "norm"): to_layout("flax", name, "norm", value)
            for name, value in state.items()
        }
        made.append({name: values.get(name, array) for name, array in start.items()})
    return _Replacement(old, new, places.stacked(made, leads))


def _calibration(own: places.Stored) -> State:
    """How a new layer's calibration starts, under canonical names, which are Flax's."""
    return {name: own[f"params/{name}"] for name in CALIBRATION_STARTS if f"params/{name}" in own}


AFFINE = (("gamma", "scale"), ("beta", "bias"))
"""BatchNorm's parameters, under canonical names and Flax's."""


def _leads(path: str, old: Any, own: places.Stored, to: str) -> places.Leads:
    """The sizes of a stack of layers, as `nnx.vmap` makes it; of a layer that stands for itself none.

    Raises:
        RBNValueError: The layers do not lie on the first axis, or the shapes do not tell.
    """
    channels, dims = old.num_features, getattr(old, "spatial_dims", None) or 2
    leads: dict[str, set[tuple[int, ...]]] = {collection: set() for collection in places.COLLECTIONS}
    for name, array in own.items():
        due: tuple[int, ...] = () if name.endswith(COUNTER) else (channels,)
        if name.endswith("kernel"):
            due = (*array.shape[array.ndim - dims - 2 : array.ndim - 2], 1, channels)
        lead = array.shape[: array.ndim - len(due)]
        if (*lead, *due) != array.shape or (to == "bnet" and channels in lead):
            raise RBNValueError(
                f"convert: expected a stack of layers along the first axis, got {name} of shape "
                f"{array.shape} for {channels} channels in {path}, which does not show that. Build the stack "
                "of the new layers, or leave the layer out with where=."
            )
        leads[name.partition("/")[0]].add(lead)
    statistics = leads["batch_stats"].pop()
    parameters = leads["params"].pop() if leads["params"] else statistics
    if leads["params"] or leads["batch_stats"]:
        raise RBNValueError(
            f"convert: expected arrays of as many layers each, got others in {path}. "
            "Leave the layer out with where=."
        )
    return {"params": parameters, "batch_stats": statistics}


def _stack(make: Any, sizes: tuple[int, ...]) -> Any:
    """A function of random keys that makes a stack of layers, as `nnx.vmap` makes it."""
    for size in sizes:
        make = nnx.split_rngs(splits=size)(nnx.vmap(make, transform_metadata={nnx.PARTITION_NAME: None}))
    return make


class FrozenParam(nnx.Variable):
    """A parameter that is not trained: no `nnx.Param`, so that gradients and optimizers leave it alone."""


def stay_frozen(layer: Any) -> None:
    """Let a layer evaluate, whatever it is told, with parameters that stay."""
    kind: Any = type(layer)
    _make_parameters(layer, FrozenParam)
    if not is_frozen(layer):
        layer.__class__ = _frozen(kind)
        layer.use_running_average = True


def _parameter_kind(layer: Any) -> Any:
    """What the parameters of a layer are: `nnx.Param`, or what somebody has made of all of them."""
    kinds = [
        type(node)
        for _, node in nnx.iter_graph(layer)
        if isinstance(node, nnx.Variable) and not isinstance(node, nnx.BatchStat)
    ]
    return next((kind for kind in kinds if issubclass(kind, nnx.Param)), kinds[0] if kinds else nnx.Param)


def _make_parameters(layer: Any, kind: Any) -> None:
    """Let all parameters of a layer be variables of a kind, where that is no `nnx.Param`."""
    for _, module in list(modules(layer)):
        for name, value in list(vars(module).items()):
            if isinstance(value, nnx.Param) and not issubclass(kind, nnx.Param):
                setattr(module, name, kind(value[...], **value.get_metadata()))


def is_frozen(layer: Any) -> bool:
    """Whether `stay_frozen` was called for a layer, or for the one in whose place it is."""
    return bool(getattr(type(layer), "frozen", False))


@functools.cache
def _frozen(kind: Any) -> Any:
    """A class of layers that always evaluate."""

    def call(self: Any, x: Any, use_running_average: bool | None = None, *, mask: Any = None) -> Any:
        return kind.__call__(self, x, True, mask=mask)

    def reduced(self: Any) -> Any:
        """How it is pickled and copied: by the class that can be found under its name."""
        return _new_frozen, (kind,), self.__getstate__()

    return type(kind.__name__, (kind,), {"__call__": call, "frozen": True, "__reduce__": reduced})


def _new_frozen(kind: Any) -> Any:
    """A frozen layer without anything in it."""
    kind = _frozen(kind)
    return kind.__new__(kind)


def _check_holders(model: nnx.Module, paths: list[Path]) -> None:
    for path in paths:
        if isinstance(_at(model, path[:-1]), tuple):
            raise RBNTypeError(
                "convert: expected layers in attributes, lists and dictionaries, got "
                f"{'.'.join(map(str, path))} in a tuple, which cannot be changed in place. Make it a list."
            )


def put(model: nnx.Module, path: Path, new: nnx.Module) -> None:
    """Put a module in the place of another."""
    holder = _at(model, path[:-1])
    if isinstance(holder, nnx.List | nnx.Dict | list | dict):
        holder[path[-1]] = new
    else:
        setattr(holder, path[-1], new)


def _at(model: Any, path: Path) -> Any:
    for key in path:
        model = (
            model[key]
            if isinstance(model, nnx.List | nnx.Dict | list | tuple | dict)
            else getattr(model, key)
        )
    return model

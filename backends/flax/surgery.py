"""BatchNorm to RBN, IEBN and BNET in a linen model, and back; for NNX see `rbn.backends.flax.nnx.convert`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import core, traverse_util
from jax import Array

from rbn.backends.flax import distributed, layers, places
from rbn.backends.flax.layers import CalibratedNorm
from rbn.backends.flax.networks import Network, batch_norm_options, redescribed
from rbn.backends.flax.networks import layer as layer_of
from rbn.backends.flax.weights import Init, Variables, config_of, flat, path_of, traced
from rbn_core import conversion
from rbn_core.config import CALIBRATION_STARTS, Config, arguments
from rbn_core.errors import RBNTypeError, RBNValueError
from rbn_core.matching import State, Table
from rbn_core.names import own_name, to_layout
from rbn_core.networks import Norm
from rbn_core.options import kept_arguments

Path = tuple[str, ...]
Options = tuple[tuple[str, Any], ...]

TAKEN_OVER = (
    "use_running_average",
    "axis",
    "momentum",
    "epsilon",
    "dtype",
    "param_dtype",
    "axis_name",
    "axis_index_groups",
)
"""The options that BatchNorm and the layers have in common."""

KEPT = (*kept_arguments("flax"), "use_running_average", "axis", "dtype", "param_dtype", "parent", "name")
"""What a layer takes over from the one before, so that it is no option of a conversion."""

OF_BATCH_NORM = tuple(name for name in inspect.signature(nn.BatchNorm).parameters if name not in KEPT)
"""The options that BatchNorm has."""


def convert(
    model: nn.Module,
    variables: Mapping[str, Any],
    to: str = "rbn",
    *,
    init: Init | None = None,
    where: str | None = None,
    preserve: bool = False,
    key: Array | None = None,
    **options: Any,
) -> tuple[nn.Module, Variables, Table]:
    """Make every BatchNorm of a linen model an RBN, IEBN or BNET, or the other way round.

    A linen module cannot be changed: this returns another one, with variables of its own. For a `Network` of
    this package that is a `Network`; any other model comes back as a `Converted`, which runs it and lets the
    new layers answer in the place of the old ones, under the same names. Weights, statistics, epsilon,
    momentum, axis, dtypes and modes stay. The running variance stays biased, as BatchNorm's is in Flax,
    unless `running_var` says otherwise.

    Args:
        model: Any linen module that holds such layers.
        variables: Its variables; not changed.
        to: "rbn", "iebn" or "bnet"; or "bn", for layers whose calibration is inert.
        init: A function without arguments that initialises the model, such as
            `lambda: net.init(key, x, train=False)`, which is traced and not run. Without it a BatchNorm is
            told by the names of its variables, and of layers to turn into BatchNorm only those of a `Network`
            or a `Converted` are known, and stacks of layers, as `nn.scan` and `nn.vmap` make them, are
            refused.
        where: A regular expression for the whole dotted paths of the layers; every path by default.
        preserve: Whether the outputs must stay: gamma is divided by R(w_b), and BNET starts as BatchNorm.
        key: The random key that new kernels of BNET are drawn from, unless the outputs stay.
        options: Options of the new layers, such as `scaling=`, `kernel_size=` and `scale_bias_init=`.

    Returns:
        The model, its variables, and every layer that could have been converted, by its path: "replaced", or
        "kept" with the reason.

    Raises:
        RBNTypeError: The model itself is such a layer, or an option is unknown.
        RBNValueError: `to`, `where` or an option is wrong, or `init` is needed; or a layer stands for several
            that do not lie on the first axis.
    """
    pattern = conversion.chooser(to, where)
    if isinstance(model, nn.BatchNorm | CalibratedNorm):
        raise RBNTypeError(
            f"convert: expected a model that holds layers, got a {type(model).__name__}. "
            "Build the other layer in its place."
        )
    if not isinstance(model, nn.Module) or not isinstance(variables, Mapping):
        raise RBNTypeError(
            f"convert: expected a linen module and its variables, got {type(model).__name__} and "
            f"{type(variables).__name__}. For an NNX module call rbn.backends.flax.nnx.convert."
        )
    conversion.check_options(to, options, KEPT, lambda **given: _make(to, given, {}), OF_BATCH_NORM)
    stored = flat(core.unfreeze(variables))
    found = [
        (".".join(each.path), each)
        for each in _layers(model, stored, init)
        if each.is_batch_norm != (to == "bn")
    ]
    marked = functools.cache(lambda: _marked(init))
    keys = _keys(jax.random.key(0) if key is None else key)

    def plan(_: str, each: Found) -> New | str:
        own = own_below(stored, each.path)
        leads = _leads(each.path, own, marked) if init is not None else None
        return _converted(each, own, leads, to, preserve, options, next(keys))

    planned = conversion.plans(found, pattern, where, plan)
    rows = conversion.rows(found, planned, lambda new: type(new.layer).__name__, lambda each: each.name)
    converted = {each.path: new for _, each in found if isinstance(new := planned.get(id(each)), New)}
    for path, new in converted.items():
        stored = _with_arrays(stored, path, new)
    return (
        _model(model, to, converted),
        traverse_util.unflatten_dict(stored, sep="/"),
        conversion.report(rows, to),
    )


def _keys(key: Array) -> Iterator[Array]:
    """Random keys, one for each layer."""
    while True:
        key, used = jax.random.split(key)
        yield used


class Converted(nn.Module):
    """A linen model in which other layers answer in the place of some of its normalizations.

    It is called as the model is; other methods are called with `run`. The new layers have the names and the
    scopes of the old ones.

    Attributes:
        model: The model.
        answers: By the path of a layer, what answers: "bn", "rbn", "iebn" or "bnet", with its options.
    """

    model: nn.Module
    answers: tuple[tuple[Path, str, Options], ...]

    def setup(self) -> None:
        """Let the model's variables keep their names."""
        nn.share_scope(self, self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns."""
        return self.run("__call__", *args, **kwargs)

    def run(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """What another method of the model returns: `apply(variables, "encode", x, method="run")`."""
        answers = {path: (to, dict(options)) for path, to, options in self.answers}
        made: list[nn.Module] = []
        with nn.intercept_methods(functools.partial(_answer, len(path_of(self.scope)), answers, made)):
            return getattr(self.model, method)(*args, **kwargs)


def _answer(
    depth: int,
    answers: Mapping[Path, tuple[str, dict[str, Any]]],
    made: list[nn.Module],
    following: Any,
    args: Any,
    kwargs: Any,
    context: Any,
) -> Any:
    """Call a layer, or what answers in its place.

    Args:
        depth: The length of the model's own path.
        answers: What answers, by the path below the model.
        made: The layers that have answered, which are called themselves.
        following: Calls the layer.
        args: What it is called with.
        kwargs: What it is called with.
        context: Which it is.
    """
    old = context.module
    if context.method_name != "__call__" or not isinstance(old, nn.BatchNorm | CalibratedNorm):
        return following(*args, **kwargs)
    answer = answers.get(path_of(old.scope)[depth:])
    if answer is None or any(old is new for new in made):
        return following(*args, **kwargs)
    made.append(_make(*answer, _taken_over(old), old.scope))
    return made[-1](*args, **kwargs)


def _make(to: str, options: Mapping[str, Any], common: Mapping[str, Any], scope: Any = None) -> Any:
    """A layer; in a scope where there is one."""
    if to == "bn":
        return nn.BatchNorm(**{"use_fast_variance": False} | dict(common) | dict(options), parent=scope)
    given = {"running_var": "biased"} | dict(common) | dict(options)
    return getattr(layers, to.upper())(**given, parent=scope)


def _taken_over(layer: nn.Module) -> dict[str, Any]:
    """The options that stay."""
    common = _common(layer)
    if not isinstance(common["axis"], int):
        if len(common["axis"]) != 1:
            raise RBNValueError(
                f"convert: expected one channel axis, got {tuple(common['axis'])} in "
                f"{'.'.join(path_of(layer.scope))}. Leave the layer out with where=."
            )
        common["axis"] = common["axis"][0]
    return common


def _common(layer: nn.Module) -> dict[str, Any]:
    """The options that BatchNorm has, too; it names the axes of a batch and those of an image in one."""
    common = {name: getattr(layer, name) for name in TAKEN_OVER}
    if spatial := distributed.names(getattr(layer, "spatial_axis_name", None)):
        common["axis_name"] = (*distributed.names(common["axis_name"]), *spatial)
    return common


# What is there


@dataclass(frozen=True)
class Found:
    """A normalization of a model.

    Args:
        path: Where it is.
        name: What it is called.
        common: Its options that stay, as far as they are known.
        config: Makes the options of a layer of ours; `None` for BatchNorm.
    """

    path: Path
    name: str
    common: Mapping[str, Any]
    config: Any = None

    @property
    def is_batch_norm(self) -> bool:
        """Whether it is Flax's."""
        return self.config is None


def _found(path: Path, layer: nn.Module) -> Found:
    ours = isinstance(layer, CalibratedNorm)
    return Found(path, type(layer).__name__, _common(layer), layer.config if ours else None)


def _layers(model: nn.Module, stored: Mapping[str, Any], init: Init | None) -> list[Found]:
    """The normalizations of a model."""
    if isinstance(model, Network):
        nodes = [node for node in model.description.nodes if isinstance(node, Norm)]
        return [_found(tuple(node.name.split(".")), layer_of(node)) for node in nodes]
    if init is not None:
        _, owners = traced(init)
        return [_found(path, owner.norm) for path, owner in owners.items() if owner.norm is not None]
    known = {}
    if isinstance(model, Converted):
        known = {path: _found(path, _make(to, dict(options), {})) for path, to, options in model.answers}
    found = []
    for own in stored:
        collection, *parts, last = own.split("/")
        if (collection, last) == ("batch_stats", "mean"):
            path = tuple(parts)
            plain = below(stored, path).keys() <= {"gamma", "beta", "running_mean", "running_var"}
            told = Found(path, "BatchNorm", {}) if plain else Found(path, "RBN", {}, _unknown)
            found.append(known.get(path, told))
    return found


def _unknown(num_features: int) -> Config:
    raise RBNValueError(
        "convert: expected to know the layers of the model, got its variables alone, which do not say their "
        "options. Pass init=, for example lambda: net.init(key, x, train=False)."
    )


def below(stored: Mapping[str, Any], path: Path) -> State:
    """A normalization's arrays under canonical names."""
    return places.canonical(own_below(stored, path), {"": "norm"})[0]


def own_below(stored: Mapping[str, Any], path: Path) -> places.Stored:
    """A normalization's arrays under Flax's names, without its path."""
    own = {}
    for name, leaf in stored.items():
        collection, *parts = name.split("/")
        if tuple(parts[: len(path)]) == path:
            own["/".join((collection, *parts[len(path) :]))] = np.asarray(nn.unbox(leaf))
    return own


def _leads(path: Path, own: places.Stored, marked: Callable[[], Mapping[str, Any]]) -> places.Leads | None:
    """The sizes of a stack of layers, as `nn.scan` and `nn.vmap` make it; of one layer `None`.

    Args:
        path: Where it is.
        own: What it stores.
        marked: What `_marked` gives.

    Raises:
        RBNValueError: The layers do not lie on the first axes.
    """
    if not places.stack(own):
        return None
    shapes = {
        collection: marked()["/".join((collection, *path, MARK))].shape for collection in places.COLLECTIONS
    }
    if any(shape[-1] != MARKED for shape in shapes.values()):
        raise RBNValueError(
            f"convert: expected a stack of layers along the first axis, got another in {'.'.join(path)}. "
            "Stack with variable_axes={'params': 0, 'batch_stats': 0}, or leave the layer out with where=."
        )
    return {collection: shape[:-1] for collection, shape in shapes.items()}


def _marked(init: Any) -> dict[str, Any]:
    """The shapes of a model's variables, with one more in every normalization.

    It has a length that nothing else has, which tells on which axes the layers of a stack lie.
    """

    def with_a_mark(following: Any, args: Any, kwargs: Any, context: Any) -> Any:
        scope = context.module.scope
        if context.method_name == "__call__" and isinstance(context.module, nn.BatchNorm | CalibratedNorm):
            for collection in places.COLLECTIONS:
                if not scope.has_variable(collection, MARK):
                    scope.put_variable(collection, MARK, jnp.zeros(MARKED))
        return following(*args, **kwargs)

    with nn.intercept_methods(with_a_mark):
        return flat(core.unfreeze(jax.eval_shape(lambda: init())))


MARK, MARKED = "rbn_mark", 7919
"""A variable of that length."""


# What comes in its place


@dataclass(frozen=True)
class New:
    """A layer that takes another's place.

    Args:
        layer: The layer, unbound; of a stack each.
        options: What it has beside the options that stay.
        config: All its options in the project's terms.
        arrays: What it stores, under Flax's names.
        boxes: In what of it a value lies, such as `nn.Partitioned`, where an initializer says so.
    """

    layer: Any
    options: Options
    config: Config
    arrays: places.Stored
    boxes: Mapping[str, Any]


def _converted(
    found: Found,
    own: places.Stored,
    leads: places.Leads | None,
    to: str,
    preserve: bool,
    options: Mapping[str, Any],
    key: Array,
) -> New | str:
    """What takes a layer's place, or that of a stack of them, or why nothing can."""
    axis = found.common.get("axis", -1)
    if not isinstance(axis, int) and len(axis) != 1:
        return f"has channels on the axes {tuple(axis)}"
    common = dict(found.common) | {"axis": axis if isinstance(axis, int) else axis[0]}
    if leads is None:
        places.refuse_stack(own)
        leads = dict.fromkeys(places.COLLECTIONS, ())
    layers = places.unstacked(own, leads)
    # Layers that share their parameters share what is drawn.
    keys = jax.random.split(key, len(layers)) if leads["params"] else [key] * len(layers)
    made = []
    for number, (each, used) in enumerate(zip(layers, keys, strict=True)):
        new = _one(found, places.canonical(each, {"": "norm"})[0], common, to, preserve, options, used)
        if isinstance(new, str):
            return f"{new}, in layer {number} of the stack" if len(layers) > 1 else new
        made.append(new)
    boxes = dict(made[0].boxes)
    for _ in leads["params"]:
        boxes = {name: box.add_axis(0, {nn.PARTITION_NAME: None}) for name, box in boxes.items()}
    return replace(made[0], arrays=places.stacked([new.arrays for new in made], leads), boxes=boxes)


def _one(
    found: Found,
    state: State,
    common: Mapping[str, Any],
    to: str,
    preserve: bool,
    options: Mapping[str, Any],
    key: Array,
) -> New | str:
    """What takes the place of one layer, or why nothing can."""
    channels = len(state["running_mean"])
    drawn: dict[str, Any] = {}
    if to == "bn":
        if found.common.get("momentum", 0.9) is None:
            return "averages all batches, which Flax's BatchNorm does not"
        given = conversion.to_batch_norm(found.config(channels), state)
        if isinstance(given, str):
            return given
        own = {"use_scale": "gamma" in given, "use_bias": "beta" in given} | dict(options)
        layer = _make(to, own, common)
        config = config_of(layer, channels)
        given.pop("num_batches_tracked", None)
    else:
        affine = {"use_scale": "gamma" in state, "use_bias": "beta" in state}
        own = (affine if to != "bnet" else {}) | dict(options)
        layer = _make(to, own, common)
        config = layer.config(channels)
        if to == "bnet" or any(f"{name}_init" in options for name in CALIBRATION_STARTS):
            x = jnp.ones((1, *(1,) * config.spatial_dims, channels))
            drawn = flat({"params": layer.clone(use_running_average=True, axis=-1).init(key, x)["params"]})
        starts = {
            name: np.asarray(nn.unbox(drawn[f"params/{name}"]))
            for name in CALIBRATION_STARTS
            if f"{name}_init" in options and f"params/{name}" in drawn
        }
        given = conversion.from_batch_norm(config, {**state, **starts}, preserve)
        if isinstance(given, str):
            return given
    arrays = {name: np.asarray(nn.unbox(leaf)) for name, leaf in drawn.items() if "/conv/" in name} | {
        own_name("flax", "", name, "norm"): to_layout("flax", name, "norm", value)
        for name, value in given.items()
    }
    boxes = {name: leaf for name, leaf in drawn.items() if isinstance(leaf, nn.meta.AxisMetadata)}
    return New(layer, tuple(own.items()), config, arrays, boxes)


def _with_arrays(stored: Mapping[str, Any], path: Path, new: New) -> dict[str, Any]:
    """Variables with those of a new layer in the place of the old one's."""

    def inside(own: str) -> bool:
        return tuple(own.split("/")[1 : len(path) + 1]) == path

    params = [leaf for own, leaf in stored.items() if inside(own) and own.startswith("params/")]
    param_dtype = nn.unbox(params[0]).dtype if params else jnp.float32
    result = {own: leaf for own, leaf in stored.items() if not inside(own)}
    for own, array in new.arrays.items():
        collection, _, name = own.partition("/")
        place = "/".join((collection, *path, name))
        old = stored.get(place)
        if old is not None:
            dtype = nn.unbox(old).dtype
        elif name == "num_batches_tracked":
            dtype = jnp.int32
        else:
            dtype = param_dtype
        value, box = jnp.asarray(array, dtype), new.boxes.get(own) if old is None else old
        result[place] = box.replace_boxed(value) if isinstance(box, nn.meta.AxisMetadata) else value
    return result


def _model(model: nn.Module, to: str, converted: Mapping[Path, New]) -> nn.Module:
    """The model with its new layers."""
    if not converted:
        return model
    if isinstance(model, Network):
        for path, new in converted.items():
            node = Norm(".".join(path), (), new.config.num_features, to)
            known = batch_norm_options("flax", node) if to == "bn" else arguments("flax", node.config)
            if unknown := [name for name, _ in new.options if name not in known]:
                raise RBNTypeError(
                    f"convert: expected options that a description of a network has, got "
                    f"{', '.join(unknown)}. Choose from {', '.join(known)}."
                )
        named = {".".join(path): (to, new.config) for path, new in converted.items()}
        return Network(redescribed(model.description, named))
    answers = (
        {} if not isinstance(model, Converted) else {path: (path, *rest) for path, *rest in model.answers}
    )
    answers |= {path: (path, to, new.options) for path, new in converted.items()}
    return Converted(model.model if isinstance(model, Converted) else model, tuple(answers.values()))

"""A Flax model's weights to and from canonical NumPy arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import core, traverse_util
from flax import nnx as flax_nnx

from rbn.backends.flax import functional, nnx, places
from rbn.backends.flax.layers import CalibratedNorm
from rbn.backends.flax.networks import Network
from rbn_core import reference
from rbn_core.config import Config
from rbn_core.errors import RBNTypeError, RBNValueError
from rbn_core.execution import initial_state
from rbn_core.matching import State
from rbn_core.names import Kind, own_name, to_layout, to_own
from rbn_core.networks import Norm
from rbn_core.weights import Layers

KINDS: tuple[tuple[Any, Kind], ...] = (
    (nn.Conv, "convolution"),
    (nn.ConvTranspose, "transposed_convolution"),
    (nn.Dense, "linear"),
    (nn.Embed, "embedding"),
    ((nn.BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm, CalibratedNorm), "norm"),
)

Variables = dict[str, Any]
"""What a linen model's `init` returns: collections, with arrays nested under the names of their layers."""

Init = Callable[[], Any]
"""A function that initialises a linen model, such as `lambda: net.init(key, x, train=False)`."""


def to_numpy(model: Mapping[str, Any] | flax_nnx.Module, init: Network | Init | None = None) -> State:
    """Copies of everything a model stores, under canonical names; half precision becomes float32.

    Args:
        model: The variables of a linen model, or of one layer; or an NNX module.
        init: What the variables are of, which they do not say themselves: this package's `Network`, or a
            function without arguments that initialises the model, which is traced and not run. Without it a
            kernel of rank 2 is a linear layer's, and one of more a convolution's: what has transposed
            convolutions, or a `DenseGeneral` as attention has, needs it. Not needed for an NNX module.

    Raises:
        RBNTypeError: This is a linen module, which stores nothing.
        RBNValueError: A name holds a slash, or two arrays get one name.
    """
    if isinstance(model, flax_nnx.Module):
        return nnx.to_numpy(model)
    if not isinstance(model, Mapping):
        raise RBNTypeError(
            f"RBN: expected an NNX module or the variables of a linen model, got {type(model).__name__}. "
            "Pass what the linen model's init returned: a linen module stores nothing itself."
        )
    stored = {own: np.asarray(array) for own, array in flat(nn.unbox(core.unfreeze(model))).items()}
    state, _ = places.canonical(stored, None if init is None else layouts(init))
    return {name: places.copied(array) for name, array in state.items()}


def from_numpy(
    model: nn.Module | Init | flax_nnx.Module,
    state: Mapping[str, Any],
    *,
    rename: Mapping[str, str] | None = None,
    strict: bool = True,
) -> Any:
    """Load a state: a linen model's is returned as its variables, an NNX module is filled in place.

    Args:
        model: One linen layer of this package or its `Network`; for any other linen model a function without
            arguments that initialises it, such as `lambda: net.init(key, x, train=False)`, which is run only
            where the state lacks something; or an NNX module. Dtypes and the boxes of `nn.Partitioned` stay.
        state: Arrays under canonical names, those that `to_numpy` has of such a model.
        rename: Patterns of the state's names, each with the model's name for what it matches.
        strict: Whether anything missing, unexpected or wrong is an error; else it is left out, and what is
            left out is as at the start.

    Returns:
        The linen model's variables and the table of every array; the table alone for an NNX module.

    Raises:
        RBNTypeError: This is another linen module, which does not know its own shapes.
        RBNValueError: The state does not match; everything wrong is listed, nothing changes.
    """
    if isinstance(model, flax_nnx.Module):
        return nnx.from_numpy(model, state, rename=rename, strict=strict)
    target = _target(model, state)
    shapes = {own: nn.unbox(leaf) for own, leaf in target.leaves.items()}
    arrays, table = places.to_load(state, shapes, target.kinds, rename=rename, strict=strict)
    starts = target.start() if len(arrays) < len(shapes) else {}
    loaded = {
        own: _boxed(leaf, jnp.asarray(arrays.get(own, starts.get(own)), shapes[own].dtype))
        for own, leaf in target.leaves.items()
    }
    return traverse_util.unflatten_dict(loaded, sep="/"), table


def describe(model: Network | Init | flax_nnx.Module) -> Layers:
    """What owns a model's arrays: by dotted path the kind of layer, with the options of ours.

    Args:
        model: This package's linen `Network`; for any other linen model a function without arguments that
            initialises it, which is traced and not run; or an NNX module.

    Raises:
        RBNTypeError: This is another linen module, which does not know its own shapes.
    """
    if isinstance(model, flax_nnx.Module):
        return nnx.describe(model)
    if isinstance(model, Network):
        return model.description.layers()
    variables, owners = traced(model)
    stored = flat(nn.unbox(variables))
    shaped = {own: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape) for own, leaf in stored.items()}
    state, _ = places.canonical(shaped, _layouts(stored, owners))
    named = {".".join(path): owner for path, owner in owners.items()}
    layers: Layers = {}
    for path in dict.fromkeys(name.rpartition(".")[0] for name in state):
        owner = named.get(path, Owner("other", "other"))
        layers[path] = {"kind": owner.kind}
        if isinstance(owner.norm, CalibratedNorm):
            mean = state[f"{path}.running_mean" if path else "running_mean"]
            layers[path] |= dataclasses.asdict(owner.norm.config(len(mean)))
    return layers


def config_of(norm: Any, num_features: int) -> Config:
    """The options of a linen layer of C channels in the project's terms; of Flax's BatchNorm, too."""
    if isinstance(norm, CalibratedNorm):
        return norm.config(num_features)
    affine: dict[str, Any] = {"gamma": norm.use_scale, "beta": norm.use_bias}
    return Config(num_features, norm.epsilon, norm.momentum, centering=None, scaling=None, **affine)


# What owns the arrays


@dataclass(frozen=True)
class Owner:
    """A layer, as far as that decides about its arrays.

    Args:
        kind: What it is.
        lies: The kind whose arrays lie as its do.
        rank: The rank of its kernel; `None` for any.
        norm: The layer itself where it is a BatchNorm or one of ours.
    """

    kind: Kind
    lies: Kind
    rank: int | None = None
    norm: nn.Module | None = None


def traced(init: Any) -> tuple[Variables, dict[tuple[str, ...], Owner]]:
    """The variables that an initialisation would make, as shapes, and the layers by their paths.

    Args:
        init: A function without arguments that initialises a linen model.

    Raises:
        RBNTypeError: This is no such function.
        RBNValueError: It returns something else than variables, or is compiled already.
    """
    if isinstance(init, nn.Module) or not callable(init):
        raise RBNTypeError(
            f"RBN: expected a function that initialises the linen model, got {type(init).__name__}: a linen "
            "module does not know its shapes. Pass for example lambda: net.init(key, x, train=False)."
        )
    owners: dict[tuple[str, ...], Owner] = {}

    def note(following: Any, args: Any, kwargs: Any, context: Any) -> Any:
        path, owner = path_of(context.module.scope), _owner(context.module)
        # A lifted function of a module shows it once more, at the path of who calls the function.
        is_method = hasattr(type(context.module), context.method_name)
        # A module that only holds another can share its scope.
        if is_method and (path not in owners or owner.kind != "other"):
            owners[path] = owner
        return following(*args, **kwargs)

    with nn.intercept_methods(note):
        variables = jax.eval_shape(lambda: init())  # a new function: JAX remembers what it has traced
    if not isinstance(variables, Mapping) or not owners:
        raise RBNValueError(
            f"RBN: expected a function that initialises the linen model, got one that returns "
            f"{type(variables).__name__}{'' if owners else ' and runs no module'}. Pass for example "
            "lambda: net.init(key, x, train=False), without jit, so that its modules can be seen."
        )
    return core.unfreeze(variables), owners


def path_of(scope: Any) -> tuple[str, ...]:
    """Where a module's variables are: `scope.path` says where they were before `nn.share_scope`."""
    return tuple(scope.path) if scope.parent is None else (*path_of(scope.parent), scope.name)


def layouts(init: Network | Init) -> dict[str, Kind]:
    """How the arrays of every layer lie, by dotted path.

    Args:
        init: As in `to_numpy`.
    """
    if isinstance(init, CalibratedNorm):
        return {"": "norm"}
    if isinstance(init, Network):
        return {path: layer["kind"] for path, layer in init.description.layers().items()}
    variables, owners = traced(init)
    return _layouts(flat(nn.unbox(variables)), owners)


def flat(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables under names such as "params/conv1/kernel"; a box counts as an array.

    Raises:
        RBNValueError: A name holds a slash.
    """
    return {places.own_path(path): leaf for path, leaf in traverse_util.flatten_dict(variables).items()}


def _owner(module: nn.Module) -> Owner:
    kind: Kind = next((kind for types, kind in KINDS if isinstance(module, types)), "other")
    if isinstance(module, CalibratedNorm | nn.BatchNorm):
        return Owner(kind, kind, norm=module)
    if kind in ("convolution", "transposed_convolution"):
        # A kernel that is given transposed lies as the convolution's of which this is the gradient.
        lies: Kind = "convolution" if getattr(module, "transpose_kernel", False) else kind
        return Owner(kind, lies, np.size(module.kernel_size) + 2)
    return Owner(kind, kind, 2 if kind == "linear" else None)


def _layouts(stored: Mapping[str, Any], owners: Mapping[tuple[str, ...], Owner]) -> dict[str, Kind]:
    """How the arrays of every layer lie, by dotted path.

    Layers stacked by `nn.scan` or `nn.vmap` have an axis more, and lie as no layer does elsewhere.
    """
    layouts: dict[str, Kind] = {}
    for path, owner in owners.items():
        kernel = stored.get("/".join(("params", *path, "kernel")))
        stacked = owner.rank and kernel is not None and len(kernel.shape) != owner.rank
        layouts[".".join(path)] = "other" if stacked else owner.lies
    return layouts


# What a model takes


@dataclass(frozen=True)
class Target:
    """What a linen model stores.

    Args:
        leaves: Shapes and dtypes under Flax's names, in their boxes.
        kinds: How the arrays of every layer lie, by dotted path.
        start: Makes the values to start from.
    """

    leaves: dict[str, Any]
    kinds: dict[str, Kind]
    start: Callable[[], Mapping[str, Any]]


def _target(model: Any, state: Mapping[str, Any]) -> Target:
    if isinstance(model, CalibratedNorm):
        return _layer_target(model, state)
    if isinstance(model, Network):
        return _network_target(model)
    variables, owners = traced(model)
    leaves = flat(variables)
    kinds = _layouts({own: nn.unbox(leaf) for own, leaf in leaves.items()}, owners)
    return Target(leaves, kinds, lambda: flat(nn.unbox(core.unfreeze(model()))))


def _layer_target(layer: CalibratedNorm, state: Mapping[str, Any]) -> Target:
    """A layer takes its number of channels from the state."""
    channels = (len(value) for value in (state.get("running_mean"), *state.values()) if np.ndim(value) == 1)
    config = layer.config(next(channels, 1))
    leaves = places.shapes_of_norm(
        config,
        jax.dtypes.canonicalize_dtype(layer.param_dtype),
        jax.dtypes.canonicalize_dtype(functional.statistics_dtype(layer.param_dtype)),
    )
    kinds: dict[str, Kind] = {"": "norm"}
    return Target(leaves, kinds, lambda: to_own("flax", reference.Layer(config).state(), kinds))


def _network_target(network: Network) -> Target:
    kinds = layouts(network)
    leaves = {}
    for node in network.description.nodes:
        for name, shape in node.state_shapes().items():
            counts = name == "num_batches_tracked"
            if counts and isinstance(node, Norm) and node.layer == "bn":
                continue  # Flax's BatchNorm does not count
            array = np.broadcast_to(np.zeros((), np.int32 if counts else np.float32), shape)
            own = own_name("flax", node.name, name, kinds[node.name])
            leaves[own] = to_layout("flax", name, kinds[node.name], array)
    return Target(leaves, kinds, lambda: to_own("flax", initial_state(network.description), kinds))


def _boxed(leaf: Any, value: Any) -> Any:
    return leaf.replace_boxed(value) if isinstance(leaf, nn.meta.AxisMetadata) else value

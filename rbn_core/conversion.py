"""BatchNorm's weights as those of RBN, IEBN and BNET, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from rbn_core import reference
from rbn_core.config import Config, check_choice
from rbn_core.errors import RBNTypeError, RBNValueError
from rbn_core.matching import Row, State, Table
from rbn_core.networks import Norm
from rbn_core.options import LAYERS as OURS
from rbn_core.options import OPTIONS

LayerType = TypeVar("LayerType")
PlanType = TypeVar("PlanType")

LAYERS = ("bn", *map(str.lower, OURS))
"""What a layer can be converted to."""


def chooser(to: str, where: str | None) -> re.Pattern[str]:
    """What the path of a layer must match to be converted.

    Args:
        to: What the caller wants the layers to be; one of `LAYERS`.
        where: A regular expression for whole dotted paths; every path without it.

    Raises:
        RBNError: `to` is unknown, or `where` is no regular expression.
    """
    check_choice("to", to, LAYERS, "convert")
    if not isinstance(where, str | None):
        raise RBNTypeError(
            f"convert: expected where to be a regular expression, got {where!r}. "
            r"Pass for example r'layer[14]\..*', which matches whole dotted paths."
        )
    try:
        return re.compile(".*" if where is None else where)
    except re.error as error:
        raise RBNValueError(
            f"convert: expected where to be a regular expression, got {where!r} ({error}). "
            "See Python's re module; a dot in a path is \\."
        ) from error


def check_hits(where: str | None, paths: Collection[str], hits: Collection[Any]) -> None:
    """Refuse a pattern that matches no layer.

    Args:
        where: The pattern, if there is one.
        paths: Those of all layers that could be converted.
        hits: What of these it matches.

    Raises:
        RBNValueError: It matches nothing.
    """
    if where is not None and not hits:
        shown = ", ".join([*list(paths)[:6], *(["..."] if len(paths) > 6 else [])]) or "none"
        raise RBNValueError(
            f"convert: expected where to match the whole path of a layer, got {where!r}, "
            f"which matches none of these {len(paths)}: {shown}. "
            r"Pass for example r'layer1\..*' for all layers below layer1."
        )


def check_options(
    to: str,
    options: Mapping[str, Any],
    kept: Collection[str],
    build: Callable[..., object],
    of_batch_norm: Collection[str] = (),
) -> None:
    """Refuse options that no layer could be built with, whether there is one or not.

    Args:
        to: What the layers become.
        options: What the caller wants of them.
        kept: The arguments that come from the layer before.
        build: Makes such a layer with the options, to see whether it takes them; not called for "bn".
        of_batch_norm: The options that "bn" has.

    Raises:
        RBNError: One is refused.
    """
    if taken := [name for name in options if name in kept]:
        raise RBNTypeError(
            f"convert: expected options that the layer before has not, got {', '.join(taken)}. "
            "These stay as they are: set them on that layer first."
        )
    if to != "bn":
        build(**options)
        return
    if unknown := set(options) - set(of_batch_norm):
        raise RBNTypeError(
            f"convert: expected no option{' but ' if of_batch_norm else ''}{', '.join(of_batch_norm)} for "
            f"'bn', got {', '.join(sorted(unknown))}. Leave it out."
        )
    choices = OPTIONS["spatial_dims"].choices["BNET"]
    check_choice("spatial_dims", options.get("spatial_dims", 2), choices, "convert")


def plans(
    found: Sequence[tuple[str, LayerType]],
    chosen: re.Pattern[str],
    where: str | None,
    plan: Callable[[str, LayerType], PlanType | str],
) -> dict[int, PlanType | str]:
    """What is to become of every layer that is chosen, by its identity: of one under two names once.

    Args:
        found: The layers that could be converted, with their dotted paths.
        chosen: What `chooser` gives.
        where: The caller's pattern.
        plan: Takes a path and a layer to what becomes of it, or why it stays; it changes nothing.

    Raises:
        RBNValueError: No layer is chosen.
    """
    hit = {id(layer) for path, layer in found if chosen.fullmatch(path)}
    check_hits(where, [path for path, _ in found], hit)
    planned: dict[int, PlanType | str] = {}
    for path, layer in found:
        if id(layer) in hit and id(layer) not in planned:
            planned[id(layer)] = plan(path, layer)
    return planned


def rows(
    found: Sequence[tuple[str, LayerType]],
    planned: Mapping[int, PlanType | str],
    replaced: Callable[[PlanType], str],
    name: Callable[[LayerType], str] = lambda layer: type(layer).__name__,
) -> list[Row]:
    """The rows of the table that a conversion returns.

    Args:
        found: The layers that could be converted, with their dotted paths.
        planned: What `plans` gives; a text says why a layer stays.
        replaced: What to say of a layer that takes another's place.
        name: What a layer is called; by default its class.
    """
    return [
        Row(path, "kept", name(layer), plan)
        if isinstance(plan, str)
        else Row(path, "replaced", name(layer), replaced(plan))
        for path, layer in found
        if (plan := planned.get(id(layer))) is not None
    ]


def replaced_by(new: str, *, frozen: bool, learns: bool) -> str:
    """What a row of the table says of a layer in another's place.

    Args:
        new: Its class.
        frozen: Whether it always evaluates, as after `freeze`.
        learns: Whether a parameter of it is learned.
    """
    return f"{new}, frozen" if frozen else new if learns else f"{new}, not learned, as the layer before"


def report(found: Sequence[Row], to: str) -> Table:
    """The rows of a conversion as a table, which says so where nothing was replaced.

    Args:
        found: One for each layer that was "replaced" or "kept".
        to: What the layers were to become.
    """
    if any(row.status == "replaced" for row in found):
        return Table(tuple(found))
    absent = "RBN, IEBN or BNET" if to == "bn" else "BatchNorm"
    return Table(tuple(found), ("0 replaced" if found else f"0 replaced: there is no {absent}",))


def from_batch_norm(config: Config, state: Mapping[str, Any], preserve: bool) -> State | str:
    """The state of a layer that takes the place of a BatchNorm.

    Y = X_s R gamma + beta, with R = R(w_b) the same everywhere as long as w_v = 0: gamma / R(w_b) gives what
    gamma gave before. BNET takes gamma as its centre tap and beta as its bias.

    Args:
        config: The layer's options.
        state: The BatchNorm's, under canonical names, and w_m, w_v and w_b where they start otherwise.
        preserve: Whether the layer must give what the BatchNorm gave.

    Returns:
        The layer's state, without what the BatchNorm has nothing for when it need not be preserved (BNET's
        convolution); or in words why nothing can be preserved.
    """
    arrays = {name: np.asarray(value) for name, value in state.items()}
    fresh = reference.Layer(config).state()
    taken = {name: arrays.get(name, start) for name, start in fresh.items()}
    for name in ("center_weight", "scale_weight"):
        if preserve and np.any(taken.get(name, 0) != 0):
            return f"{name} would not start at 0, so that the layer would give something else"
    if config.kernel_size is not None:
        if not preserve:
            return {name: value for name, value in taken.items() if not name.startswith("conv_")}
        centre: Any = (slice(None), 0, *(config.kernel_size // 2,) * config.spatial_dims)
        taken["conv_weight"][centre] = arrays.get("gamma", 1.0)
        taken["conv_bias"] = arrays.get("beta", fresh["conv_bias"])
    elif preserve and config.scaling is not None:
        if not config.gamma:
            return "has no gamma that could make up for R(w_b)"
        taken["gamma"] = taken["gamma"].astype(np.float64) / restriction(config, taken["scale_bias"])
    return taken


def to_batch_norm(config: Config, state: Mapping[str, Any]) -> State | str:
    """The state of the BatchNorm that gives what a layer gives, or in words why there is none.

    There is one where the calibration is inert: w_m = 0 and w_v = 0, and every tap of BNET's kernels but the
    centre is 0.

    Args:
        config: The layer's options.
        state: Its arrays, under canonical names.
    """
    arrays = {name: np.asarray(value) for name, value in state.items()}
    for name in ("center_weight", "scale_weight"):
        if name in arrays and np.any(arrays[name] != 0):
            return f"{name} is not 0 everywhere (largest {np.max(np.abs(arrays[name])):.3g})"
    kept = {
        name: value for name, value in arrays.items() if name.startswith(("gamma", "beta", "running", "num"))
    }
    if config.kernel_size is not None:
        centre: Any = (slice(None), 0, *(config.kernel_size // 2,) * config.spatial_dims)
        others = arrays["conv_weight"].copy()
        others[centre] = 0
        if np.any(others != 0):
            return f"conv_weight is not 0 beside its centre (largest {np.max(np.abs(others)):.3g})"
        return kept | {"gamma": arrays["conv_weight"][centre], "beta": arrays["conv_bias"]}
    if config.scaling is not None:
        gamma = arrays.get("gamma", np.ones(config.num_features)).astype(np.float64)
        kept["gamma"] = gamma * restriction(config, arrays["scale_bias"])
        if not config.gamma:
            kept.setdefault("beta", np.zeros(config.num_features))
    return kept


def convert_state(
    state: Mapping[str, Any], before: Mapping[str, Norm], after: Mapping[str, Norm], preserve: bool
) -> State:
    """The state of a network in which some normalizations become others.

    Args:
        state: The network's, under canonical names.
        before: What is there, by dotted path.
        after: What is to be there, at the same paths.
        preserve: As in `from_batch_norm`. Back to BatchNorm goes only what is preserved.

    Returns:
        All arrays: a BNET that need not be preserved starts at 0, as in the papers' networks.

    Raises:
        RBNValueError: A layer cannot become the other; every reason is told.
    """
    converted = dict(state)
    wrong = []
    for path, new in after.items():
        old = before[path]
        if (old.layer, old.options) == (new.layer, new.options):
            continue
        prefix = f"{path}." if path else ""
        own = {name: state[prefix + name] for name in old.state_shapes() if prefix + name in state}
        if old.layer == "bn":
            found = from_batch_norm(new.config, own, preserve)
        elif new.layer == "bn":
            found = to_batch_norm(old.config, own)
        else:
            found = f"is {old.layer}, which becomes {new.layer} by way of bn alone"
        if isinstance(found, str):
            wrong.append(f"{path} {found}")
            continue
        start = reference.Layer(new.config).state()
        for name in own:
            del converted[prefix + name]
        for name in new.state_shapes():
            value = found.get(name, np.zeros_like(start[name]))
            dtype = own["running_mean"].dtype if value.dtype.kind == "f" else value.dtype
            converted[prefix + name] = value.astype(dtype, copy=False)
    if wrong:
        raise RBNValueError(
            f"convert: expected layers that can be converted, got {len(wrong)} that cannot: "
            f"{'; '.join(wrong[:6])}{'; ...' if len(wrong) > 6 else ''}. Choose others with stages or places."
        )
    return converted


def restriction(config: Config, scale_bias: Any) -> Any:
    """R(w_b) of eq. 9, as it is where w_v = 0."""
    restrict = reference.sigmoid if config.restrict == "sigmoid" else reference.hard_sigmoid
    return restrict(np.asarray(scale_bias, np.float64))

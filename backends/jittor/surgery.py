"""Changes to the layers of a whole Jittor model."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from jittor import Module, Var, nn

from rbn.backends.jittor.layers import CalibratedNorm
from rbn.backends.jittor.networks import LAYERS
from rbn.backends.jittor.weights import assign, config_of, layers, to_numpy, variables
from rbn_core import conversion
from rbn_core.errors import RBNTypeError
from rbn_core.matching import State, Table
from rbn_core.names import PARAMETERS, RUNNING_STATISTICS
from rbn_core.options import kept_arguments

KEPT = (*kept_arguments("jittor"), "is_train", "sync")
"""What a layer takes over from the one before, so that it is no option of a conversion."""

ATTACHED = (
    "__fhook__",
    "__fhook2__",
    "__bihook__",
    "__bohook__",
    "_requires_grad",
    "_amp_level",
    "backup_grad_state",
)
"""What Jittor attaches to a module: hooks, precision, and what is learned."""

TWINS = {"gamma": "conv_weight", "beta": "conv_bias", "conv_weight": "gamma", "conv_bias": "beta"}
"""What takes whose place between BatchNorm and BNET."""


def convert(
    model: Module, to: str = "rbn", *, where: str | None = None, preserve: bool = False, **options: Any
) -> Table:
    r"""Replace BatchNorm by RBN, IEBN or BNET in any model, or those by BatchNorm, in place.

    The new layers have the old ones' parameters and statistics (the very variables, so that an optimizer goes
    on with them), eps, momentum, dtype, mode and hooks. What they add is learned if a parameter before was;
    else the table says so. They accumulate the unbiased variance unless
    `running_var="biased"`, as Jittor's BatchNorm does, is among the options. Convert before building an
    optimizer for what they add.

    Args:
        model: Any model.
        to: "rbn", "iebn" or "bnet" replace every `jittor.nn.BatchNorm`, which is BatchNorm1d, 2d and 3d in
            one; "bn" replaces every RBN, IEBN and BNET whose calibration is inert.
        where: A regular expression for whole dotted paths of layers; all by default.
        preserve: Whether the model must give what it gave before: gamma is divided by R(w_b), and BNET's
            kernel is gamma in its centre. "bn" always does.
        options: The new layers', such as `scaling="channel_std"`, or `kernel_size=5` and `spatial_dims=1`.

    Returns:
        A row for each layer that was "replaced", or "kept" and why.

    Raises:
        RBNError: `to`, `where` or an option is refused, `where` matches no layer, or the model itself is what
            is to be replaced; nothing has changed.
    """
    chosen = conversion.chooser(to, where)
    conversion.check_options(to, options, KEPT, lambda **given: LAYERS[to](1, **given))
    if _is_replaceable(model, to):
        raise RBNTypeError(
            f"convert: expected a model with layers inside, got a {type(model).__name__} itself, which "
            "cannot be replaced in place. Put it into nn.Sequential, or build the other layer and load its "
            "state."
        )
    found = [(path, module) for path, module in layers(model) if _is_replaceable(module, to)]
    planned = conversion.plans(found, chosen, where, lambda _, module: _plan(module, to, preserve, options))
    modules = model.modules()
    backups = [vars(module).get("backup_grad_state", {}) for module in modules]
    rows = conversion.rows(found, planned, lambda plan: plan.described(backups))
    for plan in planned.values():
        if isinstance(plan, _Replacement):
            plan.carry_out(modules)
    return conversion.report(rows, to)


def _is_replaceable(module: Module, to: str) -> bool:
    """Whether it is what becomes something else; our layers are BatchNorms, too."""
    ours = isinstance(module, CalibratedNorm)
    return ours if to == "bn" else isinstance(module, nn.BatchNorm) and not ours


class _Replacement(NamedTuple):
    """A new layer, the old one, and what the new one's variables are to become."""

    layer: Module
    old: Module
    values: State

    def described(self, backups: list[dict[int, bool]]) -> str:
        """What the table says of the new layer."""
        before = _parameters(self.old)
        learns = not before or any(_is_learned(var, backups) for var in before)
        return conversion.replaced_by(type(self.layer).__name__, frozen=is_frozen(self.old), learns=learns)

    def carry_out(self, modules: list[Module]) -> None:
        """Put the layer wherever the old one is, with its values."""
        new, old = variables(self.layer), variables(self.old)
        for name, value in self.values.items():
            assign(new[name], value)
        backups = [vars(module).get("backup_grad_state", {}) for module in modules]
        before = _parameters(self.old)
        whole = next((var for var in before if _is_learned(var, backups)), before[0] if before else None)
        for name in new.keys() & set(PARAMETERS) - old.keys():
            like = old.get(TWINS.get(name, ""), whole)
            if like is not None:
                _learn_alike(new[name], like, backups)
        for name in old.keys() - new.keys():
            for backup in backups:
                backup.pop(id(old[name]), None)  # or another variable of the same identity would be frozen
        for module in modules:
            for place in (vars(module), vars(module).get("layers")):  # the latter is a Sequential's
                if isinstance(place, dict):
                    place |= {name: self.layer for name, value in place.items() if value is self.old}
        if is_frozen(self.old):
            stay_frozen(self.layer, modules)


def stay_frozen(layer: Module, modules: list[Module]) -> None:
    """Let a layer evaluate, also in training, with parameters that stay.

    Args:
        layer: The layer.
        modules: What holds it: their `train()` gives parameters their gradients back, but not these.
    """
    kind: Any = type(layer)
    for parameter in layer.parameters():
        parameter.stop_grad()
        for module in modules:
            vars(module).get("backup_grad_state", {}).pop(id(parameter), None)
    if not is_frozen(layer):
        layer.__class__ = _frozen(kind)


def is_frozen(layer: Any) -> bool:
    """Whether `stay_frozen` was called for a layer, or for the one in whose place it is."""
    return bool(getattr(type(layer), "frozen", False))


@functools.cache
def _frozen(kind: Any) -> Any:
    """A class of layers that always evaluate."""

    def execute(self: Any, x: Var) -> Var:
        self.is_train = False
        return kind.execute(self, x)

    def reduced(self: Any) -> Any:
        """How it is pickled and copied: by the class that can be found under its name."""
        return _new_frozen, (kind,), dict(vars(self))

    return type(kind.__name__, (kind,), {"execute": execute, "frozen": True, "__reduce__": reduced})


def _new_frozen(kind: Any) -> Any:
    """A frozen layer without anything in it."""
    kind = _frozen(kind)
    return kind.__new__(kind)


def _plan(module: Module, to: str, preserve: bool, options: Mapping[str, Any]) -> _Replacement | str:
    """What takes a module's place, or why nothing does; nothing changes yet."""
    kind = type(module).__base__ if is_frozen(module) else type(module)
    if kind not in (nn.BatchNorm, *LAYERS.values()):
        return "is a class of its own"
    if to == "bn":
        return _batch_norm(module)
    if len(module.modules()) > 1 or not variables(module).keys() <= {"gamma", "beta", *RUNNING_STATISTICS}:
        return "has more variables or modules than a BatchNorm"
    return _calibrated(module, to, preserve, options)


def _calibrated(
    norm: nn.BatchNorm, to: str, preserve: bool, options: Mapping[str, Any]
) -> _Replacement | str:
    """The RBN, IEBN or BNET that takes a BatchNorm's place."""
    known = _common(norm) | ({} if to == "bnet" else {"affine": norm.affine})
    layer = LAYERS[to](norm.num_features, **known, **options)
    state = conversion.from_batch_norm(config_of(layer), to_numpy(norm), True) if preserve else {}
    return state if isinstance(state, str) else _taking_over(layer, norm, state)


def _batch_norm(module: CalibratedNorm) -> _Replacement | str:
    """The BatchNorm that takes a layer's place."""
    state = conversion.to_batch_norm(config_of(module), to_numpy(module))
    if isinstance(state, str):
        return state
    if module.momentum is None:
        return "averages all batches, with momentum=None, which Jittor's BatchNorm cannot"
    return _taking_over(
        nn.BatchNorm(module.num_features, affine="gamma" in state, **_common(module)), module, state
    )


def _common(old: Module) -> dict[str, Any]:
    """The options that are the same in a layer and in the one that takes its place."""
    eps = old.epsilon if isinstance(old, CalibratedNorm) else old.eps
    return {"eps": eps} | {name: getattr(old, name) for name in ("momentum", "is_train", "sync")}


def _taking_over(layer: Module, old: Module, state: State) -> _Replacement:
    """A new layer with an old one's variables, dtype and hooks, and the state that it is to have."""
    if (dtype := str(old.running_mean.dtype)) != "float32":
        getattr(layer, dtype)()
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(getattr(layer, name), Var) and isinstance(getattr(old, name), Var):
            setattr(layer, name, getattr(old, name))
    if attached := {name: value for name, value in vars(old).items() if name in ATTACHED}:
        vars(layer).update(attached)
        layer._place_hooker()
    return _Replacement(layer, old, {name: state[name] for name in state.keys() & set(PARAMETERS)})


def _parameters(layer: Module) -> list[Var]:
    """What a layer could learn."""
    return [var for name, var in variables(layer).items() if name in PARAMETERS]


def _is_learned(var: Var, backups: list[dict[int, bool]]) -> bool:
    """Whether a variable is learned in training."""
    return any(backup.get(id(var), False) for backup in backups) or not var.is_stop_grad()


def _learn_alike(new: Var, old: Var, backups: list[dict[int, bool]]) -> None:
    """Let a variable be learned if another was, in its place, now and after `train()`."""
    if old.is_stop_grad():
        new.stop_grad()
    for backup in backups:
        if id(old) in backup:
            backup[id(new)] = backup[id(old)]
